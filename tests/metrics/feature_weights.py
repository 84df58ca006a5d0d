"""Weights of the feature networks from a seed, by NumPy alone: the same with and without PyTorch, and nothing to commit."""

import zlib

import numpy as np

from retrack_jax.metrics.features import inception, resnet
from retrack_jax.weights.names import torch_shapes


def inception_shapes():
    return torch_shapes(inception.inception_shapes(), inception.TABLE)


def sscd_shapes():
    return torch_shapes(resnet.sscd_shapes(), resnet.SSCD_TABLE)


def mnist_shapes():
    return torch_shapes(resnet.mnist_shapes(), resnet.MNIST_TABLE)


def random_state(shapes, seed=0):
    """Returns a state dict of these names and shapes whose activations neither die nor explode."""
    state = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("weight") and len(shape) > 1:
            value = rng.normal(size=shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif name.endswith("weight"):  # of a normalisation: small where a residual branch ends, so that 16 blocks do not add up
            value = rng.uniform(0.9, 1.1, shape) * (0.3 if ".bn3." in name or ".layer" in name and ".bn2." in name else 1.0)
        else:
            value = rng.normal(size=shape) * 0.1
        state[name] = value.astype(np.float32)
    return state


def random_images(count, side, channels=3, seed=0):
    """Returns uint8 images of blurred noise, so that resizing rules matter less than in white noise but still differ."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, max(side // 4, 2), max(side // 4, 2), channels))
    fine = np.random.default_rng(seed + 1).uniform(-40, 40, (count, side, side, channels))
    repeats = -(-side // coarse.shape[1])
    upsampled = np.repeat(np.repeat(coarse, repeats, axis=1), repeats, axis=2)[:, :side, :side]
    return np.clip(upsampled + fine, 0, 255).astype(np.uint8)
