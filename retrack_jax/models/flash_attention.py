"""Attention, by a flash kernel where the platform has one that pays, and by XLA everywhere else.

    (1)  o = softmax(q k^T / sqrt(D)) v,  for each head of width D; the softmax in float32

XLA stores the matrix of (1), float32 [B, heads, N, M] for N queries and M keys: 1 GiB for two images of 4096 tokens and 8 heads.
A flash kernel computes it block by block and stores none of it. It sums in another order, so its results differ by rounding in
the dtype of q. That is why float32, in which results must match those of other libraries, stays with XLA; on a CPU in the form
of models/cpu/attention.py.

The platform is chosen at lowering (`lax.platform_dependent`). The kernels differentiate in reverse mode only, and the likelihood
needs forward mode. So the tangent of (1) is a primitive of this module: XLA computes it, and its transpose, which is the
gradient, is the kernel's. The gradient computes (1) once more, because the tangent is given q, k and v alone.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from retrack_jax.checks import check_choice
from retrack_jax.models.cpu import attention as cpu
from retrack_jax.notation import Array

log = logging.getLogger(__name__)

_MOST_WIDE = 128  # channels per head: what cuDNN takes on all GPUs since Ampere, and the width of a TPU's registers
_CUDNN_FROM, _PALLAS_FROM = 1024, 4096  # queries and keys
_CPU_FROM = 64  # keys; with fewer the CPU's own form gains nothing
_BLOCK = 512  # of queries and of keys, in the TPU's kernel
_SWITCH = "RETRACK_ATTENTION"  # environment variable: auto, or xla for jax's own form everywhere


def attention_implementation(platform: str, dtype: jnp.dtype, head_width: int, queries: int, keys: int) -> str:
    """Returns which implementation equation (1) takes: `xla`, `cudnn`, `pallas` or `cpu`.

    Args:
      platform: what the program is lowered for: `cpu`, `cuda`, `rocm` or `tpu`.
      dtype: of q, k and v.
      head_width: channels per head.
      queries, keys: how many tokens attend, and to how many.
    """
    shortest = min(queries, keys)
    if platform == "cpu":
        return "cpu" if dtype == jnp.float32 and keys >= _CPU_FROM else "xla"
    if head_width > _MOST_WIDE or head_width % 8:
        return "xla"
    if platform == "cuda" and dtype in (jnp.bfloat16, jnp.float16) and shortest >= _CUDNN_FROM:
        return "cudnn"
    if platform == "tpu" and dtype == jnp.bfloat16 and shortest >= _PALLAS_FROM and not (queries % _BLOCK or keys % _BLOCK):
        return "pallas"
    return "xla"


def attend(query: Array, key: Array, value: Array) -> Array:
    """Returns equation (1) for `query` `[B, N, heads, D]`, `key` and `value` `[B, M, heads, D]`, all of one dtype."""
    return _by_kernel(query, key, value) if _kernels(query, key) else _by_xla(query, key, value)


def _by_xla(query: Array, key: Array, value: Array) -> Array:
    if _switch() == "auto" and attention_implementation("cpu", *_shape(query, key)) == "cpu":
        return lax.platform_dependent(query, key, value, cpu=cpu.attend, default=_by_jax)
    return _by_jax(query, key, value)


def _by_jax(query: Array, key: Array, value: Array) -> Array:
    # JAX's function promotes bfloat16 logits to float32 implicitly, which strict promotion refuses, in the gradient too.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value)


def _by_cudnn(query: Array, key: Array, value: Array) -> Array:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _by_pallas(query: Array, key: Array, value: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    names = ("q", "k_major", "k", "q_major_dkv", "k_major_dkv", "k_dkv", "q_dkv", "k_major_dq", "k_dq", "q_dq")
    blocks = BlockSizes(block_b=1, **{f"block_{name}": _BLOCK for name in names})
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    return jnp.swapaxes(flash_attention(query, key, value, sm_scale=query.shape[-1] ** -0.5, block_sizes=blocks), 1, 2)


def _kernels(query: Array, key: Array) -> dict[str, Callable]:
    """Returns for each platform that has one the kernel to take for arrays like these."""
    if _switch() == "xla":
        return {}
    kernels = {}
    if attention_implementation("cuda", *_shape(query, key)) == "cudnn" and _cudnn_takes(query, key):
        kernels["cuda"] = _by_cudnn
    if attention_implementation("tpu", *_shape(query, key)) == "pallas":
        kernels["tpu"] = _by_pallas
    return kernels


def _switch() -> str:
    switch = os.environ.get(_SWITCH, "auto")
    check_choice(_SWITCH, switch, ("auto", "xla"))
    return switch


def _shape(query: Array, key: Array) -> tuple[jnp.dtype, int, int, int]:
    """Returns what the choice of an implementation depends on, but the platform."""
    return query.dtype, query.shape[-1], query.shape[1], key.shape[1]


def _cudnn_takes(query: Array, key: Array) -> bool:
    """Whether jax, which knows cuDNN's version and limits, traces its kernel for arrays like these on this machine."""
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    try:
        jax.eval_shape(_by_cudnn, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (query, key, key)))
        reason = "" if all(float(gpu.compute_capability) >= 8.0 for gpu in gpus) else "the GPU is older than Ampere"
    except (RuntimeError, NotImplementedError, ValueError) as error:  # no cuDNN; a version or a shape that does not fit
        reason = str(error)
    if gpus:
        _say(f"attention of {query.shape[1]} tokens is computed by " + (f"XLA: {reason}" if reason else "cuDNN"))
    return not reason


