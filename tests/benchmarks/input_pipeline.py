"""How fast batches of 16 CelebA-HQ-sized images come: the real decoder, then the stream that training reads.

    python -m tests.benchmarks.input_pipeline [NUMBER OF IMAGES]

Prints the decoder's rate (256 x 256 JPEGs of CelebA-HQ's file size, into the uint8 cache), and the time that a training
step of 16 images waits for its batch: once with a step that does nothing, which is the stream's own rate, and once behind a
step of 50 ms, which is faster than any step of 16 such images through a network of 113.7 M parameters on one accelerator
that we know of.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.neighbors import write_jpegs

BATCH = 16
STEPS = 200


def waits(batches, step_seconds: float) -> np.ndarray:
    """Seconds that each step waits for its batch."""
    from retrack_jax.data.in_order import in_order

    waited = []
    stream = in_order(batches, range(STEPS), ahead=2)
    for _ in range(STEPS):
        start = time.perf_counter()
        next(stream)
        waited.append(time.perf_counter() - start)
        time.sleep(step_seconds)
    return np.array(waited[2:])  # the first two wait for the stream to start


def main(count: int) -> None:
    from retrack_jax.data.batches import Batches
    from retrack_jax.data.sources.load import load_images

    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), count)
        size = np.mean([path.stat().st_size for path in Path(folder).iterdir()])
        start = time.perf_counter()
        images = load_images({"source": "folder", "dir": folder, "cache_dir": f"{folder}/cache"})
        seconds = time.perf_counter() - start
        print(f"decoded {count} JPEGs of {size / 1e3:.0f} kB in {seconds:.2f} s: {count / seconds:.0f} images per second")
        batches = Batches(
            gather=lambda rows: {"pixels": np.ascontiguousarray(images.images[rows])},
            num_remain=count,
            forget_rows=None,
            remain_size=BATCH,
            forget_size=0,
            seed=0,
        )
        free = waits(batches, 0.0)
        busy = waits(batches, 0.05)
        print(f"a batch of {BATCH} every {free.mean() * 1e3:.2f} ms ({BATCH / free.mean():.0f} images per second) from the cache")
        print(f"behind a step of 50 ms: waits {np.median(busy) * 1e3:.3f} ms (median), {busy.max() * 1e3:.3f} ms at most")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
