"""ReTrack with captions: the kernel and the anchor against NumPy in float64, and through the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrack_jax import parallel
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.options import RetrackOptions
from retrack_jax.unlearn.streams import Anchor
from tests import toys
from tests.oracles import record

CASE = record.load()["retrack"]["in"]
ARRAYS = [np.asarray(CASE[name]) for name in ("eps_pred", "x_t", "neighbors", "gamma", "sigma")]
LAM, ROWS = 0.3, np.arange(8, dtype=np.int32)


def oracle(eps_pred, x_t, neighbors, gamma, sigma, beta, captions):
    """sum_k p_k ||e - v_k||^2 with p_k ~ exp(-||v_k||^2/2 + beta cos(c_f, c_k)); captions `[B, 1 + K, D]`, the first is c_f."""
    values = []
    for e, x, around, g, s, c in zip(eps_pred, x_t, neighbors, gamma, sigma, captions, strict=True):
        v = (np.float64(x) - np.float64(g) * np.float64(around)) / np.float64(s)
        cosine = [c[0] @ other / np.sqrt((c[0] @ c[0]) * (other @ other)) for other in c[1:]]
        log_p = -0.5 * (v**2).sum(axis=(1, 2, 3)) + beta * np.array(cosine)
        p = np.exp(log_p - log_p.max())
        values.append(sum(p_k * ((e - v_k) ** 2).sum() for p_k, v_k in zip(p / p.sum(), v, strict=True)))
    return np.array(values)


@pytest.mark.parametrize("beta", [0.0, 3.0, 50.0])
def test_the_kernel(beta):
    captions = np.random.default_rng(0).standard_normal((len(ARRAYS[0]), 1 + ARRAYS[2].shape[1], 5))
    unit = captions / np.linalg.norm(captions, axis=2, keepdims=True)
    similarity = np.einsum("bkd,bd->bk", unit[:, 1:], unit[:, 0]).astype(np.float32)
    ours = losses.retrack(*map(jnp.asarray, ARRAYS), jnp.asarray(np.float32(beta) * similarity))
    np.testing.assert_allclose(ours, oracle(*ARRAYS, beta, captions), rtol=1e-4)


def test_captions_that_are_equal_or_of_no_weight_leave_the_papers_loss_to_the_bit():
    arrays = list(map(jnp.asarray, ARRAYS))
    plain = losses.retrack(*arrays)
    for bias in (0.0, 7.3):
        np.testing.assert_array_equal(losses.retrack(*arrays, jnp.full(arrays[2].shape[:2], bias)), plain)


def test_a_bias_of_minus_infinity_leaves_a_neighbor_out():
    eps_pred, x_t, neighbors, gamma, sigma = map(jnp.asarray, ARRAYS)
    bias = jnp.zeros(neighbors.shape[:2]).at[:, 1:].set(-jnp.inf)
    one = losses.retrack(eps_pred, x_t, neighbors[:, :1], gamma, sigma)
    np.testing.assert_array_equal(losses.retrack(eps_pred, x_t, neighbors, gamma, sigma, bias), one)


# ---- Through the step. The network's answer is a multiple of its condition, so that losses show which one it was given.


def network(weight, x_t, t, condition):
    return weight * condition[:, :, None, None] * jnp.ones_like(x_t)


def metrics_of(*, forget, options=None, dropout=0.0, weight=1.0, t=(500, 501), **shared):
    how = StepOptions(options=options or RetrackOptions(lam=LAM), t_min=t[0], t_max=t[1], condition_dropout=dropout)
    step = make_train_step(METHODS["retrack"], network, how)
    pixels = toys.images(8)
    batch = {
        "remain": {"pixels": pixels, "condition": np.ones((8, 1), np.float32)},
        "remain_index": ROWS, "forget_index": ROWS, "forget_row": ROWS,
    }  # fmt: skip
    here = Shared(
        schedule=toys.schedule(),
        forget={"pixels": toys.images(8, seed=1), "condition": np.asarray(forget, np.float32)},
        neighbors={"pixels": pixels},
        neighbor_rows=np.stack([ROWS, (ROWS + 1) % 8], axis=1),
        null=jnp.zeros((1, 1)),
        **shared,
    )
    state = parallel.replicate(create_state(jnp.float32(weight), optax.sgd(0.1)))
    _, metrics = step(state, parallel.shard_batch(batch), parallel.replicate(here), jax.random.key(1))
    return {name: float(value) for name, value in metrics.items()}


OWN = np.full((8, 1), 2.0)


def test_an_anchor_is_the_pretrained_prediction_under_its_condition():
    """The pretrained network has weight 3, its anchor condition 5: the distance to 2 x 1 is 13 in each of 16 pixels."""
    anchor = Anchor(np.full((8, 1), 5.0, np.float32), np.ones(8, bool))
    found = metrics_of(forget=OWN, anchor=anchor, reference=jnp.float32(3.0))
    assert found["unlearn"] == pytest.approx(16 * 13**2, rel=1e-5)
    plain = metrics_of(forget=OWN)
    assert found["retain"] == plain["retain"]  # the frozen parameters are no distillation
    unused = Anchor(anchor.condition, np.zeros(8, bool))
    found = metrics_of(forget=OWN, anchor=unused, reference=jnp.float32(3.0))
    assert found["unlearn"] == pytest.approx(plain["unlearn"], rel=1e-6)


def test_the_snr_cap_weights_examples_that_follow_an_anchor_too():
    """Equation 8's weight is of each forgotten example; at t = 40, one step of this schedule, it is below 1."""
    anchor = Anchor(np.full((8, 1), 5.0, np.float32), np.ones(8, bool))
    found = metrics_of(
        forget=OWN, anchor=anchor, reference=jnp.float32(3.0), t=(40, 41), options=RetrackOptions(lam=LAM, snr_cap=5.0)
    )
    gamma, sigma = (np.float64(np.asarray(table)[40]) for table in (toys.schedule().gamma, toys.schedule().sigma))
    weight = 5.0 * sigma**2 / gamma**2
    assert weight < 0.5 and found["unlearn"] == pytest.approx(weight * 16 * 13**2, rel=1e-4)


