"""How many images a CPU takes through a UNet at once: as many as leave one layer's values in the cache of a core.

A batch is divided into such parts and their gradients are summed (`train/step.py`). The result is the same up to rounding, the
step is at least as fast and takes a fraction of the memory: docs/measurements/speed.md has the numbers.
"""

from collections.abc import Mapping
from typing import Any

_CACHE = 2**21  # bytes of the second-level cache of a core; half or twice as much changes little
_LEAST = 4  # with fewer, the sum over parts of as many gradients as a large network has takes longer than the cache saves


def images_at_once(network: Mapping[str, Any]) -> int | None:
    """Returns how many images one device takes at once, or None for what is no UNet.

    Args:
      network: its config as diffusers names the fields. The first level, `sample_size`^2 x `block_out_channels`[0] values in
        float32, is the largest.
    """
    size, widths = network.get("sample_size"), network.get("block_out_channels")
    if size is None or widths is None:
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return max(_LEAST, _CACHE // (4 * height * width * widths[0]))
