"""Stable Diffusion XL's parts against diffusers and transformers, on random weights of random shapes."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from retrack_jax.checkpoints import export_pipeline, load_pipeline, prompt_embeddings  # noqa: E402
from retrack_jax.checkpoints.diffusers_export import export_lora  # noqa: E402
from retrack_jax.checkpoints.stable_diffusion import empty_prompt  # noqa: E402
from retrack_jax.checkpoints.text_encoders import TEXT_TABLE  # noqa: E402
from retrack_jax.diffusion.conversions import make_eps_fn  # noqa: E402
from retrack_jax.diffusion.schedule import Schedule  # noqa: E402
from retrack_jax.models.clip_text import ClipTextEncoder  # noqa: E402
from retrack_jax.models.unet2d_condition import UNet2DCondition  # noqa: E402
from retrack_jax.problem.picture_sizes import time_ids_of_whole, with_time_ids  # noqa: E402
from retrack_jax.sampling import make_sampler, sample  # noqa: E402
from retrack_jax.sampling.guided import guided_eps_fn  # noqa: E402
from retrack_jax.train.lora import LoraOptions, init, merge  # noqa: E402
from retrack_jax.weights.names import from_torch  # noqa: E402
from tests.parity.test_sd_parity import nchw, nhwc, plain, relative, shaken, weights  # noqa: E402
from tests.tiny_xl import write_xl  # noqa: E402

torch.set_num_threads(1)
PLAIN_DOWN, PLAIN_UP = "DownBlock2D", "UpBlock2D"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def unet_options(seed: int) -> tuple[dict, int]:
    """Returns the options of a UNet2DConditionModel of a random shape in XL's manner, and the features of its pooled prompt."""
    numbers = np.random.default_rng(seed)
    blocks = 2 + seed % 2
    attends = [bool(numbers.integers(2)) for _ in range(blocks - 1)] + [True]
    layers = [int(number) for number in numbers.integers(1, 4, blocks)]
    pooled, dim = int(numbers.integers(3, 9)), 2 * int(numbers.integers(2, 5))
    options = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32)[:blocks],
        "norm_num_groups": 8,
        "layers_per_block": int(numbers.integers(1, 3)),
        "down_block_types": [CROSS_DOWN if one else PLAIN_DOWN for one in attends],
        "up_block_types": [CROSS_UP if one else PLAIN_UP for one in reversed(attends)],
        "attention_head_dim": [int(numbers.choice([1, 2, 4])) for _ in range(blocks)],
        "cross_attention_dim": int(numbers.integers(5, 12)),
        "transformer_layers_per_block": layers,
        "use_linear_projection": seed != 3,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": dim,
        "projection_class_embeddings_input_dim": pooled + 6 * dim,
    }
    if seed % 3 == 1:
        options["reverse_transformer_layers_per_block"] = [int(number) for number in numbers.integers(1, 4, blocks)]
    if seed == 5:
        options |= {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 24, "act_fn": "gelu"}
    return options, pooled


@pytest.mark.parametrize("seed", range(7))
def test_unet(seed):
    torch.manual_seed(seed)
    options, pooled = unet_options(seed)
    theirs = shaken(diffusers.UNet2DConditionModel(**options))
    ours = UNet2DCondition.from_config(plain(theirs.config))
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=(2, 8, 8, 4)).astype(np.float32)
    t = np.array([3, 999], np.int32)
    condition = {
        "encoder_hidden_states": numbers.normal(size=(2, 5, options["cross_attention_dim"])).astype(np.float32),
        "text_embeds": numbers.normal(size=(2, pooled)).astype(np.float32),
        "time_ids": np.array([[1024, 768, 0, 128, 1024, 1024], [512, 512, 0, 0, 1024, 1024]], np.float32),
    }
    target = jax.eval_shape(ours.init, jax.random.key(0), x, t, condition)["params"]
    params = from_torch(weights(theirs), target)

    def of(network):
        added = {name: torch.tensor(condition[name]) for name in ("text_embeds", "time_ids")}
        prompt = torch.tensor(condition["encoder_hidden_states"])
        with torch.no_grad():
            return nhwc(network(nchw(x), torch.tensor(t), prompt, added_cond_kwargs=added).sample)

    expected = of(theirs)
    assert relative(jax.jit(ours.apply)({"params": params}, x, t, condition), expected) < 1e-5
    # diffusers builds the same network from the config that we write
    again = diffusers.UNet2DConditionModel.from_config(ours.to_config())
    again.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(of(again.eval()), expected)