@lru_cache
def _say(message: str) -> None:
    log.info(message)


def _on_platform(compute: Callable, query: Array, key: Array, *more: Array):
    """Returns `compute(attention, query, key, *more)` with the `attention(query, key, value)` of the platform."""
    kernels = {platform: partial(compute, kernel) for platform, kernel in _kernels(query, key).items()}
    return lax.platform_dependent(query, key, *more, default=partial(compute, _by_xla), **kernels)


@jax.custom_jvp
def _by_kernel(query: Array, key: Array, value: Array) -> Array:
    return _on_platform(lambda attention, *qkv: attention(*qkv), query, key, value)


@_by_kernel.defjvp
def _jvp(primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    return _by_kernel(*primals), _tangent_p.bind(*primals, *tangents)


def _tangent(*primals_and_tangents: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return jax.jvp(_by_xla, primals_and_tangents[:3], primals_and_tangents[3:])[1]


def _gradient(attention: Callable, query: Array, key: Array, value: Array, cotangent: Array) -> tuple[Array, ...]:
    with jax.numpy_dtype_promotion("standard"):
        return jax.vjp(attention, query, key, value)[1](cotangent)


# (q, k, v, dq, dk, dv) -> do, linear in the last three.
_tangent_p = Primitive("retrack_attention_tangent")
_tangent_p.def_impl(jax.jit(_tangent_p.bind))
_tangent_p.def_abstract_eval(lambda query, *_: jax.core.ShapedArray(query.shape, query.dtype))
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=False))
ad.primitive_jvps[_tangent_p] = lambda primals, tangents: jax.jvp(_tangent, primals, [*map(ad.instantiate_zeros, tangents)])


def _transpose(cotangent: Array, *arrays: Array | ad.UndefinedPrimal) -> list[Array | None]:
    gradients = _on_platform(_gradient, *arrays[:3], cotangent)
    wanted = [ad.is_undefined_primal(tangent) for tangent in arrays[3:]]
    return [None] * 3 + [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def _batch(arrays: Sequence[Array], axes: Sequence[int | None]) -> tuple[Array, int]:
    """Makes the new axis part of B."""
    size = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)

    def merged(array: Array, axis: int | None) -> Array:
        whole = jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
        return whole.reshape(-1, *whole.shape[2:])

    result = _tangent_p.bind(*map(merged, arrays, axes))
    return result.reshape(size, -1, *result.shape[1:]), 0


ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
