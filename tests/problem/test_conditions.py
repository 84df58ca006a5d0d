"""How the condition of each example reaches the network through the training step: labels, rows of a table, one prompt for all.

The toy network answers `params` if the condition that it is given belongs to the image that it is given, else 0, so the loss says
for how many examples it does. At t = 0 an image can be told from its noisy point. With n pixels and eps the noise,

    loss(w) = mean |w match - eps|^2,    loss(1) + loss(-1) - 2 loss(0) = 2 n mean(match).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from retrack_jax import parallel
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.streams import Anchor
from tests import toys

NUM, SIZE = 8, 16  # images, each of one gray level, and pixels of each
LEVELS = np.arange(NUM) * 30
IMAGES = np.broadcast_to(LEVELS[:, None, None, None], (NUM, *toys.SHAPE)).astype(np.uint8)
RIGHT = np.arange(NUM, dtype=np.int32)
SWAPPED = RIGHT[[0, 1, 2, 3, 4, 5, 7, 6]]  # two examples have each other's


def answer(params, x_t, condition):
    number = jnp.round((x_t.mean(axis=(1, 2, 3)) + 1) * (127.5 / 30))
    return jnp.where(number == condition, params, 0.0)[:, None, None, None] * jnp.ones_like(x_t)


def by_label(params, x_t, t, label, **dropout):
    assert label.dtype == jnp.int32 and label.shape == t.shape
    return answer(params, x_t, label.astype(jnp.float32))


def by_embedding(params, x_t, t, embedding, **dropout):
    assert embedding.shape[1:] == (3, 2) and embedding.shape[0] in (1, len(t))
    return answer(params, x_t, embedding[:, 0, 0])


@functools.cache
def step_of(method, eps_fn, accumulation, t_max, dropout):
    entry = METHODS[method]
    how = StepOptions(options=entry.options(), accumulation=accumulation, t_max=t_max, dropout=dropout)
    return make_train_step(entry, eps_fn, how)


def losses_at(weights, eps_fn, *, remain, forget=None, method="vanilla", dropout=False, accumulation=1, conditions=None, t_max=1):
    """Returns the loss, and the gradient's norm, at each of `weights`; `remain` and `forget` are the examples' conditions."""
    step = step_of(method, eps_fn, accumulation, t_max, dropout)
    examples = {"pixels": IMAGES, **({} if remain is None else {"condition": remain})}
    batch = {"remain": examples, "remain_index": RIGHT, "forget_index": RIGHT, "forget_row": RIGHT[::-1].copy()}
    shared = Shared(
        schedule=toys.schedule(),
        forget={"pixels": IMAGES, **({} if forget is None else {"condition": forget})},
        neighbors={"pixels": IMAGES},
        neighbor_rows=RIGHT[:, None],
        conditions=conditions,
    )
    found = []
    for weight in weights:
        state = parallel.replicate(create_state(jnp.float32(weight), optax.sgd(0.1)))
        _, metrics = step(state, parallel.shard_batch(batch), parallel.replicate(shared), jax.random.key(1))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(found)


def matched(eps_fn, **how) -> float:
    """Returns the share of examples whose condition reached the network together with their image."""
    (minus, zero, plus), _ = losses_at((-1.0, 0.0, 1.0), eps_fn, **how).T
    return (plus + minus - 2 * zero) / (2 * SIZE)


@pytest.mark.parametrize(("dropout", "accumulation"), [(False, 1), (False, 2), (True, 1)])
def test_labels_of_remaining_images_reach_the_network(dropout, accumulation):
    how = {"dropout": dropout, "accumulation": accumulation}
    assert matched(by_label, remain=RIGHT, **how) == pytest.approx(1.0, abs=1e-3)
    assert matched(by_label, remain=SWAPPED, **how) == pytest.approx(0.75, abs=1e-3)


def test_labels_of_forgotten_images_reach_the_network():
    assert matched(by_label, remain=None, forget=RIGHT, method="neggrad") == pytest.approx(-1.0, abs=1e-3)
    assert matched(by_label, remain=None, forget=SWAPPED, method="neggrad") == pytest.approx(-0.75, abs=1e-3)


def test_in_one_forward_pass_of_both_streams_each_keeps_its_labels():
    lam = METHODS["retrack"].options().lam
    expected = lam * 0.75 + (1 - lam) * 1.0
    assert matched(by_label, remain=RIGHT, forget=SWAPPED, method="retrack") == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("dropout", [False, True])
def test_conditions_are_rows_of_a_table(dropout):
    table = np.broadcast_to(np.arange(NUM, dtype=np.float32)[:, None, None], (NUM, 3, 2))
    assert matched(by_embedding, remain=RIGHT, conditions=table, dropout=dropout) == pytest.approx(1.0, abs=1e-3)
    assert matched(by_embedding, remain=SWAPPED, conditions=table, dropout=dropout) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("method", ["retrack", "siss", "erasediff"])
def test_a_table_of_one_row_is_the_same_embedding_for_every_example(method, rng):
    """Nothing in the examples is needed then; losses and gradients are those of rows that are all equal."""
    keys = jax.random.split(rng)
    row, kernel = jax.random.normal(keys[0], (1, 3, 2)), jax.random.normal(keys[1], (2, SIZE))

    def network(weight, x_t, t, embedding, **dropout):
        shift = jnp.tanh(embedding.mean(axis=1) @ kernel).reshape(-1, *toys.SHAPE)
        return jnp.tanh(weight * x_t + shift)

    how = {"method": method, "t_max": 1000}
    one = losses_at((0.3,), network, remain=None, conditions=row, **how)
    # SISS compares the rows of a pair, whose forgotten image comes from the other end; for the others any rows will do.
    forget = RIGHT[::-1] % 4 if method == "siss" else RIGHT % 3
    same = losses_at((0.3,), network, remain=RIGHT % 4, forget=forget, conditions=jnp.tile(row, (4, 1, 1)), **how)
    np.testing.assert_allclose(one, same, rtol=1e-6)
    other = losses_at((0.3,), network, remain=None, conditions=row + 1, **how)
    assert np.abs(one - other).max() > 1e-2


def parts(labels):
    """Labels as a condition of two parts, such as Stable Diffusion XL's."""
    leaf = labels.astype(np.float32)[:, None]
    return {"text": np.tile(leaf[..., None], (1, 3, 2)), "size": np.tile(leaf, (1, 6))}


