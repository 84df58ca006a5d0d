"""Stable Diffusion's parts against diffusers and transformers, on random weights, and the whole guided pipeline from the
same latents."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

from retrack_jax.checkpoints import (  # noqa: E402
    export_diffusers,
    export_pipeline,
    export_single_file,
    load_pipeline,
    prompt_embeddings,
)
from retrack_jax.diffusion.conversions import make_eps_fn  # noqa: E402
from retrack_jax.diffusion.schedule import Schedule  # noqa: E402
from retrack_jax.models.clip_text import ClipTextEncoder  # noqa: E402
from retrack_jax.models.tokenizer import load_tokenizer  # noqa: E402
from retrack_jax.models.unet2d_condition import UNet2DCondition  # noqa: E402
from retrack_jax.models.vae import AutoencoderKL  # noqa: E402
from retrack_jax.sampling import make_sampler  # noqa: E402
from retrack_jax.sampling.guided import guided_eps_fn  # noqa: E402
from retrack_jax.sampling.loop import num_calls  # noqa: E402
from retrack_jax.weights.names import from_torch  # noqa: E402
from tests.prompts200 import PROMPTS  # noqa: E402
from tests.tiny_sd import PIPELINE  # noqa: E402

torch.set_num_threads(1)


def shaken(module):
    """Random weights everywhere, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def plain(config) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def weights(module) -> dict:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def nchw(x) -> "torch.Tensor":
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


def relative(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


CROSS_DOWN, CROSS_UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
UNETS = {
    "sd1": {"attention_head_dim": 2, "cross_attention_dim": 12},
    "sd2": {
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 20,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "a middle block of its own depth": {
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "transformer_layers_per_block": [1, 2],
        "time_embedding_dim": 24,
    },
    "no middle block": {"attention_head_dim": 4, "cross_attention_dim": 12, "mid_block_type": None},
    "every other option": {
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
        "layers_per_block": 2,
        "transformer_layers_per_block": 2,
        "resnet_time_scale_shift": "scale_shift",
        "norm_eps": 1e-4,
        "act_fn": "gelu",
        "mid_block_scale_factor": 1.5,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "center_input_sample": True,
    },
}


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    torch.manual_seed(0)
    options = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, **UNETS[name]}
    theirs = shaken(diffusers.UNet2DConditionModel(down_block_types=CROSS_DOWN, up_block_types=CROSS_UP, **options))
    ours = UNet2DCondition.from_config(plain(theirs.config))
    numbers = np.random.default_rng(0)
    x = numbers.normal(size=(2, 8, 8, 4)).astype(np.float32)
    prompt = numbers.normal(size=(2, 7, options["cross_attention_dim"])).astype(np.float32)
    t = np.array([3, 999], np.int32)
    target = jax.eval_shape(ours.init, jax.random.key(0), x, t, prompt)["params"]
    params = from_torch(weights(theirs), target)
    with torch.no_grad():
        expected = nhwc(theirs(nchw(x), torch.tensor(t), torch.tensor(prompt)).sample)
    assert relative(jax.jit(ours.apply)({"params": params}, x, t, prompt), expected) < 1e-5
    # diffusers builds the same network from the config that we write
    again = diffusers.UNet2DConditionModel.from_config(ours.to_config())
    again.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        np.testing.assert_array_equal(nhwc(again.eval()(nchw(x), torch.tensor(t), torch.tensor(prompt)).sample), expected)


def vae_options(*channels, **options):
    levels = len(channels)
    types = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return {"block_out_channels": channels, **types, **options}


VAES = {
    "sd": vae_options(8, 16, norm_num_groups=4, layers_per_block=2),
    "three levels": vae_options(8, 8, 16, norm_num_groups=8, latent_channels=3, scaling_factor=0.5),
    "bare": vae_options(
        8, 16, norm_num_groups=4, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
    ),
    "sd3": vae_options(
        8, 16, norm_num_groups=4, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VAES)
def test_vae(name):
    torch.manual_seed(0)
    theirs = shaken(diffusers.AutoencoderKL(**VAES[name]))
    ours = AutoencoderKL.from_config(plain(theirs.config))
    x = np.random.default_rng(0).uniform(-1, 1, size=(2, 16, 24, 3)).astype(np.float32)
    params = from_torch(weights(theirs), jax.eval_shape(ours.init, jax.random.key(0), x)["params"])
    with torch.no_grad():
        posterior, factor = theirs.encode(nchw(x)).latent_dist, theirs.config.scaling_factor
        shift = theirs.config.shift_factor or 0
        mean, std = nhwc((posterior.mean - shift) * factor), nhwc(posterior.std * factor)
        image = nhwc(theirs.decode(nchw(mean) / factor + shift).sample)
    found_mean, found_std = ours.apply({"params": params}, x, method="encode")
    assert relative(found_mean, mean) < 1e-5 and relative(found_std, std) < 1e-5
    assert relative(ours.apply({"params": params}, jnp.asarray(mean), method="decode"), image) < 1e-5


@pytest.mark.parametrize("options", [{"hidden_act": "quick_gelu"}, {"hidden_act": "gelu", "num_hidden_layers": 3}])
def test_text_encoder(options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}
    theirs = shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**sizes, **ends, **options})))
    ours = ClipTextEncoder.from_config(theirs.config.to_dict())
    ids = np.random.default_rng(0).integers(0, 97, (3, 77)).astype(np.int32)
    params = from_torch(weights(theirs), jax.eval_shape(ours.init, jax.random.key(0), ids)["params"])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long)).last_hidden_state.numpy()
    assert relative(ours.apply({"params": params}, ids), expected) < 1e-5


