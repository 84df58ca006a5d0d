"""How many images a CPU takes through a UNet at once: as many as keep the values of one layer in the cache of a core.

A batch is divided into such microbatches (`config/devices.py`), whose gradients are averaged (`train/step.py`). The result is
the same up to rounding. docs/measurements/speed.md has the time and memory of a step.
"""

import math
from collections.abc import Mapping
from typing import Any

_CACHE = 2**21  # bytes of the second-level cache of a core; half or twice as much changes little
_LEAST = 4  # with fewer, the sum over parts of as many gradients as a large network has takes longer than the cache saves


def images_at_once(network: Mapping[str, Any]) -> int | None:
    """Returns how many images one device takes at once, or None for what is no UNet, or a damaged one, which its reader refuses.

    Args:
      network: its config as diffusers names the fields. The first level, `sample_size`^2 x `block_out_channels`[0] values in
        float32, is the largest.
    """
    size, widths = network.get("sample_size"), network.get("block_out_channels")
    sides = [*size] if isinstance(size, (list, tuple)) else [size, size]
    level = [*sides, *widths[:1]] if len(sides) == 2 and isinstance(widths, (list, tuple)) else []
    if len(level) != 3 or not all(isinstance(value, int) and value > 0 for value in level):
        return None
    return max(_LEAST, _CACHE // (4 * math.prod(level)))
