"""A small classifier of digits, the feature network of the data that need no download.

It is trained on the data's own digits, of 8x8 or 28x28 pixels: three convolutions, 64 features, ten logits. It never sees the
T-shirt, which is not a class. Compare its FID only with FIDs of a network with the same digest, which results quote.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from retrack_jax.checks import UserError, check
from retrack_jax.files import read_npz, write_npz
from retrack_jax.metrics.arrays import pixel_images
from retrack_jax.metrics.features.network import FeatureNetwork, params_digest, unit_grey
from retrack_jax.notation import Array

NAME = "digit-net"
SIDES = (8, 28)  # of the images in pixels: multiples of the network's stride, 4
NUM_CLASSES = 10
_STRIDE, _LAST = 4, 32  # of all convolutions together; channels of the last
_BATCH, _RATE = 128, 5e-3  # of training


class DigitNet(nn.Module):
    """Images `[B, S, S, 1]` in [0, 1], S of `SIDES`, -> `{"features": [B, 64], "logits": [B, 10]}`."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        x = 2.0 * x - 1.0
        for features, strides in ((16, 1), (32, 2), (_LAST, 2)):
            x = nn.relu(nn.Conv(features, (3, 3), strides=strides)(x))
        features = nn.relu(nn.Dense(64, name="features")(x.reshape(len(x), -1)))
        return {"features": features, "logits": nn.Dense(NUM_CLASSES, name="logits")(features)}


def train_digit_net(images, labels, seed: int = 0, *, num_epochs: int = 60) -> FeatureNetwork:
    """Returns a `DigitNet` trained on labeled digits, as a `FeatureNetwork`; the same seed gives the same network.

    Training is by Adam with a cosine rate; images are shifted by up to one pixel. `seed` decides the initial weights, the order
    of the images and their shifts.

    Args:
      images: uint8 `[N, S, S, 1]` with S of `SIDES`, digits only.
      labels: int `[N]` in [0, 10).

    Raises:
      UserError: other shapes, or a label outside [0, 10).
    """
    images = pixel_images("digits", images)
    labels = np.asarray(labels, np.int32)
    side = images.shape[1]
    expected = " or ".join(f"({known}, {known}, 1)" for known in SIDES)
    check(side in SIDES and images.shape[2:] == (side, 1), f"digits are {images.shape[1:]}; expected {expected}")
    check(labels.shape == (len(images),), f"{len(images)} digits need as many labels, found shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise UserError(f"labels lie in [{labels.min()}, {labels.max()}]; digits are 0 to 9, and other images are not a class")
    batch_size = min(_BATCH, len(images))
    steps_per_epoch = len(images) // batch_size
    module = DigitNet()
    init_rng, _ = jax.random.split(jax.random.key(seed))
    params = jax.jit(module.init)(init_rng, jnp.zeros((1, side, side, 1)))["params"]
    optimizer = optax.scale_by_adam()
    opt_state = jax.jit(optimizer.init)(params)

    def loss_fn(params, x, y):
        logits = module.apply({"params": params}, x)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, opt_state, x, y, rate):
        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, x, y), opt_state, params)
        return jax.tree.map(lambda p, update: p - rate * update, params, updates), opt_state

    # A Python loop: on CPU, the gradient of a convolution is many times slower inside lax.scan.
    order = np.random.default_rng(seed)
    padded = np.pad(images.astype(np.float32) / np.float32(255.0), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rates = iter(_RATE * 0.5 * (1 + np.cos(np.pi * np.linspace(0, 1, num_epochs * steps_per_epoch))))
    for _ in range(num_epochs):
        rows = order.permutation(len(images))[: steps_per_epoch * batch_size].reshape(steps_per_epoch, batch_size)
        shifts = order.integers(0, 3, (steps_per_epoch, 2))
        for row, (up, left) in zip(rows, shifts, strict=True):
            x = padded[row, up : up + side, left : left + side]
            with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 power.
                params, opt_state = step(params, opt_state, x, labels[row], np.float32(next(rates)))
    return digit_network(jax.device_get(params))


def digit_network(params) -> FeatureNetwork:
    """Returns the `FeatureNetwork` of a `DigitNet` with these parameters."""
    module = DigitNet()
    side = _STRIDE * math.isqrt(len(params["features"]["kernel"]) // _LAST)
    return FeatureNetwork(
        name=NAME,
        digest=params_digest(params),
        resize="none",
        params=params,
        apply_fn=lambda params, x: module.apply({"params": params}, x),
        prepare=unit_grey(side),
        batch_size=256,
        num_labels=NUM_CLASSES,
    )


def save_digit_net(path, network: FeatureNetwork) -> None:
    """Writes the network's parameters and digest to an `.npz`, whole or not at all."""
    flat = traverse_util.flatten_dict(network.params, sep="/")
    write_npz(path, digest=np.array(network.digest), **flat)


def load_digit_net(path) -> FeatureNetwork:
    """Returns the network saved at `path`.

    Raises:
      UserError: no such file, a damaged file, or parameters that do not have the digest they were saved with.
    """
    flat = read_npz(path, advice="delete it, and it is trained again")
    digest = str(flat.pop("digest", ""))
    params = traverse_util.unflatten_dict(flat, sep="/")
    check(
        params_digest(params) == digest, f"{path} does not have the digest it was saved with; delete it, and it is trained again"
    )
    return digit_network(params)