@pytest.mark.parametrize(
    "kind", ["sd1", "sd2 pads with !", "saved by transformers 5", "added_tokens.json", "added_tokens_decoder"]
)
def test_tokenizer_ids_of_200_prompts(tmp_path, kind):
    folder = tmp_path / "tokenizer"
    shutil.copytree(PIPELINE / "tokenizer", folder)
    if kind.startswith("sd2"):
        special = folder / "special_tokens_map.json"
        special.write_text(special.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    size = len(json.loads((folder / "vocab.json").read_text()))
    if kind == "added_tokens.json":
        (folder / kind).write_text(json.dumps({"<cat-toy>": size, "sks": size + 1}))
    if kind == "added_tokens_decoder":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": False}
        added = {f"{size}": {"content": "<cat-toy>", "normalized": True, **flags}}
        added[f"{size + 1}"] = {"content": "sks", "normalized": False, **flags}
        added["0"] = {"content": "!", "normalized": False, **flags}  # in the vocabulary, and cut out of the text first
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, kind: added}))
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    if kind.startswith("added"):
        assert theirs.convert_tokens_to_ids("sks") == size + 1
    if kind.startswith("saved"):
        folder = tmp_path / "saved"
        theirs.save_pretrained(folder)
        assert not (folder / "merges.txt").exists()
    prompts = [*PROMPTS, "a <cat-toy> here", "A <CAT-TOY>, SKS", "<cat-toy>s and<cat-toy>,sks dog"]
    expected = theirs(prompts, max_length=77, padding="max_length", truncation=True).input_ids
    np.testing.assert_array_equal(load_tokenizer(folder)(prompts), np.array(expected))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The tiny pipeline here, and in diffusers after our export of it (float32)."""
    ours = load_pipeline(PIPELINE)
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    export_pipeline(folder, ours, ours.unet_params, note="Nothing was forgotten.")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs, dict(theirs.scheduler.config)


def test_exported_pipeline_is_the_same_model(both):
    ours, theirs, _ = both
    for name, value in theirs.unet.state_dict().items():
        assert value.dtype == torch.float32, name
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    prompt = prompt_embeddings(ours, ["a red circle"])
    with torch.no_grad():
        ids = torch.tensor(ours.tokenizer(["a red circle"]), dtype=torch.long)
        np.testing.assert_allclose(prompt, theirs.text_encoder(ids).last_hidden_state.numpy(), atol=1e-5)
        expected = nhwc(theirs.unet(nchw(x), torch.tensor([500]), torch.tensor(np.array(prompt))).sample)
    t = jnp.array([500], jnp.int32)
    assert relative(ours.unet.apply({"params": ours.unet_params}, x, t, prompt), expected) < 1e-5


def test_exported_unet_alone_is_read_by_diffusers(both, tmp_path):
    """What a run leaves by default: the UNet without its pipeline, in which a user puts it."""
    ours, theirs, _ = both
    folder = tmp_path / "unet"
    export_diffusers(folder, ours.unet, ours.unet_params, schedule=ours.schedule, source=PIPELINE / "unet", note="Nothing.")
    alone = diffusers.UNet2DConditionModel.from_pretrained(folder)
    expected = theirs.unet.state_dict()
    found = alone.state_dict()
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        PIPELINE, unet=alone, torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    assert pipeline.unet is alone


def test_export_from_half_precision_files_alone_needs_no_variant(tmp_path):
    """A source downloaded with `variant="fp16"`: diffusers reads what we make of it without that word."""
    source = tmp_path / "source"
    shutil.copytree(PIPELINE, source)
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (source / part / f"{stem}.safetensors").rename(source / part / f"{stem}.fp16.safetensors")
    ours = load_pipeline(source)
    export_pipeline(tmp_path / "out", ours, ours.unet_params)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    for name, value in from_torch(weights(theirs.vae), ours.vae_params)["decoder"]["conv_in"].items():
        np.testing.assert_array_equal(value, ours.vae_params["decoder"]["conv_in"][name])


SCHEDULERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpm_solver": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("sampler_name", SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guided_sample_of_ten_steps(both, monkeypatch, sampler_name, prediction_type):
    """From the same latents, and for the stochastic sampler with the same noise: images within 1e-3 of diffusers' pipeline."""
    ours, theirs, config = both
    theirs.scheduler = SCHEDULERS[sampler_name].from_config(config, prediction_type=prediction_type)
    schedule = Schedule.from_config({**ours.schedule.to_config(), "prediction_type": prediction_type})
    spacing = theirs.scheduler.config.timestep_spacing
    sampler = make_sampler(sampler_name, schedule, 10, spacing=spacing)

    numbers = np.random.default_rng(5)
    latents = numbers.normal(size=(2, 8, 8, 4)).astype(np.float32)
    noise = numbers.normal(size=(num_calls(sampler), 2, 8, 8, 4)).astype(np.float32)
    drawn = iter(noise)
    module = __import__("diffusers.schedulers.scheduling_ddpm", fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: nchw(next(drawn)))
    prompt = "A Red Circle, on a green wall!"
    made = theirs(
        prompt, num_images_per_prompt=2, latents=nchw(latents), num_inference_steps=10, guidance_scale=7.5, output_type="np"
    )

    embeddings = prompt_embeddings(ours, ["", prompt])
    eps_fn = make_eps_fn(ours.unet.apply, schedule)
    guided = guided_eps_fn(eps_fn, ours.unet_params, embeddings[1:], embeddings[:1], 7.5)

    def step(state, row_and_noise):
        row, eps_noise = row_and_noise
        eps = guided(state[0], jnp.full((2,), row["t"]))
        return sampler.step(state, eps, eps_noise, row), None

    state, _ = jax.jit(lambda x: jax.lax.scan(step, sampler.init(x), (sampler.rows, noise)))(latents)
    images = ours.vae.apply({"params": ours.vae_params}, state[0], method="decode")
    images = np.clip(np.asarray(images) / 2 + 0.5, 0, 1)
    assert images.std() > 0.01  # else any two grey pictures would agree
    assert np.abs(images - made.images).max() < 1e-3


def test_diffusers_reads_our_single_file(tmp_path):
    """`from_single_file`, with the configs of a folder and no network, gives the pipeline of that folder."""
    pipeline = load_pipeline(PIPELINE)
    changed = jax.tree.map(lambda leaf: leaf + 1, pipeline.unet_params)
    export_single_file(tmp_path / "one", pipeline, changed)
    export_pipeline(tmp_path / "folder", pipeline, changed)
    own = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "local_files_only": True}
    one = diffusers.StableDiffusionPipeline.from_single_file(str(tmp_path / "one/model.safetensors"), config=str(PIPELINE), **own)
    folder = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = (weights(getattr(each, part)) for each in (folder, one))
        assert theirs.keys() == ours.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    # And as training scripts save it.
    state = safetensors.load_file(tmp_path / "one/model.safetensors")
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "one.ckpt")
    back = load_pipeline(tmp_path / "one.ckpt", configs=str(PIPELINE))
    jax.tree.map(np.testing.assert_array_equal, back.unet_params, changed)
