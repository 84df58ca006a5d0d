"""Adapters: equation (1) against NumPy, which layers, what is trained, every method, devices and microbatches, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.train.lora import LoraOptions, adapted, init, merge, scaled
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.run_store import tree_digest
from retrack_jax.train.state import create_state
from retrack_jax.train.step import StepOptions, make_train_step
from retrack_jax.unlearn.calibration import between
from retrack_jax.unlearn.methods import METHODS
from tests import toys
from tests.models.test_unet2d import TINY
from tests.tiny_sd import hasty_compiler
from tests.train.test_step import ADAMW, SCHEDULE, batches, run, shared

BOTH = LoraOptions(rank=2, alpha=3.0, layers=("Dense_0", "Dense_1"))
FINE_TUNED = [name for name, method in METHODS.items() if not method.from_scratch]


@pytest.fixture(scope="module")
def unet_params():
    """Parameters of a UNet with attention."""
    inputs = jnp.zeros((1, 4, 4, 1)), jnp.zeros((1,), jnp.int32)
    return jax.jit(UNet2D.from_config(TINY).init)(jax.random.key(0), *inputs)["params"]


def shaken(adapter):
    """The adapter with other values everywhere; B is 0 in a new one."""
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + numbers.normal(size=leaf.shape).astype(np.float32), adapter)


def test_a_new_adapter_leaves_the_network_as_it_is_to_the_bit(unet_params):
    adapter = init(LoraOptions(), unet_params, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, merge(LoraOptions(), unet_params, adapter), unet_params)
    draws = [leaf for path, leaf in jax.tree.leaves_with_path(adapter) if "lora_A" in str(path)]
    assert len({float(leaf.flat[0]) for leaf in map(np.asarray, draws)}) == len(draws)  # no two layers start with the same A
    wide = init(LoraOptions(rank=16, layers=("one",)), {"one": {"kernel": jnp.zeros((500, 3))}}, jax.random.key(0))
    assert np.std(wide["one"]["lora_A"]["kernel"]) == pytest.approx(1 / 16, rel=0.05)  # as peft's "gaussian"


def test_the_merged_kernel_is_equation_1_for_dense_layers_and_convolutions(unet_params):
    lora = LoraOptions(rank=3, alpha=5.0, layers=("to_q", "conv1", "conv_shortcut"))
    adapter = shaken(init(lora, unet_params, jax.random.key(0)))
    merged = merge(lora, unet_params, adapter)
    attention, resnet = ("mid_block", "attentions_0", "to_q"), ("up_blocks_0", "resnets_0", "conv1")

    def at(tree, path):
        for name in path:
            tree = tree[name]
        return tree

    for path in (attention, resnet):
        layer, change = at(unet_params, path), at(adapter, path)
        a, b = (np.asarray(change[name]["kernel"], np.float64) for name in ("lora_A", "lora_B"))
        product = np.zeros(layer["kernel"].shape)
        for inputs in np.ndindex(product.shape[:-1]):
            for output in range(product.shape[-1]):
                product[(*inputs, output)] = sum(a[(*inputs, k)] * b.reshape(3, -1)[k, output] for k in range(3))
        expected = np.asarray(layer["kernel"], np.float64) + 5 / 3 * product
        np.testing.assert_allclose(at(merged, path)["kernel"], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(at(merged, path)["bias"], layer["bias"])
    untouched = ("mid_block", "attentions_0", "to_v", "kernel")
    np.testing.assert_array_equal(at(merged, untouched), at(unet_params, untouched))


def test_a_calibrated_adapter_is_the_point_on_the_line(unet_params):
    lora = LoraOptions(rank=3, alpha=5.0, layers=("to_q", "conv1"))
    adapter = shaken(init(lora, unet_params, jax.random.key(0)))
    line = between(unet_params, merge(lora, unet_params, adapter), 0.3)
    assert toys.relative(merge(lora, unet_params, scaled(adapter, 0.3)), line) < 1e-6


def test_layers_are_named_by_the_ends_of_diffusers_names(unet_params):
    found = adapted(LoraOptions(layers=("to_out.0", "attentions.0.to_q")), unet_params)
    assert "mid_block.attentions.0.to_out.0" in found and "mid_block.attentions.0.to_q" in found
    assert not any(name.endswith(("to_k", "to_v")) for name in found)
    for wrong in ("to_z", "out.0", "attentions"):
        with pytest.raises(UserError, match=rf"^config.lora.layers: the network has no layer '{wrong}'; it has conv, .*to_out.0"):
            adapted(LoraOptions(layers=("to_q", wrong)), unet_params, "config.lora.")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"layers": ()}, r"layers is \(\)"),
        ({"layers": "to_q"}, "layers is 'to_q'; give names"),
        ({"export": "both"}, "export is 'both'; choose one of merged, adapter"),
    ],
)
def test_wrong_options_are_named(fields, words):
    with pytest.raises(UserError, match=words):
        LoraOptions(**fields)


@pytest.mark.parametrize("name", FINE_TUNED)
def test_every_method_trains_the_adapter_alone(name, monkeypatch):
    base = toys.params()
    before = tree_digest(base)
    monkeypatch.setattr(toys, "params", lambda seed=0: base)
    how = StepOptions(options=METHODS[name].options(), t_max=1000, lora=BOTH)
    state, metrics = run(name, monkeypatch, how=how)
    sizes = [a + b for a, b in (base["Dense_0"]["kernel"].shape, base["Dense_1"]["kernel"].shape)]
    count = 2 * sum(sizes)  # rank 2
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == count
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, init(BOTH, base, jax.random.key(7)))
    assert min(jax.tree.leaves(moved)) > 0 and all(np.isfinite(value) for value in metrics.values())
    assert tree_digest(base) == before


def test_one_device_equals_four_and_four_microbatches(monkeypatch):
    how = StepOptions(options=METHODS["siss"].options(), t_max=1000, lora=BOTH, dropout=True)
    net = toys.ToyNet(dropout=0.5)
    one, _ = run("siss", monkeypatch, devices=1, how=how, net=net)
    four, _ = run("siss", monkeypatch, devices=4, how=how, net=net)
    micro, _ = run("siss", monkeypatch, devices=1, how=dataclasses.replace(how, accumulation=4), net=net)
    start = init(BOTH, toys.params(), jax.random.key(7))
    moved = jax.tree.map(jnp.subtract, one.params, start)
    for other in (four, micro):
        assert toys.relative(jax.tree.map(jnp.subtract, other.params, start), moved) <= 1e-3


def test_the_first_step_of_b_is_the_gradient_of_the_kernel_times_a(monkeypatch):
    """dL/dB = alpha/r A^T dL/dW, and A has no gradient while B is 0: by the gradient of the whole network."""
    params, adapter = toys.params(), init(BOTH, toys.params(), jax.random.key(0))
    x, t = jnp.asarray(toys.images(8), jnp.float32) / 255, jnp.arange(8)

    def loss(params):
        return jnp.square(toys.ToyNet().apply({"params": params}, x, t)).sum()

    whole = jax.grad(loss)(params)
    small = jax.grad(lambda adapter: loss(merge(BOTH, params, adapter)))(adapter)
    for name in ("Dense_0", "Dense_1"):
        expected = 1.5 * adapter[name]["lora_A"]["kernel"].T @ whole[name]["kernel"]
        np.testing.assert_allclose(small[name]["lora_B"]["kernel"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(small[name]["lora_A"]["kernel"], 0.0)


def plan(how, params, start, net):
    """The compiler's plan of memory for a ReTrack step."""
    step = make_train_step(METHODS["retrack"], make_eps_fn(net.apply, SCHEDULE), how)
    state = jax.eval_shape(lambda: create_state(start, make_optimizer(**ADAMW)))
    needs_base = how.lora is not None or how.distill
    here = shared(reference=params if needs_base else None)
    return step.lower(state, batches(16)(0), here, jax.random.key(0)).compile().memory_analysis()


