"""How cost grows: step time and memory over batch and devices, neighbors over N and D, sampling over image count; with plots.

    .venv-parity/bin/python -m tests.benchmarks.scaling [--images docs/images] [--only batch devices neighbors sampling]

Each plot has the ideal beside it: time in proportion to the work (through the largest point); for devices, a constant
rate, because forced CPU devices share the same cores and can at best lose nothing. The digits UNet stands for all, so
that it ends in minutes.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.measure import once

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
DEVICES = (1, 2, 4)
IMAGE_COUNTS = (8, 32, 128, 512)
NEIGHBOR_SIZES = ((2_000, 784), (10_000, 784), (50_000, 784), (10_000, 64), (10_000, 3_072))


def batch_scaling() -> list[dict]:
    """Step seconds and peak memory over images in each of the two batches."""
    found = [(images, once("ours", "training", network="digits", method="retrack", batch=(images, images))) for images in BATCHES]
    return [{"images": 2 * n, "seconds": row["seconds"], "peak_bytes": row["peak_bytes"]} for n, row in found]


def device_scaling() -> list[dict]:
    """Step seconds and peak memory over forced CPU devices, 128 images in all."""
    same = {"network": "digits", "method": "retrack", "batch": (64, 64)}
    found = [(count, once("ours", "training", num_devices=count, **same)) for count in DEVICES]
    return [{"devices": count, "seconds": row["seconds"], "peak_bytes": row["peak_bytes"]} for count, row in found]


def sampling_scaling() -> list[dict]:
    """Seconds for 50 DDPM steps over image count, in one batch."""
    same = {"network": "digits", "num_steps": 50}
    return [{"images": n, "seconds": once("ours", "sampling", num_images=n, **same)["seconds"]} for n in IMAGE_COUNTS]


def neighbor_scaling() -> list[dict]:
    """Seconds of the exact search for one query over the number of images N and their values D."""
    from retrack_jax.neighbors import nearest

    found, source = [], np.random.default_rng(0)
    for count, dim in NEIGHBOR_SIZES:
        images = source.integers(0, 256, (count, dim), np.uint8)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            nearest(images[:1], images, 10, "exact")
            seconds.append(time.perf_counter() - start)
        found.append({"N": count, "D": dim, "seconds": float(np.median(seconds[1:]))})
    return found


PARTS = {"batch": batch_scaling, "devices": device_scaling, "neighbors": neighbor_scaling, "sampling": sampling_scaling}


def plot(found: dict[str, list[dict]], folder: Path) -> None:
    """Writes one PNG for each measured part into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def lines(name: str, x_label: str, curves: dict[str, tuple[list, list]], *, constant: bool = False, memory=()) -> None:
        size, panels = (5 + 4 * bool(memory), 3.5), 1 + bool(memory)
        figure, ((axes, *more),) = pyplot.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
        for label, (x, y) in curves.items():
            (drawn,) = axes.plot(x, y, "o-", label=label)
            ideal = [y[0]] * len(x) if constant else [y[-1] * value / x[-1] for value in x]
            axes.plot(x, ideal, ":", color=drawn.get_color(), label=f"{label}: ideal")
        axes.set(xlabel=x_label, ylabel="seconds", xscale="log")
        axes.set(**({"ylim": 0} if constant else {"yscale": "log"}))
        axes.legend(loc="lower right")  # what grows leaves that corner free
        for beside in more:
            gibibytes = [each / 2**30 for each in memory]
            beside.semilogx(x, gibibytes, "o-")
            beside.set(xlabel=x_label, ylabel="peak memory of the process, GiB", ylim=(0, 1.1 * max(gibibytes)))
        for each in (axes, *more) if len(curves) == 1 else ():
            each.set_xticks(x, [f"{value:,}" for value in x])
            each.set_xticks([], minor=True)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"scaling_{name}.png", dpi=120)
        pyplot.close(figure)

    def column(rows: list[dict], key: str) -> list:
        return [row[key] for row in rows]

    if rows := found.get("batch"):
        curve = {"step": (column(rows, "images"), column(rows, "seconds"))}
        lines("batch", "images in a step", curve, memory=column(rows, "peak_bytes"))
    if rows := found.get("devices"):
        curve = {"step": (column(rows, "devices"), column(rows, "seconds"))}
        lines("devices", "devices on the same two cores", curve, constant=True, memory=column(rows, "peak_bytes"))
    if rows := found.get("sampling"):
        lines("sampling", "images in a batch", {"50 steps": (column(rows, "images"), column(rows, "seconds"))})
    if rows := found.get("neighbors"):
        over_n = [row for row in rows if row["D"] == 784]
        over_d = sorted((row for row in rows if row["N"] == 10_000), key=lambda row: row["D"])
        curves = {
            "over N, D = 784": (column(over_n, "N"), column(over_n, "seconds")),
            "over D, N = 10,000": (column(over_d, "D"), column(over_d, "seconds")),
        }
        lines("neighbors", "N or D", curves)


def scaling(images: Path, parts: list[str]) -> dict[str, list[dict]]:
    """Measures `parts`, writes their plots and returns the rows."""
    found = {part: PARTS[part]() for part in parts}
    plot(found, images)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="docs/images", type=Path)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    print(json.dumps(scaling(arguments.images, arguments.only), indent=2))


if __name__ == "__main__":
    main()
