"""Schedules and samplers of flows against the real diffusers: the table, and every step of Euler's and of Heun's method."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from retrack_jax.diffusion.schedule import Schedule  # noqa: E402
from retrack_jax.sampling import initial_noise, make_sampler, sample  # noqa: E402

NAMES = {"flow_euler": "FlowMatchEulerDiscreteScheduler", "flow_heun": "FlowMatchHeunDiscreteScheduler"}
SETTINGS = [{}, {"shift": 3.0}, {"shift": 0.6, "num_train_timesteps": 400}]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_table_and_the_noised_images(name, settings):
    """In the order of ours, which rises. What the network is called with is diffusers' `timesteps`."""
    theirs = getattr(diffusers, NAMES[name])(**settings)
    ours = Schedule.from_config(json.loads(theirs.to_json_string()))
    np.testing.assert_allclose(ours.sigma, theirs.sigmas.numpy()[::-1], rtol=1e-6)
    rows = jnp.array([0, 17, ours.num_train_timesteps - 1])
    np.testing.assert_allclose(ours.network_time(rows), theirs.timesteps.numpy()[::-1][np.asarray(rows)], rtol=1e-6)
    x_0, eps = np.random.default_rng(0).normal(size=(2, 1, 5)).astype(np.float32)
    row = 17
    time = theirs.timesteps[ours.num_train_timesteps - 1 - row]
    noised = theirs.scale_noise(torch.from_numpy(x_0), time[None] if name == "flow_euler" else time, torch.from_numpy(eps))
    np.testing.assert_allclose(ours.gamma[row] * x_0 + ours.sigma[row] * eps, noised, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 28])
@pytest.mark.parametrize("name", NAMES)
def test_a_loop(name, num_steps, settings, monkeypatch):
    """diffusers' Heun divides x - (x - sigma u) by sigma, which in float32 loses u at small sigma, so it runs in float64 here."""
    theirs = getattr(diffusers, NAMES[name])(**settings)
    theirs.set_timesteps(num_steps)
    schedule = Schedule.from_config(json.loads(theirs.to_json_string()))
    sampler = make_sampler(name, schedule, num_steps)
    np.testing.assert_allclose(sampler.rows["t"], theirs.timesteps.numpy(), rtol=1e-6)
    total, rngs = schedule.num_train_timesteps, jax.random.split(jax.random.key(1), 3)
    start = initial_noise(rngs, (4, 2))
    x = torch.from_numpy(np.array(start))
    x = x.double() if name == "flow_heun" else x
    monkeypatch.setattr(torch, "float32", x.dtype)  # which `step` casts to
    for time in theirs.timesteps:
        x = theirs.step(torch.tanh(x + 2 * time / total), time, x).prev_sample
    ours = sample(lambda x, time: jnp.tanh(x + 2 * time[:, None, None] / total), start, rngs, sampler)
    assert np.linalg.norm(ours - x.numpy()) <= 1e-5 * np.linalg.norm(x.numpy())