def by_parts(params, x_t, t, condition, **dropout):
    text, size = condition["text"][:, 0, 0], condition["size"][:, 0]
    return answer(params, x_t, jnp.where(text == size, text, -1.0))


@pytest.mark.parametrize("method", ["vanilla", "retrack", "siss", "erasediff"])
def test_a_condition_of_several_parts_reaches_the_network_as_a_whole(method):
    of_labels = losses_at((0.3,), by_label, remain=RIGHT, forget=SWAPPED, method=method)
    of_parts = losses_at((0.3,), by_parts, remain=parts(RIGHT), forget=parts(SWAPPED), method=method)
    np.testing.assert_allclose(of_parts, of_labels, rtol=1e-6)
    with_dropout = losses_at((0.3,), by_parts, remain=parts(RIGHT), forget=parts(SWAPPED), method=method, dropout=True)
    np.testing.assert_allclose(with_dropout, of_labels, rtol=1e-5)
    torn = {**parts(RIGHT), "size": parts(SWAPPED)["size"]}
    other = losses_at((0.3,), by_parts, remain=torn, forget=parts(SWAPPED), method=method)
    assert np.abs(other - of_labels).max() > 1e-2


# ---- Dropped conditions, and what takes the place of neighbors

NULL = 9


def metrics_of(eps_fn, dropout, *, weight=1.0, accumulation=1, method="retrack", condition=RIGHT, **fields):
    """Returns the metrics of one step with labels, of which the share `dropout` is dropped for `NULL`."""
    entry = METHODS[method]
    how = StepOptions(options=entry.options(), t_max=1000, condition_dropout=dropout, accumulation=accumulation)
    examples = {"pixels": IMAGES, "condition": condition}
    batch = {"remain": examples, "remain_index": RIGHT, "forget_index": RIGHT, "forget_row": RIGHT}
    given = dict(
        forget=examples, neighbors={"pixels": IMAGES}, neighbor_rows=RIGHT[:, None], null=jnp.full((1,), NULL, jnp.int32)
    )
    shared = Shared(schedule=toys.schedule(), **{**given, **fields})
    state = parallel.replicate(create_state(jnp.float32(weight), optax.sgd(0.1)))
    step = make_train_step(entry, eps_fn, how)
    _, metrics = step(state, parallel.shard_batch(batch), parallel.replicate(shared), jax.random.key(1))
    return {name: float(value) for name, value in metrics.items()}


