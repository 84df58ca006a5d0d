"""Adapters against peft and diffusers: the same change of a network for many options, and our file loaded by a pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from retrack_jax.checkpoints import load_pipeline, prompt_embeddings  # noqa: E402
from retrack_jax.checkpoints.diffusers_export import export_lora  # noqa: E402
from retrack_jax.diffusion.conversions import make_eps_fn  # noqa: E402
from retrack_jax.sampling import make_sampler  # noqa: E402
from retrack_jax.sampling.guided import guided_eps_fn  # noqa: E402
from retrack_jax.train.lora import LoraOptions, init, merge  # noqa: E402
from retrack_jax.weights.names import from_torch  # noqa: E402
from tests.parity.test_sd_parity import nchw, nhwc, relative  # noqa: E402
from tests.tiny_sd import PIPELINE  # noqa: E402

PROMPT = "A Red Circle, on a green wall!"
T = jnp.array([3, 700], jnp.int32)
OPTIONS = {
    "the default": LoraOptions(),
    "alpha above the rank": LoraOptions(rank=3, alpha=8.0),
    "rank 1, a small alpha": LoraOptions(rank=1, alpha=0.25, layers=("to_v",)),
    "convolutions": LoraOptions(rank=2, alpha=4.0, layers=("conv1", "conv_in", "conv", "proj_in", "conv_shortcut")),
    "feed-forward, time, one layer alone": LoraOptions(
        rank=5, layers=("net.2", "proj", "time_emb_proj", "mid_block.attentions.0.proj_out")
    ),
}


@pytest.fixture(scope="module")
def ours():
    return load_pipeline(PIPELINE)


@pytest.fixture
def theirs():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        PIPELINE, torch_dtype=torch.float32, variant=None, safety_checker=None, feature_extractor=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def apply(ours):
    """The UNet on two latents under one prompt, compiled once: `(params, x) -> prediction`."""
    prompt = prompt_embeddings(ours, [PROMPT])
    return jax.jit(lambda params, x: ours.unet.apply({"params": params}, x, T, prompt))


def latents(shape=(2, 8, 8, 4)):
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def of_theirs(pipeline, prompt):
    with torch.no_grad():
        states = torch.tensor(np.repeat(np.asarray(prompt), 2, axis=0))
        return nhwc(pipeline.unet(nchw(latents()), torch.tensor(np.asarray(T)), states).sample)


def shaken(adapter, seed=0):
    """An adapter whose change is of the size of the weights."""
    numbers = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: numbers.normal(size=leaf.shape).astype(np.float32) / 4, adapter)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_network_with_pefts_adapter_predicts_the_same(name, ours, theirs, apply):
    lora = OPTIONS[name]
    alpha = lora.scale * lora.rank
    layers = list(lora.layers or ("to_q", "to_k", "to_v", "to_out.0"))
    config = peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=layers, init_lora_weights="gaussian")
    prompt = prompt_embeddings(ours, [PROMPT])
    before = of_theirs(theirs, prompt)
    theirs.unet.add_adapter(config)
    fresh = init(lora, ours.unet_params, jax.random.key(0))
    generator = torch.Generator().manual_seed(1)
    for key, value in theirs.unet.state_dict().items():
        if "lora_B" in key:
            value.copy_(torch.randn(value.shape, generator=generator) / 4)
    state = {key: value.numpy() for key, value in peft.get_peft_model_state_dict(theirs.unet).items()}
    adapter = from_torch(state, fresh)  # refuses layers that only one side changes, and other shapes
    expected = of_theirs(theirs, prompt)
    assert relative(expected, before) > 1e-2
    assert relative(apply(merge(lora, ours.unet_params, adapter), latents()), expected) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_the_exported_file_is_loaded_by_diffusers_as_the_same_network(name, ours, theirs, apply, tmp_path):
    lora = OPTIONS[name]
    adapter = shaken(init(lora, ours.unet_params, jax.random.key(0)))
    export_lora(tmp_path / "lora", adapter, rank=lora.rank, alpha=lora.scale * lora.rank, source=PIPELINE, note="Nothing.")
    theirs.load_lora_weights(tmp_path / "lora")
    expected = of_theirs(theirs, prompt_embeddings(ours, [PROMPT]))
    assert relative(apply(ours.unet_params, latents()), expected) > 1e-2
    assert relative(apply(merge(lora, ours.unet_params, adapter), latents()), expected) < 1e-5


def test_a_guided_sample_is_the_same_picture(ours, theirs, tmp_path):
    lora = OPTIONS["alpha above the rank"]
    adapter = shaken(init(lora, ours.unet_params, jax.random.key(0)))
    export_lora(tmp_path / "lora", adapter, rank=lora.rank, alpha=lora.scale * lora.rank, source=PIPELINE)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    how = {"num_images_per_prompt": 2, "num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "np"}
    plain = theirs(PROMPT, latents=nchw(latents()), **how).images
    theirs.load_lora_weights(tmp_path / "lora")
    expected = theirs(PROMPT, latents=nchw(latents()), **how).images

    sampler = make_sampler("ddim", ours.schedule, 10, spacing=theirs.scheduler.config.timestep_spacing)
    embeddings = prompt_embeddings(ours, ["", PROMPT])
    params = merge(lora, ours.unet_params, adapter)
    guided = guided_eps_fn(make_eps_fn(ours.unet.apply, ours.schedule), params, embeddings[1:], embeddings[:1], 7.5)

    def step(state, row):
        return sampler.step(state, guided(state[0], jnp.full((2,), row["t"])), None, row), None

    state, _ = jax.jit(lambda x: jax.lax.scan(step, sampler.init(x), sampler.rows))(latents())
    images = ours.vae.apply({"params": ours.vae_params}, state[0], method="decode")
    images = np.clip(np.asarray(images) / 2 + 0.5, 0, 1)
    assert np.abs(expected - plain).max() > 1e-2
    assert np.abs(images - expected).max() < 1e-3
