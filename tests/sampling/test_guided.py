"""Guided sampling: diffusers' pipeline from the same latents and noise, recorded; guidance itself; images do not depend on
the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checkpoints.stable_diffusion import prompt_embeddings
from retrack_jax.checks import UserError
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.sampling import make_sampler
from retrack_jax.sampling.generate import generate, pmap_sample_fn
from retrack_jax.sampling.guided import GuidedParams, guided_eps_fn, make_guided_sample_fn


def test_ten_steps_are_diffusers_pipeline(pipeline, recorded_sd):
    embeddings = prompt_embeddings(pipeline, ["", str(recorded_sd["prompt"])])
    eps_fn = make_eps_fn(pipeline.unet.apply, pipeline.schedule)
    guided = guided_eps_fn(eps_fn, pipeline.unet_params, embeddings[1:], embeddings[:1], 7.5)
    sampler = make_sampler("ddpm", pipeline.schedule, len(recorded_sd["noise"]))

    def step(state, row_and_noise):
        row, noise = row_and_noise
        return sampler.step(state, guided(state[0], jnp.full((2,), row["t"])), noise, row), None

    def run(x):
        (x_0,), _ = jax.lax.scan(step, sampler.init(x), (sampler.rows, recorded_sd["noise"]))
        return pipeline.vae.apply({"params": pipeline.vae_params}, x_0, method="decode")

    images = np.clip(np.asarray(jax.jit(run)(recorded_sd["latents"])) / 2 + 0.5, 0, 1)
    assert recorded_sd["guided"].std() > 0.01
    assert np.abs(images - recorded_sd["guided"]).max() < 1e-3


def toy_eps(params, x, t, prompt):
    return params * x + prompt.mean(axis=(1, 2))[:, None, None, None] + t.astype(jnp.float32)[:, None, None, None] / 1000.0


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_from_the_negative_prompt(guidance):
    x, t = jnp.ones((2, 2, 2, 1)), jnp.array([5, 9])
    prompt, negative = jnp.full((1, 3, 2), 2.0), jnp.full((1, 3, 2), 0.5)
    found = guided_eps_fn(toy_eps, jnp.float32(0.1), prompt, negative, guidance)(x, t)
    of = {
        name: toy_eps(jnp.float32(0.1), x, t, jnp.broadcast_to(one, (2, 3, 2)))
        for name, one in (("prompt", prompt), ("negative", negative))
    }
    # As diffusers: a scale of at most 1 asks the prompt alone.
    weight = max(guidance, 1.0)
    np.testing.assert_allclose(found, of["negative"] + weight * (of["prompt"] - of["negative"]), rtol=1e-6)


def test_a_guidance_scale_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="guidance scale"):
        guided_eps_fn(toy_eps, 0.1, jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1)), float("nan"))


def test_an_image_depends_on_its_seed_alone(pipeline):
    """Not on the batch size."""
    sampler = make_sampler("ddpm", pipeline.schedule, 3)

    def decode(params, x):
        return jnp.repeat(x[..., :3] * params, 2, axis=1)

    sample_fn = make_guided_sample_fn(toy_eps, decode, sampler, (2, 2, 4), guidance=2.0)
    params = GuidedParams(jnp.float32(0.3), jnp.float32(0.1), jnp.ones((1, 3, 2)), jnp.zeros((1, 3, 2)))
    p_sample = pmap_sample_fn(sample_fn)
    made = [generate(p_sample, params, rng=jax.random.key(0), num_images=8, batch_size=size) for size in (4, 8)]
    assert made[0].shape == (8, 4, 2, 3)
    np.testing.assert_allclose(*made, atol=1e-6)
    assert np.abs(np.diff(made[0], axis=0)).max(axis=(1, 2, 3)).min() > 1e-3


def test_images_under_labels_take_them_in_turn():
    """The same for any batch: image i has condition i mod P; and without a VAE what is denoised are the images."""
    sampler = make_sampler("ddpm", Schedule.create(), 3)

    def by_label(params, x, t, label):
        return params * x + 0.1 * label.astype(jnp.float32).reshape(-1, 1, 1, 1)

    sample_fn = make_guided_sample_fn(by_label, None, sampler, (2, 2, 1), guidance=0.0)
    p_sample = pmap_sample_fn(sample_fn, of_images=GuidedParams.of_images)
    how = {"rng": jax.random.key(0), "num_images": 8}

    def made(labels, batch_size=8):
        params = GuidedParams(jnp.float32(0.3), None, np.array(labels, np.int32), None)
        return generate(p_sample, params, batch_size=batch_size, **how)

    mixed = made([0, 5, 9])
    np.testing.assert_allclose(mixed, made([0, 5, 9], batch_size=4), atol=1e-6)
    for place, label in enumerate([0, 5, 9]):
        np.testing.assert_allclose(mixed[place::3], made([label])[place::3], atol=1e-6)
    assert np.abs(mixed - made([0])).max() > 0.01
