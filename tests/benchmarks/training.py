"""A training step against PyTorch's, and each side's distance from the machine's limit.

    .venv-parity/bin/python -m tests.benchmarks.training [--network cifar10] [--method retrack] [--rounds 4]
        [--images 32] [--devices 2] [--results=FOLDER]

On the CPU, in float32; accelerators: device.py. The limit is a large matrix product, measured on both sides in the same run; the
better of the two counts. FLOPs of a step are those of the direct convolutions: three times the forward pass of all images (five
for SISS, which has two backward passes), so a share above the direct convolution's is possible where fewer operations are made.
"""

import sys
from typing import Any

from tests.benchmarks.measure import Table, Worker, compare, in_turns, parser_of
from tests.benchmarks.networks import BATCH, config_of

METHODS = ("retrack", "siss", "vanilla")
PASSES = {"retrack": 3, "vanilla": 3, "siss": 5}


def forward_flops(network: str) -> float:
    """Returns the FLOPs of one forward pass of one image, counted by PyTorch over its own operations."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.benchmarks.theirs import make_model

    model, config = make_model(network), config_of(network)
    x = torch.zeros(1, config["in_channels"], config["sample_size"], config["sample_size"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def matmul_rate(rounds: int = 5) -> dict[str, float]:
    """Returns FLOP/s of a square matrix product on both sides, and the better as `limit`."""
    size = 2048
    found = in_turns({side: Worker(side, "matmul", size=size) for side in ("ours", "theirs")}, rounds)
    rates = {side: 2 * size**3 * 10 / min(result["all_seconds"]) for side, result in found.items()}
    return rates | {"limit": max(rates.values())}


def training(network: str, method: str, rounds: int, batch=None, rate=None, devices=1) -> dict[str, Any]:
    """Returns one row: medians of both sides, their ratio, memory, and each side's share of the limit.

    `devices` is ours alone: what jax's CPU counts as, so that two halves of a batch use two cores.
    """
    result = compare("training", rounds, {"num_devices": devices}, network=network, method=method, batch=batch)
    images = sum(batch or BATCH[network]) if method == "retrack" else (batch or BATCH[network])[0]
    flops = PASSES[method] * images * forward_flops(network)
    rate = rate or matmul_rate()
    for side in ("ours", "pytorch"):
        result[side]["share_of_limit"] = flops / result[side]["seconds"] / rate["limit"]
    about = {"network": network, "method": method, "images": images, "devices": devices}
    return about | {"flops": flops, "matmul": rate} | result


COLUMNS = (
    "step, and CPU devices", "ours, s", "PyTorch, s", "ratio", "ours of limit", "PyTorch of limit", "ours, GiB", "PyTorch, GiB"
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of `COLUMNS`."""
    sides = row["ours"], row["pytorch"]
    return [
        f"{row['network']} {row['method']} float32, {row['images']} images, ours on {row['devices']}",
        *(f"{side['seconds']:.3f}" for side in sides),
        f"{row['ratio']:.2f}",
        *(f"{side['share_of_limit']:.0%}" for side in sides),
        *(f"{side['peak_bytes'] / 2**30:.2f}" for side in sides),
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--network", default="cifar10", choices=BATCH)
    parser.add_argument("--method", default="retrack", choices=METHODS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--images", type=int, help="images in each of the two batches")
    parser.add_argument("--devices", type=int, default=1, help="what the CPU counts as for ours")
    arguments = parser.parse_args()
    batch = (arguments.images, arguments.images) if arguments.images else None
    names = ("network", "method", "rounds", "devices")
    row = training(**{name: getattr(arguments, name) for name in names}, batch=batch)
    table = Table("speed_step", *COLUMNS)
    table.add(*cells(row))
    table.write(arguments.results, f"python -m tests.benchmarks.training {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
