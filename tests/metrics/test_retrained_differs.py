"""Each metric tells a model retrained without the image from one that remembers it.

Both models are exact: the denoiser of a mixture of narrow Gaussians around stored images, so nothing is trained and the truth is
known. FID and its family are quality metrics here: the project takes them on samples without the forgotten image, where they must
not differ.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.metrics.frequency import target_distances
from retrack_jax.metrics.likelihood import nll_bits_per_dim
from retrack_jax.metrics.membership import denoising_losses, loss_scores, membership_auc, secmi_scores
from retrack_jax.metrics.relearning import relearning_curve, relearning_steps
from retrack_jax.metrics.sscd import sscd, sscd_norm
from retrack_jax.sampling.ddim import DDIM
from retrack_jax.sampling.inject import inject
from retrack_jax.sampling.loop import initial_noise, sample
from tests.benchmarks.gap import prediction_distances, two_sided_gap

SCHEDULE = Schedule.from_config({"clip_sample": False})
STD = 0.1
NUM_REMAIN, NUM_COPIES = 12, 4


def _eps(model, x_t, t):
    """The exact eps of the mixture of N(image, 0.1^2) ; `model` = (images [M, H, W, C], log weights [M])."""
    stored, log_weights = model
    gamma = jnp.asarray(SCHEDULE.gamma)[t][:, None]
    sigma = jnp.asarray(SCHEDULE.sigma)[t][:, None]
    variance = gamma**2 * STD**2 + sigma**2
    away = x_t.reshape(len(x_t), 1, -1) - gamma[:, :, None] * stored.reshape(1, len(stored), -1)
    weights = jax.nn.softmax(log_weights[None] - 0.5 * jnp.sum(away**2, axis=-1) / variance, axis=-1)
    return (jnp.einsum("bm,bmd->bd", weights, away) * sigma / variance).reshape(x_t.shape)


def _unit(x):
    return np.clip(np.asarray(x) / 2 + 0.5, 0, 1)


def _embed(images):
    flat = images.reshape(len(images), -1).astype(np.float64)
    return {"features": flat - flat.mean(axis=1, keepdims=True)}


@pytest.fixture(scope="module")
def target():
    return np.random.default_rng(7).uniform(-0.9, 0.9, (4, 4, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def models(target):
    """`pretrained` has 4 of 16 images equal to the target; `retrained` has never seen it. One more: forgetting in between."""
    remain = np.random.default_rng(8).uniform(-0.9, 0.9, (NUM_REMAIN, 4, 4, 1)).astype(np.float32)
    images = np.concatenate([remain, target[None]])

    def model(copies):
        return images, np.log(np.array([1.0] * NUM_REMAIN + [max(copies, 1e-30)], np.float32))

    return {"pretrained": model(NUM_COPIES), "retrained": model(0.0), "model": model}


def test_frequency(models, target):
    draw = jax.jit(lambda model, rngs: sample(lambda x, t: _eps(model, x, t), initial_noise(rngs, (4, 4, 1)), rngs, sampler))
    sampler = DDIM.create(SCHEDULE, 50)
    rngs = jax.random.split(jax.random.key(0), 200)
    share = {
        name: np.mean(target_distances(_unit(draw(models[name], rngs)), _unit(target)) < 0.6)
        for name in ("pretrained", "retrained")
    }
    assert share["retrained"] == 0.0
    assert share["pretrained"] == pytest.approx(NUM_COPIES / (NUM_REMAIN + NUM_COPIES), abs=0.1)


def test_nll(models, target, rng):
    bits = {
        name: nll_bits_per_dim(_eps, models[name], SCHEDULE, target[None], rng, num_probes=8)
        for name in ("pretrained", "retrained")
    }
    difference = bits["retrained"][0][0] - bits["pretrained"][0][0]
    assert difference > 3 * np.hypot(bits["retrained"][1][0], bits["pretrained"][1][0])


def test_sscd_and_its_normalized_variant(models, target):
    run = jax.jit(
        lambda model, rngs: inject(lambda x, t: _eps(model, x, t), jnp.repeat(target[None], len(rngs), 0), rngs, SCHEDULE)
    )
    rngs = jax.random.split(jax.random.key(1), 64)
    for metric in (sscd, sscd_norm):
        score = {
            name: metric(_embed, _unit(run(models[name], rngs)), _unit(target)[None]) for name in ("pretrained", "retrained")
        }
        # In 16 pixels t = 250 leaves the image in doubt, so some of the pretrained model's images end elsewhere too.
        error = np.hypot(score["pretrained"].std(), score["retrained"].std()) / np.sqrt(len(rngs))
        assert score["pretrained"].mean() - score["retrained"].mean() > 3 * error, metric.__name__


def test_forget_loss(models, target, rng):
    losses = {name: denoising_losses(_eps, models[name], SCHEDULE, target[None], rng)[0] for name in ("pretrained", "retrained")}
    # Draws are paired, one in each part of [0, T): their spread is more than the mean's.
    gap = losses["pretrained"] - losses["retrained"]
    assert gap.mean() < -5 * gap.std() / np.sqrt(len(gap))


def test_membership_auc(rng):
    """Members and held-out images are drawn alike: only a model that saw the members tells them apart."""
    drawn = np.random.default_rng(9).uniform(-0.9, 0.9, (36, 4, 4, 1)).astype(np.float32)
    remain, members, held_out = drawn[:12], drawn[12:24], drawn[24:]
    models = {
        "pretrained": (np.concatenate([remain, members]), np.zeros(24, np.float32)),
        "retrained": (remain, np.zeros(12, np.float32)),
    }
    attacks = {
        "loss": lambda model, x: loss_scores(_eps, model, SCHEDULE, x, rng, num_noises=16),
        "secmi": lambda model, x: secmi_scores(_eps, model, SCHEDULE, x, t_sec=50),
    }
    for attack, score in attacks.items():
        found = {name: membership_auc(score(model, members), score(model, held_out), seed=0) for name, model in models.items()}
        assert found["pretrained"].low > 0.9, attack
        assert found["retrained"].low < 0.5 < found["retrained"].high < found["pretrained"].low, attack


def test_relearning(models, target, rng):
    """Fine-tuning that adds 0.01 copies per step: a model that kept a trace is back sooner than one that never knew."""

    def train(copies, first_step, num_steps):
        return copies + 0.01 * num_steps

    def measure(copies):
        return denoising_losses(_eps, models["model"](copies), SCHEDULE, target[None], rng, num_noises=64).mean()

    threshold = measure(0.1)
    steps = {
        name: relearning_steps(*relearning_curve(train, measure, copies, (5, 10, 20, 40)), threshold)
        for name, copies in (("hid it", 0.05), ("never knew", 0.0))
    }
    assert steps["hid it"][0] < steps["never knew"][0] <= 10.0 + 1e-6
    assert not steps["never knew"][1]


def test_the_two_sided_gap(models, target, rng):
    """A model that draws the image in a quarter of its samples is far from one that never does; two that never do are not."""
    stored, count = models["pretrained"][0], 240
    order = np.random.default_rng(10)

    def drawn(copies):
        share = np.array([1.0] * NUM_REMAIN + [copies])
        rows = order.choice(len(stored), count, p=share / share.sum())
        return stored[rows] + STD * order.standard_normal((count, *stored.shape[1:]))

    def gap(model, samples):
        return two_sided_gap(_eps, model, models["retrained"], SCHEDULE, samples, drawn(0), rng, num_noises=16)

    floor = gap(models["retrained"], drawn(0))
    pretrained = gap(models["pretrained"], drawn(NUM_COPIES))
    half = gap(models["model"](1.0), drawn(1))
    assert floor.value == 0.0 and floor.error == 0.0  # the very same model
    assert pretrained.value > 5 * pretrained.error and pretrained.value > half.value > 3 * half.error


def test_prediction_distances(models, target, rng):
    """Predictions differ on the forgotten image at small t; on the others, where noise hides which image it was, far less."""
    remaining = models["pretrained"][0][:NUM_REMAIN]
    pair = models["pretrained"], models["retrained"]
    on_target = prediction_distances(_eps, *pair, SCHEDULE, target[None], rng)
    on_others = prediction_distances(_eps, *pair, SCHEDULE, remaining, rng)
    assert on_target.shape == (8,) and np.argmax(on_target) == 0
    assert np.all(on_target[:2] > 10 * on_others[:2]) and on_target.sum() > 50 * on_others.sum()
    assert not prediction_distances(_eps, pair[1], pair[1], SCHEDULE, remaining, rng).any()
