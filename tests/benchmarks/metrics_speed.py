"""Seconds for FID, KID, inception score, precision and recall of 10,000 feature rows of 2,048 dimensions.

    python -m tests.benchmarks.metrics_speed [--rows 10000] [--dim 2048]

The reach is 60 seconds in all on two cores. Features are random, with a spectrum that falls as Inception's does. Before, the
seconds of computing them, for 64 images of 32 x 32 by an Inception with random weights on one device.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.metrics.feature_metrics import evaluate_features, stats_of
from retrack_jax.metrics.features.inception import SIDE, TABLE, InceptionV3, inception_network
from retrack_jax.weights.names import to_torch


def inception_seconds() -> float:
    """Returns the seconds of the features of 64 images, once the network is compiled."""
    module, images = InceptionV3(), np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    network = inception_network({tensor.name: tensor.read() for tensor in to_torch(params, table=TABLE)}, "random")
    network(images)
    start = time.perf_counter()
    network(images)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args()
    order = np.random.default_rng(0)
    print(f"features of 64 images   {inception_seconds():6.1f} s")
    mixing = order.normal(size=(args.dim, args.dim)).astype(np.float32) * np.exp(-np.arange(args.dim) / 300).astype(np.float32)
    features, others = (order.normal(size=(args.rows, args.dim)).astype(np.float32) @ mixing for _ in range(2))
    logits = order.normal(size=(args.rows, 1008)).astype(np.float32)

    total = time.perf_counter()
    start = time.perf_counter()
    samples, reference = stats_of(features, logits), stats_of(others)
    print(f"moments of both sets    {time.perf_counter() - start:6.1f} s")
    for wanted in (("fid",), ("kid",), ("inception_score",), ("precision", "recall")):
        start = time.perf_counter()
        values, _ = evaluate_features(samples, reference, wanted)
        shown = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        print(f"{' and '.join(wanted):23} {time.perf_counter() - start:6.1f} s   {shown}")
    print(f"all, {args.rows} x {args.dim}, {os.cpu_count()} cores: {time.perf_counter() - total:.1f} s")


if __name__ == "__main__":
    main()
