"""What the imported feature networks share: frozen batch normalisation, PyTorch's pools, and strict import of PyTorch weights."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from retrack_jax.metrics.features.network import take_weights
from retrack_jax.notation import Array, PyTree


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis.

    Attributes:
      eps: added to the variance.
      batch_statistics: take mean and (biased) variance from the batch, as a PyTorch network left in training mode does.
    """

    eps: float
    batch_statistics: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros, ones, shape = nn.initializers.zeros_init(), nn.initializers.ones_init(), (x.shape[-1],)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("mean", zeros, shape), self.param("var", ones, shape)
        if self.batch_statistics:
            axes = tuple(range(x.ndim - 1))
            mean, var = jnp.mean(x, axes), jnp.var(x, axes)
        factor = scale * lax.rsqrt(var + self.eps)
        factor, offset = (jnp.broadcast_to(one, x.shape) for one in (factor, bias - mean * factor))
        return x * factor + offset


def conv(
    features: int, size: int | tuple[int, int], strides: int = 1, padding: int | tuple[int, int] = 0, name: str | None = None
):
    """Returns a convolution without bias, with PyTorch's symmetric padding."""
    size, padding = ((value, value) if isinstance(value, int) else value for value in (size, padding))
    pads = tuple((pad, pad) for pad in padding)
    return nn.Conv(features, size, strides=strides, padding=pads, use_bias=False, name=name)


def max_pool(x: Array, size: int, strides: int, padding: int = 0) -> Array:
    """Returns the maximum over windows; the padding never wins."""
    return nn.max_pool(x, (size, size), (strides, strides), ((padding, padding),) * 2)


def avg_pool_3x3(x: Array) -> Array:
    """Returns 3 x 3 averages at stride 1 that leave the padding out of the count, as TensorFlow's do."""
    window, pads = (1, 3, 3, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    total = lax.reduce_window(x, jnp.zeros((), x.dtype), lax.add, window, (1, 1, 1, 1), pads)
    count = lax.reduce_window(
        jnp.ones((1, *x.shape[1:3], 1), x.dtype), jnp.zeros((), x.dtype), lax.add, window, (1, 1, 1, 1), pads
    )
    return total / jnp.broadcast_to(count, total.shape)


def import_weights(
    network: str, module: nn.Module, input_shape: tuple[int, ...], state: Mapping[str, np.ndarray], rename: Callable[[str], str]
) -> PyTree:
    """Returns the module's parameters from a PyTorch state dict, float32, after checking every name and shape.

    Args:
      network: what errors call it.
      module: the Linen module; its submodules are named as PyTorch's, up to `rename`.
      input_shape: an input that it takes, for its shapes.
      state: name -> array, as `read_torch` or `read_torchscript` returns it.
      rename: from the dotted path of one of our modules to PyTorch's.

    Raises:
      UserError: names or shapes that are not this network's, or NaN.
    """
    arrays = take_weights(network, state, torch_shapes(module, input_shape, rename))
    paths = traverse_util.flatten_dict(_param_shapes(module, input_shape))
    return traverse_util.unflatten_dict({path: _to_flax(path, arrays[torch_name(path, rename)]) for path in paths})


def torch_shapes(module: nn.Module, input_shape: tuple[int, ...], rename: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Returns PyTorch's name and shape of each parameter of `module`, the names and shapes that `import_weights` demands."""
    flat = traverse_util.flatten_dict(_param_shapes(module, input_shape))
    return {torch_name(path, rename): _torch_shape(path, leaf.shape) for path, leaf in flat.items()}


def _param_shapes(module: nn.Module, input_shape: tuple[int, ...]) -> PyTree:
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(input_shape, jnp.float32))["params"]


def torch_name(path: tuple[str, ...], rename: Callable[[str], str]) -> str:
    """Returns the PyTorch name of the parameter at `path` of a Linen tree."""
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(path[-1], path[-1])
    return f"{rename('.'.join(path[:-1]))}.{leaf}"


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return shape
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else (shape[1], shape[0])


def _to_flax(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, np.float32)
    if path[-1] != "kernel":
        return array
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T)
