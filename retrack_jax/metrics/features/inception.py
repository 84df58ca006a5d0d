"""Inception v3 as FID has it: torch-fidelity's port of TensorFlow's `inception-2015-12-05`, 1,008 classes.

It differs from torchvision's Inception v3: average pools do not count their padding, the last block's pool is a maximum (an
accident of the TensorFlow graph that every published FID contains), there is no auxiliary head, and pixels enter as (x - 128) /
128.

Weights: `weights-inception-2015-12-05-6726825d.pth` (or its copy `pt_inception-2015-12-05-6726825d.pth`), read by
`weights.torch_reader`. Submodules carry the names of that file.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.metrics.arrays import pixel_images
from retrack_jax.metrics.features.layers import BatchNorm, avg_pool, conv, max_pool
from retrack_jax.metrics.features.network import FeatureNetwork, to_rgb
from retrack_jax.metrics.features.resize import resize_matrix
from retrack_jax.notation import Array
from retrack_jax.weights.names import RenameTable, from_torch, param_shapes

NAME = "inception-v3-fid"
FILE = "weights-inception-2015-12-05-6726825d.pth"
SIDE = 299
TABLE = RenameTable(canonical=str)


class ConvBlock(nn.Module):
    """Convolution, batch normalization, ReLU."""

    features: int
    size: int | tuple[int, int] = 1
    strides: int = 1
    padding: int | tuple[int, int] = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.features, self.size, self.strides, self.padding, name="conv")(x)
        return nn.relu(BatchNorm(1e-3, name="bn")(x))


class InceptionA(nn.Module):
    """35 x 35: branches of 1 x 1, 5 x 5, two 3 x 3, and an average pool."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b1 = ConvBlock(64, name="branch1x1")(x)
        b5 = ConvBlock(64, 5, padding=2, name="branch5x5_2")(ConvBlock(48, name="branch5x5_1")(x))
        b3 = ConvBlock(96, 3, padding=1, name="branch3x3dbl_2")(ConvBlock(64, name="branch3x3dbl_1")(x))
        b3 = ConvBlock(96, 3, padding=1, name="branch3x3dbl_3")(b3)
        pool = ConvBlock(self.pool_features, name="branch_pool")(avg_pool(x))
        return jnp.concatenate([b1, b5, b3, pool], axis=-1)


class InceptionB(nn.Module):
    """35 x 35 to 17 x 17."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b3 = ConvBlock(384, 3, 2, name="branch3x3")(x)
        double = ConvBlock(96, 3, padding=1, name="branch3x3dbl_2")(ConvBlock(64, name="branch3x3dbl_1")(x))
        double = ConvBlock(96, 3, 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([b3, double, max_pool(x, 2)], axis=-1)


class InceptionC(nn.Module):
    """17 x 17: branches of 7 x 7 split into 1 x 7 and 7 x 1."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        row, column = {"size": (1, 7), "padding": (0, 3)}, {"size": (7, 1), "padding": (3, 0)}
        b1 = ConvBlock(192, name="branch1x1")(x)
        b7 = ConvBlock(self.width, name="branch7x7_1")(x)
        b7 = ConvBlock(self.width, **row, name="branch7x7_2")(b7)
        b7 = ConvBlock(192, **column, name="branch7x7_3")(b7)
        double = ConvBlock(self.width, name="branch7x7dbl_1")(x)
        double = ConvBlock(self.width, **column, name="branch7x7dbl_2")(double)
        double = ConvBlock(self.width, **row, name="branch7x7dbl_3")(double)
        double = ConvBlock(self.width, **column, name="branch7x7dbl_4")(double)
        double = ConvBlock(192, **row, name="branch7x7dbl_5")(double)
        pool = ConvBlock(192, name="branch_pool")(avg_pool(x))
        return jnp.concatenate([b1, b7, double, pool], axis=-1)


