"""Seconds for FID, KID, inception score, precision and recall of 10,000 feature rows of 2,048 dimensions.

    python -m tests.benchmarks.metrics_speed [--rows 10000] [--dim 2048]

The reach is 60 seconds in all on two cores. Features are random, with a spectrum that falls as Inception's does.
"""

import argparse
import os
import time

import numpy as np

from retrack_jax.metrics.feature_metrics import evaluate_features, stats_of


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    args = parser.parse_args()
    order = np.random.default_rng(0)
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
