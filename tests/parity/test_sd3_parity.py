"""Stable Diffusion 3's parts against diffusers and transformers, on random weights of random shapes."""

import inspect
import json
import math
import random

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from retrack_jax.checkpoints import (  # noqa: E402
    export_diffusers,
    export_pipeline,
    import_diffusers,
    load_pipeline,
    prompt_embeddings,
)
from retrack_jax.checkpoints.diffusers_export import export_lora  # noqa: E402
from retrack_jax.checkpoints.diffusers_import import example_inputs, load_params  # noqa: E402
from retrack_jax.checkpoints.text_encoders import T5_TABLE  # noqa: E402
from retrack_jax.diffusion.conversions import make_eps_fn  # noqa: E402
from retrack_jax.models.mmdit import MMDiT  # noqa: E402
from retrack_jax.models.t5_text import T5Encoder, states_by_layers  # noqa: E402
from retrack_jax.sampling import make_sampler, sample  # noqa: E402
from retrack_jax.sampling.guided import guided_eps_fn  # noqa: E402
from retrack_jax.train.lora import LoraOptions, adapted, init, merge  # noqa: E402
from retrack_jax.weights.folder import TRANSFORMERS_WEIGHTS  # noqa: E402
from retrack_jax.weights.names import param_shapes, torch_shapes  # noqa: E402
from tests.parity.test_sd_parity import nchw, nhwc, relative, shaken  # noqa: E402
from tests.tiny_sd3 import add_t5, write_sd3  # noqa: E402

torch.set_num_threads(1)
SEEDS = range(8)
# Every value must occur in some config of SEEDS; the test below checks that.
OPTIONS = {
    "sample_size": (8, 12),
    "patch_size": (1, 2),
    "in_channels": (4, 16),
    "num_layers": (1, 2, 3),
    "attention_head_dim": (4, 8),
    "num_attention_heads": (1, 3),
    "joint_attention_dim": (10, 24),
    "pooled_projection_dim": (5, 9),
    "out_channels": (None, 4),
    "pos_embed_max_size": (12, 15),
    "dual_attention_layers": ((), (0,), (0, 1)),
    "qk_norm": (None, "rms_norm"),
}


def random_config(seed: int) -> dict:
    """Returns a tiny config, the same for a seed on every machine."""
    draw = random.Random(seed)
    config = {name: draw.choice(values) for name, values in OPTIONS.items()}
    return config | {"caption_projection_dim": config["num_attention_heads"] * config["attention_head_dim"]}


def test_the_configs_cover_every_option():
    configs = [random_config(seed) for seed in SEEDS]
    assert all({config[name] for config in configs} == set(values) for name, values in OPTIONS.items())
    assert any(config["dual_attention_layers"] and config["qk_norm"] is None for config in configs)


@pytest.mark.parametrize("seed", SEEDS)
def test_transformer(seed, tmp_path):
    """The same output to 1e-5, of a square and of an image that is not one, and back to PyTorch bit for bit."""
    torch.manual_seed(seed)
    theirs = shaken(diffusers.SD3Transformer2DModel(**random_config(seed)))
    with torch.no_grad():  # a checkpoint's own positions count, whatever the formula says
        theirs.pos_embed.pos_embed += 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    module, params = import_diffusers(tmp_path / "theirs")
    numbers = np.random.default_rng(seed)
    prompt, pooled = (
        numbers.normal(size=size).astype(np.float32)
        for size in ((2, 5, module.joint_attention_dim), (2, module.pooled_projection_dim))
    )
    t = np.float32([3.0, 812.5])
    for height, width in ((8, 8), (4, 10)):
        x = numbers.normal(size=(2, height, width, module.in_channels)).astype(np.float32)
        with torch.no_grad():
            expected = nhwc(theirs(nchw(x), torch.tensor(prompt), torch.tensor(pooled), torch.tensor(t)).sample)
        condition = {"encoder_hidden_states": prompt, "text_embeds": pooled}
        assert relative(jax.jit(module.apply)({"params": params}, x, t, condition), expected) < 1e-5
    export_diffusers(tmp_path / "ours", module, params)
    read = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