class InceptionD(nn.Module):
    """17 x 17 to 8 x 8."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b3 = ConvBlock(320, 3, 2, name="branch3x3_2")(ConvBlock(192, name="branch3x3_1")(x))
        b7 = ConvBlock(192, name="branch7x7x3_1")(x)
        b7 = ConvBlock(192, (1, 7), padding=(0, 3), name="branch7x7x3_2")(b7)
        b7 = ConvBlock(192, (7, 1), padding=(3, 0), name="branch7x7x3_3")(b7)
        b7 = ConvBlock(192, 3, 2, name="branch7x7x3_4")(b7)
        return jnp.concatenate([b3, b7, max_pool(x, 2)], axis=-1)


class InceptionE(nn.Module):
    """8 x 8; `max_pool` decides the pool before the last branch: an average in the first such block, a maximum in the second."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        row, column = {"size": (1, 3), "padding": (0, 1)}, {"size": (3, 1), "padding": (1, 0)}
        b1 = ConvBlock(320, name="branch1x1")(x)
        b3 = ConvBlock(384, name="branch3x3_1")(x)
        b3 = [ConvBlock(384, **row, name="branch3x3_2a")(b3), ConvBlock(384, **column, name="branch3x3_2b")(b3)]
        double = ConvBlock(384, 3, padding=1, name="branch3x3dbl_2")(ConvBlock(448, name="branch3x3dbl_1")(x))
        double = [ConvBlock(384, **row, name="branch3x3dbl_3a")(double), ConvBlock(384, **column, name="branch3x3dbl_3b")(double)]
        pooled = max_pool(x, 1, 1) if self.max_pool else avg_pool(x)
        return jnp.concatenate([b1, *b3, *double, ConvBlock(192, name="branch_pool")(pooled)], axis=-1)


class Classifier(nn.Module):
    """`x @ kernel`: the logits without their bias, which the inception score uses. The bias is imported and left out."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1008))
        self.param("bias", nn.initializers.zeros_init(), (1008,))
        return x @ kernel


class InceptionV3(nn.Module):
    """Images `[B, 299, 299, 3]` in [0, 255] -> pool3 `features` `[B, 2048]` and `logits` `[B, 1008]` without bias."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        x = (x - 128.0) / 128.0
        x = ConvBlock(32, 3, 2, name="Conv2d_1a_3x3")(x)
        x = ConvBlock(32, 3, name="Conv2d_2a_3x3")(x)
        x = ConvBlock(64, 3, padding=1, name="Conv2d_2b_3x3")(x)
        x = ConvBlock(80, name="Conv2d_3b_1x1")(max_pool(x, 2))
        x = ConvBlock(192, 3, name="Conv2d_4a_3x3")(x)
        x = max_pool(x, 2)
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = InceptionA(pool_features, name=name)(x)
        x = InceptionB(name="Mixed_6a")(x)
        for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            x = InceptionC(width, name=name)(x)
        x = InceptionD(name="Mixed_7a")(x)
        x = InceptionE(False, name="Mixed_7b")(x)
        x = InceptionE(True, name="Mixed_7c")(x)
        features = x.mean(axis=(1, 2))
        return {"features": features, "logits": Classifier(name="fc")(features)}


def inception_shapes():
    """Returns the shapes of the network's parameters."""
    return param_shapes(InceptionV3(), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))


def inception_network(
    state: Mapping[str, np.ndarray], digest: str, *, resize: str = "torchmetrics", batch_size: int = 32
) -> FeatureNetwork:
    """Returns the FID network of these weights; it takes images of any size, grey or RGB.

    Args:
      state: the weights by name, such as a `TorchFile`.
      digest: SHA-256 of the file.
      resize: `torchmetrics` (what the official code gives today) or `tf1` (torch-fidelity, TensorFlow): see `resize`.
      batch_size: images per call.

    Raises:
      UserError: the weights are not this network's.
    """
    module = InceptionV3()
    params = from_torch(state, inception_shapes(), table=TABLE, network=f"FID's Inception v3 ({FILE})")

    def apply_fn(params, x_BHWC):
        rows, columns = (jnp.asarray(resize_matrix(resize, size, SIDE)) for size in x_BHWC.shape[1:3])
        x_BHWC = x_BHWC.astype(jnp.float32)
        precise = jax.lax.Precision.HIGHEST  # Accelerators would otherwise round pixels to bfloat16 here.
        x_BHWC = jnp.einsum("ih,bhwc->biwc", rows, x_BHWC, precision=precise)
        x_BHWC = jnp.einsum("jw,biwc->bijc", columns, x_BHWC, precision=precise)
        return module.apply({"params": params}, x_BHWC)

    def prepare(images):
        return to_rgb(pixel_images("images", images))

    return FeatureNetwork(NAME, digest, resize, params, apply_fn, prepare, batch_size)
