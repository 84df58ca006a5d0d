"""The training step: one device equals four, four microbatches one batch; one trace; one forward pass where one is enough."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax import parallel
from retrack_jax.checks import UserError
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.batches import Batches
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.train.lora import init
from retrack_jax.train.optimizer import make_ema_decay, make_optimizer
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, _close, _neighbors, _stream_rngs, make_train_step
from retrack_jax.unlearn.methods import METHODS, Terms
from retrack_jax.unlearn.options import RetrackOptions
from retrack_jax.unlearn.streams import Context, Stream
from tests import toys

SCHEDULE = toys.schedule()
REMAIN, FORGET = toys.images(40), toys.images(2, seed=1)
ADAMW = dict(learning_rate=1e-3, b1=0.95, b2=0.999, eps=1e-8, weight_decay=1e-6, clip_norm=1.0)


def shared(**fields):
    rows = np.array([[0, 1, 2], [2, 3, 4]], np.int32)
    return Shared(schedule=SCHEDULE, forget={"pixels": FORGET}, neighbors={"pixels": REMAIN[:5]}, neighbor_rows=rows, **fields)


def batches(size=16, forget_size=None):
    return Batches(
        gather=lambda rows: {"pixels": REMAIN[rows]},
        num_remain=len(REMAIN),
        forget_rows=np.arange(2),
        remain_size=size,
        forget_size=size if forget_size is None else forget_size,
        seed=3,
    )


def run(name, monkeypatch, *, devices=4, steps=3, net=None, how=None, ema=None, **batch):
    """Parameters and metrics after `steps` on the first `devices` devices."""
    monkeypatch.setattr(jax, "local_device_count", lambda *a: devices)
    net = net or toys.ToyNet()
    real_pmap = jax.pmap
    monkeypatch.setattr(jax, "pmap", lambda *a, **k: real_pmap(*a, devices=jax.devices()[:devices], **k))
    method = METHODS[name]
    how = how or StepOptions(options=method.options(), t_max=1000)
    step = make_train_step(method, make_eps_fn(net.apply, SCHEDULE), how)
    start = toys.params() if how.lora is None else init(how.lora, toys.params(), jax.random.key(7))
    state = create_state(start, make_optimizer(**ADAMW), ema)
    reference = toys.params() if how.lora else toys.params(1) if how.distill else None
    make, here = batches(**batch), shared(reference=reference)
    if devices == jax.device_count():
        state, here = parallel.replicate((state, here))
    for index in range(steps):
        state, metrics = step(state, make(index), here, jax.random.key(7))
    monkeypatch.undo()
    return state, metrics


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["retrack", "siss", "erasediff", "vanilla"])
def test_one_device_equals_four_and_four_microbatches(name, dropout, monkeypatch):
    """Dropout masks too are each example's own, wherever it is computed."""
    net = toys.ToyNet(dropout=dropout)
    options = StepOptions(options=METHODS[name].options(), t_max=1000, dropout=dropout > 0)
    one, _ = run(name, monkeypatch, devices=1, net=net, how=options)
    four, _ = run(name, monkeypatch, devices=4, net=net, how=options)
    micro, _ = run(name, monkeypatch, devices=1, net=net, how=dataclasses.replace(options, accumulation=4))
    start = toys.params()
    moved = jax.tree.map(jnp.subtract, one.params, start)
    for other in (four, micro):
        assert toys.relative(other.params, one.params) <= 1e-6
        assert toys.relative(jax.tree.map(jnp.subtract, other.params, start), moved) <= 1e-3


def test_every_example_and_step_draws_its_own_dropout_mask(rng):
    """Two equal examples are not dropped alike, nor is one at two steps; without dropout they are predicted alike."""
    eps_fn, params = make_eps_fn(toys.ToyNet(dropout=0.5).apply, SCHEDULE), toys.params()
    x_t, t = jnp.ones((2, *toys.SHAPE)), jnp.full((2,), 500)

    def predicted(dropout, step):
        rngs = parallel.example_rngs(jax.random.fold_in(rng, step), jnp.arange(2))
        return _close(eps_fn, params, None, dropout)(x_t, t, None, rngs)

    first, second = predicted(True, 0), predicted(True, 1)
    assert not np.allclose(first[0], first[1]) and not np.allclose(first, second)
    np.testing.assert_array_equal(*predicted(False, 0))