SIZES = {
    "3-medium": (MEDIUM | {"pos_embed_max_size": 192}, 2_084_951_104),
    "3.5-medium": (
        MEDIUM | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}, 2_469_663_936
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(name):
    """Every tensor of diffusers' module, by name and shape; positions count, which are no parameter there."""
    config, count = SIZES[name]
    with torch.device("meta"):
        theirs = diffusers.SD3Transformer2DModel(**config)
    module = MMDiT.from_config(config)
    shapes = torch_shapes(param_shapes(module, *example_inputs(module)))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == parameters + config["pos_embed_max_size"] ** 2 * 1536


def test_positions_of_a_new_network():
    config = random_config(0)
    module = MMDiT.from_config(config)
    params = module.init(jax.random.key(0), *example_inputs(module))["params"]
    theirs = diffusers.SD3Transformer2DModel(**config).pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(params["pos_embed"]["pos_embed"], theirs, atol=1e-5)


def test_defaults_are_diffusers_own():
    signature = inspect.signature(diffusers.SD3Transformer2DModel.__init__).parameters.items()
    theirs = {name: parameter.default for name, parameter in signature if name in (*OPTIONS, "caption_projection_dim")}
    assert theirs == {name: getattr(MMDiT(), name) for name in theirs} and len(theirs) == 13


# ---- T5


@pytest.mark.parametrize("seed", range(6))
def test_t5(seed, tmp_path):
    """Of random shapes, and of prompts with more tokens than there are buckets of distances."""
    draw = random.Random(seed)
    buckets, heads = draw.choice([4, 8, 32]), draw.choice([1, 3])
    sizes = {"d_model": draw.choice([10, 24]), "d_kv": draw.choice([4, 7]), "d_ff": 20, "num_layers": draw.choice([1, 3])}
    sizes |= {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": draw.choice([buckets, 128])}
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=50, num_heads=heads, feed_forward_proj="gated-gelu", **sizes)
    theirs = shaken(transformers.T5EncoderModel(config))
    theirs.save_pretrained(tmp_path)
    module = T5Encoder.from_config(json.loads((tmp_path / "config.json").read_text()))
    ids = np.random.default_rng(seed).integers(0, 50, (2, 256)).astype(np.int32)
    params = load_params(module, tmp_path, ids, names=TRANSFORMERS_WEIGHTS, table=T5_TABLE)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long))[0].numpy()
    assert relative(jax.jit(module.apply)({"params": params}, ids), expected) < 1e-5
    assert relative(states_by_layers(module, params, ids), expected) < 1e-5