@pytest.mark.parametrize("seed", range(6))
def test_text_encoders(seed):
    """The states before the last layer and the pooled state, whatever token ends a prompt and wherever it is."""
    torch.manual_seed(seed)
    numbers = np.random.default_rng(seed)
    heads = int(numbers.choice([1, 2, 4]))
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=heads * int(numbers.integers(4, 9)),
        intermediate_size=int(numbers.integers(20, 50)),
        num_hidden_layers=1 + seed % 4,
        num_attention_heads=heads,
        hidden_act=("quick_gelu", "gelu")[seed % 2],
        projection_dim=int(numbers.integers(5, 20)),
        bos_token_id=1,
        eos_token_id=2 if seed % 3 else 50,
        pad_token_id=0,
    )
    theirs = shaken(transformers.CLIPTextModelWithProjection(config))
    ours = ClipTextEncoder.from_config(config.to_dict(), projection_dim=config.projection_dim)
    ids = numbers.integers(3, 50, (4, 77)).astype(np.int32)
    for row, end in enumerate(numbers.integers(1, 77, 4)):
        ids[row, end:] = 0
        ids[row, end] = 50 if config.eos_token_id == 50 else 98
    target = jax.eval_shape(ours.init, jax.random.key(0), ids)["params"]
    params = from_torch(weights(theirs), target, table=TEXT_TABLE)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    states, pooled = ours.apply({"params": params}, ids, method="penultimate_and_pooled")
    assert relative(states, expected.hidden_states[-2].numpy()) < 1e-5
    assert relative(pooled, expected.text_embeds.numpy()) < 1e-5


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The tiny XL here, and in diffusers after our export of it (float32)."""
    ours = load_pipeline(write_xl(tmp_path_factory.mktemp("xl") / "source"))
    folder = tmp_path_factory.mktemp("export") / "pipeline"
    export_pipeline(folder, ours, ours.unet_params, note="Nothing was forgotten.")
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs, dict(theirs.scheduler.config)


PROMPT = "A Red Circle, on a green wall!"


def test_prompts(both):
    ours, theirs, _ = both
    for prompt in (PROMPT, "", "a blue square! " * 30):
        with torch.no_grad():
            expected, _, pooled, _ = theirs.encode_prompt(prompt, do_classifier_free_guidance=False)
        found = prompt_embeddings(ours, [prompt])
        assert relative(found["encoder_hidden_states"], expected.numpy()) < 1e-5
        assert relative(found["text_embeds"], pooled.numpy()) < 1e-5
    with torch.no_grad():
        _, negative, _, negative_pooled = theirs.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    for found, expected in zip(jax.tree.leaves(empty_prompt(ours)), (negative, negative_pooled), strict=True):
        np.testing.assert_array_equal(found, expected.numpy())


SCHEDULERS = {
    "euler": [("EulerDiscreteScheduler", {}), ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})],
    "dpm_solver": [("DPMSolverMultistepScheduler", {})],
}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "number"), [("euler", 0), ("euler", 1), ("dpm_solver", 0)])
@pytest.mark.parametrize("negative", ["", "gray"])
def test_guided_sample_of_ten_steps(both, sampler, number, prediction_type, negative):
    """From the same latents: images within 1e-3 of diffusers' pipeline, which makes the empty negative prompt zeros."""
    ours, theirs, config = both
    name, options = SCHEDULERS[sampler][number]
    theirs.scheduler = getattr(diffusers, name).from_config(config, prediction_type=prediction_type, **options)
    schedule = Schedule.from_config({**config, "prediction_type": prediction_type, **options})
    rule = make_sampler(sampler, schedule, 10, spacing=theirs.scheduler.config.timestep_spacing)
    latents = np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)
    how = {"num_images_per_prompt": 2, "num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "np"}
    made = theirs(PROMPT, latents=nchw(latents), negative_prompt=negative or None, height=32, width=32, **how)

    sizes = time_ids_of_whole(32)
    prompt = with_time_ids(prompt_embeddings(ours, [PROMPT]), sizes)
    away = with_time_ids(prompt_embeddings(ours, [negative]) if negative else empty_prompt(ours), sizes)
    guided = guided_eps_fn(make_eps_fn(ours.unet.apply, schedule), ours.unet_params, prompt, away, 7.5)
    x_0 = jax.jit(lambda x: sample(guided, x, None, rule))(latents)
    images = np.clip(np.asarray(ours.vae.apply({"params": ours.vae_params}, x_0, method="decode")) / 2 + 0.5, 0, 1)
    assert images.std() > 0.01  # else any two gray pictures would agree
    assert np.abs(images - made.images).max() < 1e-3


@pytest.mark.parametrize(("sampler", "name"), [("euler", "EDMEulerScheduler"), ("dpm_solver", "EDMDPMSolverMultistepScheduler")])
def test_guided_sample_of_edm_from_normalized_latents(both, sampler, name):
    """As Playground 2.5: the pipeline scales the network's input, and its VAE has a mean and a deviation of latents."""
    ours, theirs, _ = both
    own, config = theirs.scheduler, dict(theirs.vae.config)
    normalized = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2], "scaling_factor": 0.5}
    theirs.scheduler = getattr(diffusers, name)()
    theirs.vae.register_to_config(**normalized)
    try:
        latents = np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)
        how = {"num_images_per_prompt": 2, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "np"}
        made = theirs(PROMPT, latents=nchw(latents), height=32, width=32, **how).images
    finally:
        theirs.scheduler = own
        theirs.vae.register_to_config(**{field: config[field] for field in normalized})
    schedule, sizes = Schedule.create(class_name=name), time_ids_of_whole(32)
    prompt, away = (with_time_ids(each, sizes) for each in (prompt_embeddings(ours, [PROMPT]), empty_prompt(ours)))
    guided = guided_eps_fn(make_eps_fn(ours.unet.apply, schedule), ours.unet_params, prompt, away, 3.0)
    x_0 = jax.jit(lambda x: sample(guided, x, None, make_sampler(sampler, schedule, 10)))(latents)
    vae = type(ours.vae).from_config(ours.vae.to_config() | normalized)
    images = np.clip(np.asarray(vae.apply({"params": ours.vae_params}, x_0, method="decode")) / 2 + 0.5, 0, 1)
    assert images.std() > 0.01
    assert np.abs(images - made).max() < 1e-3