def test_a_step_donates_its_state():
    """Parameters and moments are updated in place: the memory of a step holds them once."""
    method = METHODS["vanilla"]
    step = make_train_step(method, make_eps_fn(toys.ToyNet().apply, SCHEDULE), StepOptions(t_max=1000))
    state, here = parallel.replicate((create_state(toys.params(), make_optimizer(**ADAMW)), Shared(schedule=SCHEDULE)))
    after, _ = step(state, batches()(0), here, jax.random.key(7))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_no_two_draws_of_an_example_share_a_key(rng, monkeypatch):
    """Time, noise, a mixture's mask, dropout, the uniform target and the latent: each folds a number of its own into the key."""
    rngs, _ = _stream_rngs(rng, 0, jnp.arange(2))
    stream = Stream(jnp.zeros((2, *toys.SHAPE)), rngs)
    folds, real = [], jax.random.fold_in
    monkeypatch.setattr(jax.random, "fold_in", lambda key, data: (folds.append(data), real(key, data))[1])
    Context(schedule=SCHEDULE, eps_fn=None, t_max=1000).noise(stream)
    stream.bernoulli(0.5)
    stream.uniform()
    drawn = len(folds)
    _stream_rngs(rng, 0, jnp.arange(2))
    assert drawn == 5 and len({*folds[:drawn], folds[-1]}) == 6  # what comes between makes the example's key itself