def test_the_published_size_of_t5():
    """T5 XXL's encoder, every tensor by name and shape: 4.76 billion parameters."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    module = T5Encoder.from_config(sizes)
    shapes = torch_shapes(param_shapes(module, np.zeros((1, 4), np.int32)), T5_TABLE)
    assert shapes == {
        name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items() if name != "encoder.embed_tokens.weight"
    }
    assert sum(math.prod(shape) for shape in shapes.values()) == 4_762_310_656


# ---- The whole pipeline

PROMPT = "A Red Circle, on a green wall!"


@pytest.fixture(scope="module", params=[False, True], ids=["without T5", "with T5"])
def both(request, tmp_path_factory):
    """The tiny pipeline here, and in diffusers after our export of it (float32)."""
    options = {"num_layers": 3, "qk_norm": "rms_norm", "dual_attention_layers": [0]}
    source = write_sd3(tmp_path_factory.mktemp("sd3") / "source", **options)
    ours = load_pipeline(add_t5(source) if request.param else source)
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    export_pipeline(folder, ours, ours.unet_params, note="Nothing was forgotten.")
    t5 = {} if request.param else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **t5)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs


def test_a_folder_that_diffusers_saved_is_read(both, tmp_path):
    ours, theirs = both
    theirs.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.unet_params, ours.unet_params)
    assert again.schedule.to_config() == ours.schedule.to_config() and again.vae.shift_factor == 0.0609
    assert len(again.text_encoders) == (2 if theirs.text_encoder_3 is None else 3)


def test_prompts(both):
    """The empty prompt too, which is encoded as any other."""
    ours, theirs = both
    for prompt in (PROMPT, "", "a blue square! " * 30):
        with torch.no_grad():
            expected, negative, pooled, negative_pooled = theirs.encode_prompt(prompt, None, None)
        found, empty = prompt_embeddings(ours, [prompt]), prompt_embeddings(ours, [""])
        assert expected.shape == (1, 77 + 256, 48) and bool(expected[:, 77:].any()) == (theirs.text_encoder_3 is not None)
        assert relative(found["encoder_hidden_states"], expected.numpy()) < 1e-5
        assert relative(found["text_embeds"], pooled.numpy()) < 1e-5
        assert relative(empty["encoder_hidden_states"], negative.numpy()) < 1e-5
        assert relative(empty["text_embeds"], negative_pooled.numpy()) < 1e-5


@pytest.mark.parametrize("negative", ["", "gray"])
def test_guided_sample_of_ten_steps(both, negative):
    """From the same latents: images within 1e-3 of diffusers' pipeline."""
    ours, theirs = both
    latents = np.random.default_rng(5).normal(size=(2, 8, 8, 16)).astype(np.float32)
    how = {"num_images_per_prompt": 2, "num_inference_steps": 10, "guidance_scale": 7.0, "output_type": "np"}
    made = theirs(PROMPT, latents=nchw(latents), negative_prompt=negative or None, height=32, width=32, **how)
    rule = make_sampler("flow_euler", ours.schedule, 10)
    prompt, away = (prompt_embeddings(ours, [text]) for text in (PROMPT, negative))
    guided = guided_eps_fn(make_eps_fn(ours.unet.apply, ours.schedule), ours.unet_params, prompt, away, 7.0)
    x_0 = jax.jit(lambda x: sample(guided, x, None, rule))(latents)
    images = np.clip(np.asarray(ours.vae.apply({"params": ours.vae_params}, x_0, method="decode")) / 2 + 0.5, 0, 1)
    assert images.std() > 0.01  # else any two gray pictures would agree
    assert np.abs(images - made.images).max() < 1e-3


def test_diffusers_loads_our_adapter(both, tmp_path):
    """`load_lora_weights` gives the network that the adapter is merged into here; by default all of attention is adapted."""
    ours, theirs = both
    lora = LoraOptions(rank=2)
    ends = {name.rpartition(".attn.")[2] for name in adapted(lora, ours.unet_params) if ".attn." in name}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, init(lora, ours.unet_params, jax.random.key(0)))
    export_lora(tmp_path / "adapter", adapter, rank=2, alpha=2.0, network="transformer", source=ours.path)
    x, t = np.random.default_rng(0).normal(size=(1, 8, 8, 16)).astype(np.float32), np.float32([500])
    condition = prompt_embeddings(ours, [PROMPT])
    apply = jax.jit(ours.unet.apply)
    found = apply({"params": merge(lora, ours.unet_params, adapter)}, x, t, condition)
    theirs.load_lora_weights(tmp_path / "adapter")
    try:
        states, pooled = (torch.tensor(np.asarray(condition[name])) for name in ("encoder_hidden_states", "text_embeds"))
        with torch.no_grad():
            expected = nhwc(theirs.transformer(nchw(x), states, pooled, torch.tensor(t)).sample)
    finally:
        theirs.unload_lora_weights()
    assert relative(found, expected) < 1e-5 < 1e-2 < relative(apply({"params": ours.unet_params}, x, t, condition), expected)
