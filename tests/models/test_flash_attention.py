"""Which implementation attention takes, and that all of them compute the same: value, gradient, tangent, and under vmap."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas import tpu as pltpu

from retrack_jax.checks import UserError
from retrack_jax.models import flash_attention
from retrack_jax.models.flash_attention import attend, attention_implementation
from tests.lowering import custom_calls, lowering_for

BF16, F16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"


@pytest.fixture(autouse=True)
def implicit_promotion():
    """Attention in bfloat16 needs it, when a gradient is lowered too."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """jax refuses to trace cuDNN's attention before it knows a version."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)


@pytest.mark.parametrize(
    ("platform", "dtype", "head_width", "queries", "keys", "expected"),
    [
        ("cuda", BF16, 40, 4096, 4096, "cudnn"),  # Stable Diffusion 1.4, the first of its levels
        ("cuda", F16, 80, 1024, 1024, "cudnn"),  # the second
        ("cuda", BF16, 160, 256, 256, "xla"),  # the third: too wide, too short
        ("cuda", BF16, 160, 1024, 1024, "xla"),  # and so with images of twice the side
        ("cuda", BF16, 40, 4096, 77, "xla"),  # to a prompt
        ("cuda", BF16, 64, 4096, 1024, "cudnn"),
        ("cuda", BF16, 64, 1023, 4096, "xla"),
        ("cuda", BF16, 36, 4096, 4096, "xla"),  # no multiple of 8
        ("cuda", BF16, 512, 4096, 4096, "xla"),  # google/ddpm's one head; the VAE's
        ("cuda", F32, 64, 4096, 4096, "xla"),
        ("rocm", BF16, 64, 4096, 4096, "xla"),
        ("cpu", BF16, 64, 4096, 4096, "xla"),
        ("cpu", F32, 8, 196, 196, "cpu"),  # MNIST's
        ("cpu", F32, 512, 256, 256, "cpu"),  # google/ddpm's one head
        ("cpu", F32, 40, 4096, 77, "cpu"),
        ("cpu", F32, 8, 4096, 63, "xla"),
        ("rocm", F32, 8, 196, 196, "xla"),
        ("tpu", BF16, 40, 4096, 4096, "pallas"),
        ("tpu", BF16, 64, 9216, 9216, "pallas"),  # Stable Diffusion 2.1 at 768 pixels
        ("tpu", BF16, 80, 1024, 1024, "xla"),
        ("tpu", BF16, 64, 4160, 4160, "xla"),  # no whole blocks
        ("tpu", F16, 64, 4096, 4096, "xla"),
        ("tpu", F32, 64, 4096, 4096, "xla"),
        ("tpu", BF16, 256, 4096, 4096, "xla"),
    ],
)
def test_the_choice(platform, dtype, head_width, queries, keys, expected):
    assert attention_implementation(platform, dtype, head_width, queries, keys) == expected


def arrays(count, tokens=1024, dtype=jnp.bfloat16):
    return [jax.random.normal(key, (2, tokens, 2, 8), dtype) for key in jax.random.split(jax.random.key(0), count)]


def gradient(attention, q, k, v, cotangent):
    return jax.vjp(attention, q, k, v)[1](cotangent)


def tangent(attention, q, k, v, *tangents):
    return jax.jvp(attention, (q, k, v), tangents)


def equal(one, other) -> bool:
    return all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_on_this_machine_all_is_as_without_it(cudnn_is_there):
    """To the bit, although these arrays take the way of the kernels, in both modes of differentiation."""
    for of, inputs in ((lambda attention, *qkv: attention(*qkv), arrays(3)), (gradient, arrays(4)), (tangent, arrays(6))):
        with_kernels, without = (jax.jit(of, static_argnums=0)(one, *inputs) for one in (attend, flash_attention._by_xla))
        assert equal(with_kernels, without)


def test_under_vmap(cudnn_is_there):
    """As networks with dropout and the likelihood take one example at a time. A gradient and a tangent batch other operations."""
    q, k, v, *tangents = arrays(6)
    batched = jax.vmap(lambda *qkv: attend(*(one[None] for one in qkv))[0])
    for of, inputs in ((gradient, arrays(4)), (tangent, (q, k, v, *tangents))):
        found, expected = (jax.jit(of, static_argnums=0)(one, *inputs) for one in (batched, flash_attention._by_xla))
        for a, b in zip(found, expected, strict=True):
            assert jnp.linalg.norm((a - b).astype(jnp.float32)) < 0.01 * jnp.linalg.norm(b.astype(jnp.float32))


def test_float32_traces_to_the_same_program(cudnn_is_there):
    inputs = arrays(3, dtype=jnp.float32)
    assert str(jax.make_jaxpr(attend)(*inputs)) == str(jax.make_jaxpr(flash_attention._by_xla)(*inputs))


