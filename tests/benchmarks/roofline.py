"""The shortest time that one ReTrack step of a config can take on one chip of a TPU, predicted from the compiler's program.

    python -m tests.benchmarks.roofline [CONFIG:OPTION ...]     # on v5e and v6e; without cells all of the table

Cells are those of memory.py, whose first lines say how the compiler for TPUs is installed. Nothing is run: the floating-point
operations and the bytes that the program's kernels read and write are XLA's account of it, and the time is the larger of

    operations / peak rate          and        bytes / bandwidth of the memory.

A real step takes longer. The bytes are an upper figure, because some stay in the chip's own memory between two kernels.
float32 has the same peak as bfloat16, because XLA multiplies float32 in one pass of bfloat16 by default. Many steps per call
change neither figure: they save launches, which the compiler does not see. "Images that fit" is the microbatch at which the
chip's memory is full if arguments stay as they are and temporaries grow in proportion.
"""

import jax

from tests.benchmarks.measure import Table, parser_of
from tests.benchmarks.memory import plan, plan_for

# Chip -> peak of bfloat16 in FLOP/s, bandwidth in bytes/s and memory in bytes, as Google's documentation of Cloud TPU says.
CHIPS = {"v5e": (197e12, 819e9, 16e9), "v6e": (918e12, 1640e9, 32e9)}
CELLS = tuple(
    f"{name}:{option}"
    for name in ("digits_tshirt", "mnist_tshirt", "cifar10", "celebahq")
    for option in ("float32", "bfloat16", "bfloat16+remat")
)


def row(chip: str, cell: str) -> list[str]:
    """Returns the table's cells for one step, planned for `chip`."""
    peak, bandwidth, memory = CHIPS[chip]
    step = plan(*cell.split(":"))
    if "too_large" in step:
        return ["", "", "", "", "does not fit"]
    compute, traffic = step["flops"] / peak, step["bytes"] / bandwidth
    seconds = max(compute, traffic)
    fits = int((memory - step["arguments"]) / (step["temporaries"] / step["images"]))
    bound = "operations" if compute > traffic else "bytes"
    return [f"{step['flops'] / 1e9:.0f}", f"{step['bytes'] / 1e9:.1f}", f"{1e3 * seconds:.1f}, by {bound}",
            f"{compute / seconds:.0%}", str(fits)]  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("cells", nargs="*", default=CELLS, metavar="CONFIG:OPTION")
    arguments = parser.parse_args()
    # A program from the persistent cache has no plan to look at.
    jax.config.update("jax_enable_compilation_cache", False)
    columns = "chip", "config", "option", "GFLOP", "GB moved", "ms a step", "of peak at most", "images that fit"
    shown = Table("roofline", *columns, machine="predicted by the compiler for TPUs; nothing was run on one")
    whole_pmap = jax.pmap
    for cell in arguments.cells:
        for chip in CHIPS:
            plan_for(f"{chip}:2x2")
            shown.add(chip, *cell.split(":"), *row(chip, cell))
            jax.pmap = whole_pmap
            shown.write(arguments.results, "python -m tests.benchmarks.roofline")


if __name__ == "__main__":
    main()
