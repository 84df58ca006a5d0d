"""Membership scores on a model whose memory is known exactly, the AUC by counting pairs, the spread of retrained models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.metrics.membership import (
    auc,
    denoising_losses,
    loss_scores,
    membership_auc,
    prediction_interval,
    secmi_scores,
)

SCHEDULE = Schedule.from_config({})


def _memory_eps(stored, x_t, t):
    """The exact eps of a model of images near `stored` `[M, H, W, C]`: a mixture of Gaussians of std 0.3."""
    gamma = jnp.asarray(SCHEDULE.gamma)[t][:, None]
    sigma = jnp.asarray(SCHEDULE.sigma)[t][:, None]
    flat, known = x_t.reshape(len(x_t), -1), stored.reshape(len(stored), -1)
    variance = gamma**2 * 0.3**2 + sigma**2
    away = flat[:, None] - gamma[:, :, None] * known[None]
    weights = jax.nn.softmax(-0.5 * jnp.sum(away**2, axis=-1) / variance, axis=-1)
    return (jnp.einsum("bm,bmd->bd", weights, away) * sigma / variance).reshape(x_t.shape)


def _images(count, seed):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4, 4, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def sets():
    return _images(12, 0), _images(12, 1), _images(12, 2)


def test_losses_are_the_loss_written_out(sets, rng):
    members = sets[0][:2]
    losses = denoising_losses(_memory_eps, sets[2], SCHEDULE, members, rng, num_noises=8, batch_size=5)
    assert losses.shape == (2, 8)

    @jax.jit
    def draw(i, j):
        time_rng, noise_rng = jax.random.split(jax.random.fold_in(jax.random.fold_in(rng, i), j))
        return jax.random.uniform(time_rng), jax.random.normal(noise_rng, (4, 4, 1))

    eps_fn = jax.jit(_memory_eps)
    for i in range(2):
        for j in range(8):
            place, eps = (np.asarray(value) for value in draw(i, j))
            t = int((j + place) * 1000 / 8)
            assert j * 125 <= t < (j + 1) * 125
            x_t = SCHEDULE.gamma[t] * members[i] + SCHEDULE.sigma[t] * eps
            eps_pred = np.asarray(eps_fn(sets[2], x_t[None], np.array([t], np.int32))[0])
            assert losses[i, j] == pytest.approx(((eps_pred - eps) ** 2).sum(), rel=2e-3)


def test_draws_do_not_depend_on_the_batch_size(sets, rng):
    one, other = (denoising_losses(_memory_eps, sets[2], SCHEDULE, sets[0][:2], rng, num_noises=8, batch_size=n) for n in (5, 16))
    np.testing.assert_allclose(one, other, rtol=1e-4)
    one, other = (secmi_scores(_memory_eps, sets[2], SCHEDULE, sets[0], batch_size=n) for n in (5, 12))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_draws_follow_the_number_of_an_image(sets, rng):
    """A part of the images, in any order, has the losses that it has among all."""
    every = denoising_losses(_memory_eps, sets[2], SCHEDULE, sets[0], rng, num_noises=8, batch_size=16)
    numbers = np.array([3, 0, 2])
    some = denoising_losses(_memory_eps, sets[2], SCHEDULE, sets[0][numbers], rng, num_noises=8, numbers=numbers, batch_size=16)
    np.testing.assert_allclose(some, every[numbers], rtol=1e-4)


@pytest.mark.parametrize("score", ["loss", "secmi"])
def test_scores_tell_what_is_remembered_and_nothing_after_forgetting(sets, rng, score):
    members, held_out, other = sets

    def scores(stored, images):
        if score == "loss":
            return loss_scores(_memory_eps, stored, SCHEDULE, images, rng, num_noises=8, batch_size=96)
        return secmi_scores(_memory_eps, stored, SCHEDULE, images, t_sec=100, interval=20)

    remembers = np.concatenate([members, other])
    forgot = np.concatenate([other, other])
    before = membership_auc(scores(remembers, members), scores(remembers, held_out), seed=0, num_bootstrap=100)
    after = membership_auc(scores(forgot, members), scores(forgot, held_out), seed=0, num_bootstrap=100)
    assert before.value > 0.95
    assert after.low < 0.5 < after.high


def test_auc_counts_pairs():
    members, held_out = [0.9, 0.5, 0.5], [0.5, 0.1]
    wins = sum((m > h) + 0.5 * (m == h) for m in members for h in held_out) / 6
    assert auc(members, held_out) == pytest.approx(wins)
    interval = membership_auc(np.arange(50.0), np.arange(50.0) - 10, seed=0)
    assert interval.low < interval.value < interval.high
    assert membership_auc(np.arange(50.0), np.arange(50.0) - 10, seed=0) == interval


def test_prediction_interval_is_students():
    low, high = prediction_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2.0)
    assert (high - low) / 2 == pytest.approx(4.302653 * np.sqrt(4 / 3), rel=1e-5)  # t quantile of 2 degrees of freedom, std 1
    with pytest.raises(UserError, match="at least 2"):
        prediction_interval([1.0])


def test_other_parameters_use_what_is_compiled(sets, rng):
    traces = []

    def eps_fn(*args):
        traces.append(args)
        return _memory_eps(*args)

    counts = []
    for stored in sets[:2]:
        denoising_losses(eps_fn, stored, SCHEDULE, sets[2], rng, num_noises=8)
        secmi_scores(eps_fn, stored, SCHEDULE, sets[2])
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_refuses(sets, rng):
    with pytest.raises(UserError, match="not finite; the model has diverged"):
        denoising_losses(_memory_eps, sets[0] * np.nan, SCHEDULE, sets[1][:2], rng, num_noises=8, batch_size=5)
    with pytest.raises(UserError, match="multiple of interval"):
        secmi_scores(_memory_eps, sets[0], SCHEDULE, sets[1], t_sec=105, interval=20)
    with pytest.raises(UserError, match="t_sec"):
        secmi_scores(_memory_eps, sets[0], SCHEDULE, sets[1], t_sec=990, interval=10)
    with pytest.raises(UserError, match="both sides"):
        auc([], [1.0])
