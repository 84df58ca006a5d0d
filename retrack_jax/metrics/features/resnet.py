"""ResNets with torchvision's structure and names: SSCD's ResNet-50 and the MNIST classifier's ResNet-18.

SSCD (Pizzi et al. 2022), `sscd_disc_mixup`: ResNet-50, generalized-mean pooling with p = 3, a linear layer to 512, unit
length.
    (1)  GeM(x)_c = ( mean_hw max(x_hwc, 1e-6)^3 )^(1/3)
MNIST: ResNet-18 for one channel, whose last map of a 28 x 28 image is 1 x 1 and goes to the linear layer without pooling.
"""

import functools
import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.metrics.arrays import pixel_images
from retrack_jax.metrics.features.layers import BatchNorm, conv, max_pool
from retrack_jax.metrics.features.network import FeatureNetwork, to_rgb, unit_grey
from retrack_jax.metrics.features.resize import pil_shorter_side
from retrack_jax.notation import Array
from retrack_jax.weights.names import RenameTable, from_torch, param_shapes

SSCD_NAME = "sscd_disc_mixup"
SSCD_SIDE = 288
MNIST_NAME = "mnist-resnet18"
NUM_DIGITS = 10
_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


class Block(nn.Module):
    """A residual block: 3 x 3, 3 x 3; or, as a bottleneck, 1 x 1, 3 x 3, 1 x 1 to four times the width."""

    width: int
    strides: int
    bottleneck: bool
    batch_statistics: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = functools.partial(BatchNorm, 1e-5, self.batch_statistics)
        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            h = nn.relu(norm(name="bn1")(conv(self.width, 1, name="conv1")(x)))
            h = nn.relu(norm(name="bn2")(conv(self.width, 3, self.strides, 1, name="conv2")(h)))
            h = norm(name="bn3")(conv(out, 1, name="conv3")(h))
        else:
            h = nn.relu(norm(name="bn1")(conv(out, 3, self.strides, 1, name="conv1")(x)))
            h = norm(name="bn2")(conv(out, 3, 1, 1, name="conv2")(h))
        if self.strides > 1 or x.shape[-1] != out:
            x = norm(name="downsample_1")(conv(out, 1, self.strides, name="downsample_0")(x))
        return nn.relu(h + x)


class ResNetTrunk(nn.Module):
    """Images to the last map: a 7 x 7 stem, a pool, four stages."""

    stage_sizes: tuple[int, ...]
    bottleneck: bool
    batch_statistics: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(64, 7, 2, 3, name="conv1")(x)
        x = max_pool(nn.relu(BatchNorm(1e-5, self.batch_statistics, name="bn1")(x)), 2, 1)
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                x = Block(64 * 2**stage, strides, self.bottleneck, self.batch_statistics, name=f"layer{stage + 1}_{index}")(x)
        return x


class SscdNet(nn.Module):
    """Normalized images `[B, H, W, 3]` -> `{"features": [B, 512]}` of unit length."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        x = ResNetTrunk((3, 4, 6, 3), True, name="trunk")(x)
        pooled = jnp.cbrt(jnp.mean(jnp.maximum(x, 1e-6) ** 3, axis=(1, 2)))
        embedding = nn.Dense(512, name="fc")(pooled)
        length = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
        return {"features": embedding / jnp.broadcast_to(jnp.maximum(length, 1e-12), embedding.shape)}


class MnistResNet(nn.Module):
    """Images `[B, 28, 28, 1]` in [0, 1] -> `{"features": [B, 512], "logits": [B, 10]}`."""

    batch_statistics: bool = False

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        x = ResNetTrunk((2, 2, 2, 2), False, self.batch_statistics, name="trunk")(x)
        features = x.reshape(len(x), -1)
        return {"features": features, "logits": nn.Dense(NUM_DIGITS, name="fc")(features)}


def torchvision_name(name: str) -> str:
    """Returns torchvision's name of a parameter of SSCD from that or from Classy Vision's, in which SSCD was trained."""
    name = name.replace("_module.", "")
    stem = re.fullmatch(r"backbone\.initial_block\.([01])\.(\w+)", name)
    if stem:
        return f"backbone.{('conv1', 'bn1')[int(stem[1])]}.{stem[2]}"
    block = re.fullmatch(r"backbone\.blocks\.(\d)\.(?:block\d-)?(\d+)\.(convolutional_block\.\d|bn|downsample\.\d)\.(\w+)", name)
    if block:
        inside = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3"}
        part = "bn3" if block[3] == "bn" else inside.get(block[3][-1]) if block[3].startswith("conv") else block[3]
        return f"backbone.layer{int(block[1]) + 1}.{block[2]}.{part}.{block[4]}"
    return re.sub(r"^embeddings\.1\.", "backbone.fc.", name)


_LISTS = ("layer1", "layer2", "layer3", "layer4", "downsample")
SSCD_TABLE = RenameTable(lists=_LISTS, modules={"trunk": "backbone", "fc": "backbone.fc"}, canonical=torchvision_name)
MNIST_TABLE = RenameTable(lists=_LISTS, modules={"trunk": ""}, canonical=str)


def sscd_shapes():
    """Returns the shapes of the parameters of SSCD's network."""
    return param_shapes(SscdNet(), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def mnist_shapes():
    """Returns the shapes of the parameters of the MNIST classifier."""
    return param_shapes(MnistResNet(), jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32))


def sscd_network(state: Mapping[str, np.ndarray], digest: str, *, batch_size: int = 4) -> FeatureNetwork:
    """Returns SSCD's network of these weights, with the official transform (Pillow, shorter side to 288, ImageNet mean and std).

    Arguments and errors are those of `inception_network`. Few images per call, because the metric embeds one image or sixteen,
    and a batch is filled up.
    """
    module = SscdNet()
    params = from_torch(state, sscd_shapes(), table=SSCD_TABLE, network="SSCD's ResNet-50 (sscd_disc_mixup)")

    def prepare(images):
        images = to_rgb(pixel_images("images", images))
        resized = np.stack([pil_shorter_side(image, SSCD_SIDE) for image in images])
        return (resized.astype(np.float32) / np.float32(255.0) - _IMAGENET_MEAN) / _IMAGENET_STD

    def apply_fn(params, x):
        return module.apply({"params": params}, x)

    return FeatureNetwork(SSCD_NAME, digest, f"Pillow bilinear, shorter side {SSCD_SIDE}", params, apply_fn, prepare, batch_size)


def mnist_resnet_network(
    state: Mapping[str, np.ndarray], digest: str, *, official: bool = False, batch_size: int = 256
) -> FeatureNetwork:
    """Returns the MNIST classifier behind `inception_score` of these weights; arguments and errors as in `inception_network`.

    With `official` it normalizes by the statistics of each batch, as the official code does by leaving the network in training
    mode. That score (`inception_score_official`) depends on batch size and order; nothing is padded then.
    """
    module = MnistResNet(batch_statistics=official)
    params = from_torch(state, mnist_shapes(), table=MNIST_TABLE, network="the MNIST ResNet-18")

    def apply_fn(params, x):
        return module.apply({"params": params}, x)

    name = f"{MNIST_NAME}-batch-statistics-of-{batch_size}" if official else MNIST_NAME
    return FeatureNetwork(
        name, digest, "none", params, apply_fn, unit_grey(28), batch_size, pad=not official, num_labels=NUM_DIGITS
    )