def test_some_examples_have_an_anchor_and_others_neighbors():
    used = ROWS < 2
    found = metrics_of(forget=OWN, anchor=Anchor(np.full((8, 1), 5.0, np.float32), used), reference=jnp.float32(3.0))
    none, every = (
        metrics_of(forget=OWN, anchor=Anchor(np.full((8, 1), 5.0, np.float32), np.full(8, all_)), reference=jnp.float32(3.0))
        for all_ in (False, True)
    )
    assert found["unlearn"] != pytest.approx(none["unlearn"], rel=1e-3)
    assert min(none["unlearn"], 16 * 13**2) < found["unlearn"] and every["unlearn"] == pytest.approx(16 * 13**2, rel=1e-5)


def test_a_dropped_caption_is_the_null_condition_and_has_no_kernel_and_no_anchor():
    bias = np.stack([np.full(8, 0.0), np.full(8, 80.0)], axis=1).astype(np.float32)
    anchor = Anchor(np.full((8, 1), 5.0, np.float32), np.ones(8, bool))
    dropped = metrics_of(forget=OWN, dropout=1.0, neighbor_bias=bias, anchor=anchor, reference=jnp.float32(3.0))
    at_null = metrics_of(forget=np.zeros((8, 1)))
    assert dropped["unlearn"] == pytest.approx(at_null["unlearn"], rel=1e-6)
    assert dropped["retain"] < metrics_of(forget=OWN)["retain"]  # an answer of 0 is nearer to the noise than one of 1
    some = metrics_of(forget=OWN, dropout=0.5)["retain"]
    assert dropped["retain"] < some < metrics_of(forget=OWN)["retain"]


def test_the_bias_reaches_the_loss():
    bias = np.stack([np.zeros(8), np.full(8, 1e4)], axis=1).astype(np.float32)
    assert metrics_of(forget=OWN, neighbor_bias=bias)["unlearn"] != metrics_of(forget=OWN)["unlearn"]
    zero = metrics_of(forget=OWN, neighbor_bias=0 * bias)
    assert zero["unlearn"] == pytest.approx(metrics_of(forget=OWN)["unlearn"], rel=1e-6)