def number(params, x_t, t, label):
    """A network that answers its parameter plus the label, in every pixel."""
    return (params + label.astype(jnp.float32)).reshape(-1, 1, 1, 1) * jnp.ones_like(x_t)


def indifferent(params, x_t, t, label):
    return params * x_t


def test_the_share_that_is_dropped_gets_the_null_condition():
    def is_null(params, x_t, t, label):
        return jnp.where(label == NULL, params, 0.0).reshape(-1, 1, 1, 1) * jnp.ones_like(x_t)

    def share(dropout, accumulation=1):
        plus, minus, zero = (
            metrics_of(is_null, dropout, weight=weight, accumulation=accumulation, method="vanilla")["loss"]
            for weight in (1.0, -1.0, 0.0)
        )
        return (plus + minus - 2 * zero) / (2 * SIZE)

    assert share(0.0) == pytest.approx(0.0, abs=1e-3) and share(1.0) == pytest.approx(1.0, abs=1e-3)
    half = share(0.5)
    assert 0.1 < half < 0.9 and share(0.5, accumulation=2) == pytest.approx(half, abs=1e-3)


def test_what_the_null_condition_leaves_out_stays():
    def text_and_size(params, x_t, t, condition):
        fits = (condition["text"][:, 0, 0] == NULL) & (condition["size"][:, 0] < NULL)
        return jnp.where(fits, params, 0.0).reshape(-1, 1, 1, 1) * jnp.ones_like(x_t)

    how = {"method": "vanilla", "condition": parts(RIGHT), "null": {"text": jnp.full((1, 3, 2), float(NULL))}}
    plus, minus, zero = (metrics_of(text_and_size, 1.0, weight=weight, **how)["loss"] for weight in (1.0, -1.0, 0.0))
    assert (plus + minus - 2 * zero) / (2 * SIZE) == pytest.approx(1.0, abs=1e-3)


def test_dropped_examples_have_neighbors_of_every_label():
    others = RIGHT[::-1][:, None].copy()
    own, null = metrics_of(indifferent, 0.0), metrics_of(indifferent, 0.0, neighbor_rows=others)
    assert abs(own["unlearn"] - null["unlearn"]) > 1
    assert metrics_of(indifferent, 1.0, null_neighbor_rows=others) == null
    assert metrics_of(indifferent, 0.0, null_neighbor_rows=others) == own


def test_an_anchored_example_is_led_to_the_pretrained_prediction_under_another_condition():
    anchor = Anchor(condition=jnp.full((NUM,), NULL, jnp.int32), used=jnp.ones((NUM,), bool))
    fields = {"anchor": anchor, "reference": jnp.float32(0.5)}
    found = metrics_of(number, 0.0, weight=2.0, **fields)
    assert found["unlearn"] == pytest.approx(SIZE * np.mean((2.0 + RIGHT - 0.5 - NULL) ** 2), rel=1e-5)
    # Under the null condition itself, and where no anchor is used, neighbors decide.
    plain = metrics_of(number, 0.0, weight=2.0)
    unused = anchor.replace(used=jnp.zeros((NUM,), bool))
    assert metrics_of(number, 0.0, weight=2.0, **{**fields, "anchor": unused}) == pytest.approx(plain, rel=1e-6)
    assert metrics_of(number, 1.0, weight=2.0, **fields) == pytest.approx(metrics_of(number, 1.0, weight=2.0), rel=1e-6)