def test_distillation_from_the_base_holds_no_second_copy():
    """Arguments are the same with and without it; a full fine-tuning takes the parameters once more for it."""
    net = toys.ToyNet(width=256)
    params = net.init(jax.random.key(0), jnp.zeros((1, *toys.SHAPE)), jnp.zeros((1,), jnp.int32))["params"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    adapter = init(BOTH, params, jax.random.key(0))
    options = METHODS["retrack"].options()
    lora, full = (StepOptions(options=options, t_max=1000, lora=lora) for lora in (BOTH, None))

    def arguments(how, start):
        with hasty_compiler():
            return plan(how, params, start, net).argument_size_in_bytes

    alone, distilled = (arguments(dataclasses.replace(lora, distill=distill), adapter) for distill in (False, True))
    assert alone == distilled
    copies = [arguments(dataclasses.replace(full, distill=distill), params) for distill in (False, True)]
    assert copies[1] - copies[0] == pytest.approx(size, rel=0.01)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    # Parameters and two moments of each; and the base.
    assert copies[0] - alone == pytest.approx(3 * size - (size + 3 * trained), rel=0.05)


def test_recomputed_activations_give_the_same_gradient(unet_params):
    lora = LoraOptions(rank=2, layers=("to_q", "conv2"))
    adapter = shaken(init(lora, unet_params, jax.random.key(0)))
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.array([3, 500])

    def gradient(remat):
        unet = UNet2D.from_config(TINY, remat=remat)

        def loss(adapter):
            return jnp.square(unet.apply({"params": merge(lora, unet_params, adapter)}, x, t)).sum()

        with hasty_compiler():
            return jax.jit(jax.grad(loss))(adapter)

    assert toys.relative(gradient(True), gradient(False)) < 1e-5