@pytest.mark.parametrize(
    ("queries", "keys", "width", "scale", "bound"), [(196, 196, 8, 1, 1e-6), (70, 77, 40, 1, 1e-6), (64, 64, 16, 30, 1e-4)]
)
def test_the_form_of_cpus_computes_attention(queries, keys, width, scale, bound):
    """Value, tangent and gradient. With a scale, exp overflows unless something is subtracted from the logits; these, 1,000 times
    as large, are less exact in both forms.
    """
    rngs = jax.random.split(jax.random.key(0), 7)
    sizes = queries, keys, keys, queries, keys, keys, queries
    q, k, v, *tangents, cotangent = (jax.random.normal(rng, (2, size, 3, width)) for rng, size in zip(rngs, sizes, strict=True))
    q, k = scale * q, scale * k

    def both(attention):
        return jax.jit(lambda *qkv: (*tangent(attention, *qkv, *tangents), *gradient(attention, *qkv, cotangent)))(q, k, v)

    for found, expected in zip(both(attend), both(flash_attention._by_jax), strict=True):
        assert jnp.linalg.norm(found - expected) < bound * jnp.linalg.norm(expected)
    assert not equal(both(attend), both(flash_attention._by_jax))  # it is another program


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_form_of_cpus_stands_in_no_other_program(platform):
    """The choice adds to the text what a compiler removes, but no operation of attention."""

    def operations(attention):
        shape = jax.ShapeDtypeStruct((2, 196, 8, 8), jnp.float32)
        program = jax.jit(lambda *arrays: gradient(attention, *arrays)).trace(*[shape] * 4).lower().as_text()
        lines = re.findall(r"stablehlo\.(?:dot_general|exponential|divide|multiply|reduce\b).*", program)
        return sorted(re.sub(r"%\w+(#\d+)?", "", line) for line in lines)

    with lowering_for(platform):
        found = operations(attend)
        assert found == operations(flash_attention._by_jax) and len(found) > 10


def text(of, count, tokens=4096) -> str:
    shape = jax.ShapeDtypeStruct((2, tokens, 2, 64), jnp.bfloat16)
    return jax.jit(lambda *arrays: of(*arrays)).trace(*[shape] * count).lower().as_text()  # a new function, traced anew


@pytest.mark.parametrize(
    ("platform", "forward", "backward"), [("cuda", {FORWARD}, {BACKWARD}), ("tpu", {"tpu_custom_call"}, set())]
)
def test_the_kernels_stand_in_the_program_and_no_matrix_of_logits(cudnn_is_there, platform, forward, backward):
    with lowering_for(platform):
        value = text(attend, 3)
        both = text(lambda *arrays: gradient(jax.checkpoint(attend), *arrays), 4)
        mapped = text(lambda *qkv: jax.vmap(lambda *one: attend(*(each[None] for each in one))[0])(*qkv), 3)
    assert custom_calls(value) == custom_calls(mapped) == forward and custom_calls(both) == forward | backward
    assert "4096x4096" not in value + both + mapped


def test_a_tangent_is_computed_by_xla(cudnn_is_there):
    with lowering_for("cuda"):
        found = text(lambda *arrays: tangent(attend, *arrays), 6, tokens=1024)
    assert custom_calls(found) == {FORWARD} and "1024x1024" in found


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_switch(cudnn_is_there, monkeypatch, platform):
    monkeypatch.setenv("RETRACK_ATTENTION", "xla")
    with lowering_for(platform):
        assert not custom_calls(text(attend, 3))
    monkeypatch.setenv("RETRACK_ATTENTION", "flash")
    with pytest.raises(UserError, match="RETRACK_ATTENTION"):
        text(attend, 3)


def test_xla_where_cudnn_cannot(monkeypatch):
    """This machine has no cuDNN; a GPU before Ampere has no flash attention."""
    jax.clear_caches()  # another test may have traced cuDNN's attention
    with lowering_for("cuda"):
        assert not custom_calls(text(attend, 3))
        monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
        for capability, expected in (("7.5", set()), ("8.0", {FORWARD}), ("12.0", {FORWARD})):
            gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
            with monkeypatch.context() as patch:
                patch.setattr(jax, "local_devices", lambda gpu=gpu: [gpu])
                assert custom_calls(text(attend, 3)) == expected


def test_the_kernel_for_tpus_computes_attention():
    """In Pallas' interpreter, in float32 so that only the order of sums differs: two blocks of queries, two of keys."""
    shape = (1, 2 * flash_attention._BLOCK, 1, 16)
    q, k, v, cotangent = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))

    def both(attention):
        return jax.jit(lambda *qkv: (attention(*qkv), *gradient(attention, *qkv, cotangent)))(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        found = jax.block_until_ready(both(flash_attention._by_pallas))
    for a, b in zip(found, both(flash_attention._by_xla), strict=True):
        assert jnp.linalg.norm(a - b) < 1e-5 * jnp.linalg.norm(b)