def test_diffusers_loads_our_adapter(both, tmp_path):
    """`load_lora_weights` gives the network that the adapter is merged into here."""
    ours, theirs, _ = both
    lora = LoraOptions(rank=2)
    adapter = init(lora, ours.unet_params, jax.random.key(0))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    export_lora(tmp_path / "adapter", adapter, rank=2, alpha=2.0, source=ours.path)
    numbers = np.random.default_rng(0)
    x, t = numbers.normal(size=(1, 8, 8, 4)).astype(np.float32), np.array([500], np.int32)
    condition = with_time_ids(prompt_embeddings(ours, [PROMPT]), time_ids_of_whole(32))
    found = ours.unet.apply({"params": merge(lora, ours.unet_params, adapter)}, x, t, condition)
    theirs.load_lora_weights(tmp_path / "adapter")
    try:
        added = {name: torch.tensor(np.asarray(condition[name])) for name in ("text_embeds", "time_ids")}
        prompt = torch.tensor(np.asarray(condition["encoder_hidden_states"]))
        with torch.no_grad():
            expected = nhwc(theirs.unet(nchw(x), torch.tensor(t), prompt, added_cond_kwargs=added).sample)
    finally:
        theirs.unload_lora_weights()
    plain = ours.unet.apply({"params": ours.unet_params}, x, t, condition)
    assert relative(found, expected) < 1e-5 < 1e-2 < relative(plain, expected)