def test_the_seed_and_the_step_change_the_draws(monkeypatch):
    _, first = run("vanilla", monkeypatch, steps=1)
    _, second = run("vanilla", monkeypatch, steps=2)
    assert float(first["loss"]) != float(second["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_traces_once(name, monkeypatch):
    traces = []

    class Counting(toys.ToyNet):
        def __call__(self, x, t, deterministic=True):
            traces.append(x.shape)
            return super().__call__(x, t, deterministic)

    run(name, monkeypatch, steps=1, net=Counting())
    once = [*traces]
    assert len(once) == (2 if name in ("siss_no_is", "erasediff") else 1)  # two terms share their forward passes
    pass_of_a_device = UnlearnOptions(batch_size=16).images_of_a_pass(METHODS[name]) // 4
    assert max(shape[0] for shape in once) == pass_of_a_device
    traces.clear()
    state, metrics = run(name, monkeypatch, steps=4, net=Counting())
    assert traces == once
    assert int(state.step) == 4
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_method_whose_terms_are_no_scalars_is_told_so(monkeypatch):
    no_mean = dataclasses.replace(METHODS["vanilla"], terms=lambda context, remain, forget: Terms(main=remain.x_0))
    monkeypatch.setitem(METHODS, "no_mean", no_mean)
    with pytest.raises(UserError, match="a method's terms must be scalars, means over the batch"):
        run("no_mean", monkeypatch, steps=1)


def test_bfloat16_computes_and_float32_is_kept(monkeypatch):
    """A real UNet: parameters, moments, average and loss stay float32; the loss differs as bfloat16 does, and no more."""
    config = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    config |= {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    nets = [UNet2D.from_config(config | {"add_attention": False}, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32)]
    params = nets[0].init(jax.random.key(0), jnp.zeros((1, *toys.SHAPE)), jnp.zeros((1,), jnp.int32))["params"]
    monkeypatch.setattr(toys, "params", lambda seed=0: jax.tree.map(jnp.copy, params))  # a step donates them
    ema = make_ema_decay(power=0.75, inv_gamma=1.0, max_decay=0.9999)
    (half, metrics), (_, exact) = (run("retrack", pytest.MonkeyPatch(), devices=1, steps=2, net=net, ema=ema) for net in nets)
    floats = [leaf for leaf in jax.tree.leaves((half, metrics)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {np.dtype(np.float32)}
    assert 1e-6 < abs(float(metrics["loss"] / exact["loss"]) - 1) < 2e-2


def test_a_smaller_forget_batch_and_distillation(monkeypatch):
    how = StepOptions(options=RetrackOptions(lam=0.1), t_max=1000, distill=True)
    state, metrics = run("retrack", monkeypatch, how=how, forget_size=4)
    assert set(metrics) == {"loss", "unlearn", "retain", "grad_norm"}
    assert all(np.isfinite(value) for value in metrics.values())


def test_lambda_follows_its_schedule(monkeypatch):
    how = StepOptions(options=RetrackOptions(lam=0.0, lam_end=1.0, lam_schedule="linear"), num_steps=3, t_max=1000)
    _, metrics = run("retrack", monkeypatch, steps=1, how=how)
    np.testing.assert_allclose(metrics["loss"], metrics["retain"], rtol=1e-6)  # lambda 0
    _, metrics = run("retrack", monkeypatch, steps=3, how=how)
    np.testing.assert_allclose(metrics["loss"], metrics["unlearn"], rtol=1e-6)  # lambda 1


def test_siss_takes_one_forward_pass_and_two_backward():
    """By the compiler's count of operations: siss on B images costs less than two losses that share nothing."""

    def flops(name):
        method = METHODS[name]
        step = make_train_step(
            method, make_eps_fn(toys.ToyNet(width=256).apply, SCHEDULE), StepOptions(options=method.options(), t_max=1000)
        )
        net = toys.ToyNet(width=256)
        params = net.init(jax.random.key(0), jnp.zeros((1, *toys.SHAPE)), jnp.zeros((1,), jnp.int32))["params"]
        state = create_state(params, make_optimizer(**ADAMW))
        analysis = step.lower(state, batches(256)(0), shared(), jax.random.key(0)).compile().cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    # One forward and one backward cost 3 units of matrix product; siss adds one backward (2), siss_no_is a whole second pass (3).
    vanilla, one_pass, two_passes = flops("vanilla"), flops("siss"), flops("siss_no_is")
    assert one_pass < 0.95 * two_passes
    assert one_pass < 1.9 * vanilla


def test_the_moving_average_follows_diffusers_rule(monkeypatch):
    decay = make_ema_decay(power=0.75, inv_gamma=1.0, max_decay=0.9999)
    state, _ = run("vanilla", monkeypatch, steps=1, ema=decay)
    # At step 0 the decay is 0, so the average is the parameters.
    assert toys.relative(state.ema_params, state.params) == 0.0
    np.testing.assert_allclose(decay(jnp.asarray(9)), 1 - 10**-0.75, rtol=1e-5)
    np.testing.assert_allclose(decay(jnp.asarray(10**7)), 0.9999, rtol=1e-6)


def test_a_batch_is_addressed_by_step_and_changes_with_the_seed():
    make = batches()
    again = batches()
    for step in (0, 5, 17):
        np.testing.assert_array_equal(make(step)["remain"]["pixels"], again(step)["remain"]["pixels"])
    other = dataclasses.replace(make, seed=4)
    assert (make(0)["remain"]["pixels"] != other(0)["remain"]["pixels"]).any()


def test_an_epoch_sees_every_image_once():
    seen = np.concatenate([parallel.unshard_batch(batches(8)(step))["remain"]["pixels"] for step in range(5)])
    assert len(np.unique(seen.reshape(40, -1), axis=0)) == 40


def test_the_window_of_t_reaches_the_draws(monkeypatch):
    """At t = 0 the noise is all but invisible and cannot be predicted; at t = 999 it is the image itself."""
    losses = [float(run("vanilla", monkeypatch, steps=1, how=StepOptions(t_min=t, t_max=t + 1))[1]["loss"]) for t in (0, 999)]
    mixed = float(run("vanilla", monkeypatch, steps=1, how=StepOptions(t_max=1000))[1]["loss"])
    assert len({round(loss, 4) for loss in (*losses, mixed)}) == 3


def test_each_forgotten_image_has_its_own_neighbors():
    pixels = toys.images(4)
    here = Shared(schedule=SCHEDULE, neighbors={"pixels": jnp.asarray(pixels)}, neighbor_rows=jnp.array([[0, 1], [3, 2]]))
    found = _neighbors(here, jnp.array([1, 0, 1]))
    expected = pixels_to_model(pixels)[[[3, 2], [0, 1], [3, 2]]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
