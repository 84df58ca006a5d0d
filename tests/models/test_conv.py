"""The convolution against `lax.conv_general_dilated` and its own gradients, under every transformation that the library uses."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from retrack_jax.models.conv import Conv, conv
from retrack_jax.models.cpu import winograd

SAME = ((1, 1), (1, 1))
# kernel size, strides, padding, height: the networks' four kinds, then odd ones (unused last rows, uneven padding, wide padding).
CASES = [
    (3, 1, SAME, 8),
    (3, 2, SAME, 8),
    (3, 2, ((0, 1), (0, 1)), 8),
    (1, 1, ((0, 0), (0, 0)), 8),
    (3, 2, SAME, 9),
    (1, 2, ((0, 0), (0, 0)), 9),
    (4, 3, ((2, 1), (0, 3)), 9),
    (3, 2, ((3, 3), (3, 3)), 8),
]
STEP = {"strides": 1, "padding": SAME}


def reference(x, kernel, *, strides, padding):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=numbers)


def arrays(size=3, height=8, batch=2, channels=5, features=6, dtype=jnp.float32):
    source = np.random.default_rng(0)
    x = source.normal(size=(batch, height, height + 1, channels))
    kernel = source.normal(size=(size, size, channels, features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def assert_close(found, wanted, limit=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b)


@pytest.mark.parametrize("channels, features", [(64, 80), (256, 256)])
def test_wide_convolutions_with_half_the_products(channels, features):
    x, kernel = arrays(height=20, channels=channels, features=features)
    x = x[:, :, :16]
    assert winograd.pays(x.shape, kernel.shape, 1, SAME, x.dtype)
    assert_close(conv(x, kernel, **STEP), reference(x, kernel, **STEP), limit=3e-6)

    def gradients(convolve):  # linear in y, for the reference's own rounding must not enter through a cosine
        weights = jnp.cos(reference(x, kernel, **STEP))
        return jax.jit(jax.grad(lambda x, kernel: (weights * convolve(x, kernel, **STEP)).sum(), (0, 1)))(x, kernel)

    assert_close(gradients(conv), gradients(reference), limit=3e-6)
    traced = jax.jit(partial(conv, **STEP)).trace(x, kernel)
    for platform, products in (("cpu", 6), ("tpu", 1), ("cuda", 1)):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution") == products


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_strips_of_rows_add_up(rows, monkeypatch):
    x, kernel = arrays(height=16, channels=64, features=80)
    x = x[:, :, :16]
    monkeypatch.setattr(winograd, "_STRIP", rows * 2 * 16 * 80)
    dy = jnp.cos(reference(x, kernel, **STEP))
    wanted = jax.grad(lambda kernel: (dy * reference(x, kernel, **STEP)).sum())(kernel)
    traced = jax.make_jaxpr(lambda x, dy: winograd.kernel_gradient(x, dy))(x, dy)  # a new function: traces are kept
    assert ("scan" in str(traced)) == (rows < 16)
    assert_close(winograd.kernel_gradient(x, dy), wanted, limit=3e-6)


def test_large_images_take_strips_on_cpu_alone():
    """Of 256 x 256 pixels XLA's direct form takes several times as long."""
    x, kernel = jax.ShapeDtypeStruct((1, 256, 256, 128), jnp.float32), jax.ShapeDtypeStruct((3, 3, 128, 128), jnp.float32)
    traced = jax.jit(jax.grad(lambda kernel, x: conv(x, kernel, **STEP).sum())).trace(kernel, x)
    for platform, loops in (("cpu", 1), ("tpu", 0), ("cuda", 0)):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while") == loops


def value_and_gradients(convolve, **step):
    return jax.jit(jax.value_and_grad(lambda x, kernel: jnp.sin(convolve(x, kernel, **step)).sum(), (0, 1)))


@pytest.mark.parametrize("size, strides, padding, height", CASES)
def test_value_and_gradients_are_those_of_lax(size, strides, padding, height):
    x, kernel = arrays(size, height)
    step = {"strides": strides, "padding": padding}
    assert_close(conv(x, kernel, **step), reference(x, kernel, **step))
    assert_close(value_and_gradients(conv, **step)(x, kernel), value_and_gradients(reference, **step)(x, kernel))


@pytest.mark.parametrize("strides", [1, 2])
def test_forward_mode(strides):
    primals, tangents = arrays(), tuple(jnp.cos(array) for array in arrays())
    step = {"strides": strides, "padding": SAME}
    found = jax.jit(partial(jax.jvp, partial(conv, **step)))(primals, tangents)
    assert_close(found, jax.jvp(partial(reference, **step), primals, tangents))


def test_hessian_product():
    x, kernel = arrays()

    def product(convolve):
        gradient = jax.grad(lambda x: jnp.sin(convolve(x, kernel, **STEP)).sum())
        return jax.jvp(gradient, (x,), (jnp.cos(x),))[1], jax.vjp(gradient, x)[1](jnp.cos(x))

    assert_close(product(conv), product(reference))


@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 0), (0, 0)])
def test_vmap_of_the_gradient(axes):
    x, kernel = arrays()
    xs = jnp.stack([x, 2 * x, 3 * x], axes[0]) if axes[0] is not None else x
    kernels = jnp.stack([kernel, 2 * kernel, 3 * kernel]) if axes[1] == 0 else kernel
    found = jax.vmap(value_and_gradients(conv, **STEP), axes)(xs, kernels)
    assert_close(found, jax.vmap(value_and_gradients(reference, **STEP), axes)(xs, kernels))


def test_bfloat16():
    x, kernel = arrays(dtype=jnp.bfloat16)
    wanted = value_and_gradients(reference, **STEP)(*arrays())[1]
    found = value_and_gradients(conv, **STEP)(x, kernel)[1]
    assert all(gradient.dtype == jnp.bfloat16 for gradient in found)
    assert_close(jax.tree.map(lambda a: a.astype(jnp.float32), found), wanted, limit=0.03)


def scanned(convolve, x, kernel):
    """The gradient of three layers as a scan over kernels, and of the sum over microbatches."""
    kernels = jnp.stack([kernel[..., : x.shape[-1]]] * 3)

    def loss(kernels, x):
        return jnp.sin(lax.scan(lambda y, kernel: (convolve(y, kernel, **STEP), None), x, kernels)[0]).sum()

    def add(total, x):
        return total + jax.grad(loss)(kernels, x), None

    return lax.scan(add, jnp.zeros_like(kernels), jnp.stack([x, 2 * x]))[0]


def test_inside_scan():
    assert_close(scanned(conv, *arrays()), scanned(reference, *arrays()))


def layouts(text):
    return set(re.findall(r"dim_labels=(\S+?)[,\s]", text))


def test_every_gradient_in_a_loop_has_the_layout_that_is_quick_on_cpu():
    functions = {"ours": conv, "lax": reference}
    compiled = {name: jax.jit(partial(scanned, one)).lower(*arrays()).compile().as_text() for name, one in functions.items()}
    assert layouts(compiled["ours"]) == {"b01f_01io->b01f"}
    assert layouts(compiled["lax"]) != {"b01f_01io->b01f"}, "XLA is quick by itself now: conv.py can go"


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_keep_their_own_gradients(platform):
    def convolutions(convolve):
        lowered = value_and_gradients(convolve, strides=2, padding=SAME).trace(*arrays()).lower(lowering_platforms=(platform,))
        return sorted(re.findall(r"stablehlo.convolution.*?dim_numbers = (.*?), window = (\{.*?\})", lowered.as_text()))

    assert len(convolutions(reference)) == 3
    assert convolutions(conv) == convolutions(reference)


def test_devices_agree_with_one_device():
    x, kernel = arrays(batch=8)
    wanted = value_and_gradients(conv, **STEP)(x, kernel)[1][1]

    def step(x, kernel):
        return lax.psum(jax.grad(lambda kernel: jnp.sin(conv(x, kernel, **STEP)).sum())(kernel), "batch")

    parallel = jax.pmap(step, axis_name="batch", in_axes=(0, None), out_axes=None)
    assert_close(parallel(x.reshape(4, 2, *x.shape[1:]), kernel), wanted)


@pytest.mark.parametrize("strides", [1, 2])
def test_module_matches_flax(strides, rng):
    x = arrays()[0]
    ours, theirs = Conv(7, strides=strides), nn.Conv(7, (3, 3), strides, padding=1)
    params = jax.tree.map(lambda p: p + 0.5, ours.init(rng, x)["params"])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs.init(rng, x)["params"])
    assert_close(ours.apply({"params": params}, x), theirs.apply({"params": params}, x))
    low = Conv(7, dtype=jnp.bfloat16)
    assert low.apply({"params": params}, x).dtype == jnp.bfloat16
    assert jax.tree.map(lambda p: p.dtype, low.init(rng, x)["params"]) == {"kernel": jnp.float32, "bias": jnp.float32}
