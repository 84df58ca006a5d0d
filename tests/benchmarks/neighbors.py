"""Neighbor search against scikit-learn's NearestNeighbors as the official ReTrack code uses it, in one run on this machine.

    python -m tests.benchmarks.neighbors [queries|jpeg|tree|stream ...] [--results=docs/results]

    queries  606 queries x 60,000 x 784: one image 606 times, then distinct ones; and 1 to 3,000 distinct queries, by each engine
    jpeg     2,000 x 196,608 from JPEG files, decoding included, each side in a process of its own, whose peak memory is read
    tree     ScaNN's tree over 100,000 x 784, its build included: recall@10 and speed on 1,000 queries
    stream   30,000 x 196,608 from a memory map: peak memory and time of one pass for ten targets

Images are scikit-learn's digits, enlarged, shifted and blended to 28 x 28 (60,000 distinct ones), and random smooth colour
images. Prints a table of the queries and one of the rest; `--results` gets them as neighbors.json and neighbors_large.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.benchmarks.measure import Table, parser_of, peak_resident_bytes

REPEATS = 3
LARGE = "what", "scikit-learn", "exact", "ScaNN, brute force", "ScaNN, tree"


def digits(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, 784] images with the structure of handwriting."""
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    generator = np.random.default_rng(seed)
    large = np.clip(zoom(load_digits().images, (1, 3, 3), order=1), 0, 16)
    large = np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.float32) * (255 / 16)
    images = np.empty((count, 784), np.uint8)
    for row in range(count):
        one, other = large[generator.integers(0, len(large), 2)]
        blend = 0.75 + 0.25 * generator.random()
        shift = generator.integers(-2, 3, 2)
        images[row] = np.roll(blend * one + (1 - blend) * other, shift, (0, 1)).ravel()
    return images


def as_floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def sklearn_search(queries: np.ndarray, images: np.ndarray, k: int = 10) -> np.ndarray:
    """The official code's search, on float32 arrays."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k, algorithm="auto").fit(images).kneighbors(queries)[1]


def best_of(call, repeats: int = REPEATS):
    """(seconds of the fastest call, seconds of the first, its result)."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return min(times), times[0], result


def recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), true.tolist(), strict=True)]))


def queries_part() -> Table:
    from retrack_jax.neighbors import nearest

    images = digits(60_000)
    floats = as_floats(images)
    shirt = digits(1, seed=9)
    many = digits(3000, seed=1)
    cases = [("606 copies of one image", np.repeat(shirt, 606, axis=0)), ("606 distinct", many[:606])]
    cases += [(f"{count:,} distinct", many[:count]) for count in (1, 10, 100, 1000, 3000)]
    shown = Table(
        "neighbors", "queries", "scikit-learn", "ScaNN, brute force", "exact, float32", "exact, uint8", "first call", "recall"
    )
    for name, pixels in cases:
        queries = as_floats(pixels)
        theirs, _, true = best_of(lambda q=queries: sklearn_search(q, floats))
        scann, _, one = best_of(lambda q=queries: nearest(q, floats, 10, "scann")[0])
        exact, _, two = best_of(lambda q=queries: nearest(q, floats, 10, "exact")[0])
        whole, first, three = best_of(lambda q=pixels: nearest(q, images, 10, "exact")[0])
        least = min(recall(found, true) for found in (one, two, three))
        shown.add(name, *(f"{seconds:.2f}" for seconds in (theirs, scann, exact, whole, first)), f"{least:.4f}")
    return shown


def searches(counts: Sequence[int]) -> list[dict]:
    """Seconds of the exact search on uint8 and of scikit-learn on float32, in turns; raises where they find other images."""
    from retrack_jax.neighbors import nearest

    images, found = digits(60_000), []
    floats = as_floats(images)
    for count in counts:
        queries, times = digits(count, seed=1), {"ours": [], "sklearn": []}
        query_floats = as_floats(queries)
        for _ in range(REPEATS):
            seconds, _, ours = best_of(lambda q=queries: nearest(q, images, 10, "exact")[0], 1)
            times["ours"].append(seconds)
            seconds, _, theirs = best_of(lambda q=query_floats: sklearn_search(q, floats), 1)
            times["sklearn"].append(seconds)
        if recall(ours, theirs) < 0.999:  # equal distances may be told apart otherwise
            raise SystemExit(f"error: the two searches find other neighbors, recall {recall(ours, theirs):.4f}")
        medians = {side: float(np.median(values)) for side, values in times.items()}
        about = {"queries": count, "flops": 2.0 * count * images.size, "ratio": medians["sklearn"] / medians["ours"]}
        found.append(about | medians)
    return found


def write_jpegs(folder: Path, count: int, size: int = 256) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for row in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(smooth + generator.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{row:05d}.jpg", quality=90)


def child(part: str, *arguments: str) -> dict:
    """Runs a part in a process of its own and returns what it printed."""
    command = [sys.executable, "-m", "tests.benchmarks.neighbors", f"--{part}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def jpeg_theirs(folder: str) -> dict:
    from PIL import Image

    start = time.perf_counter()
    paths = sorted(Path(folder).glob("*.jpg"))

    def transform(path):  # ToTensor and Normalize of the official config
        return ((np.asarray(Image.open(path), np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)

    remain = np.array([transform(path) for path in paths[1:]])
    found = sklearn_search(transform(paths[0])[None].reshape(1, -1), remain.reshape(len(remain), -1))
    return {"seconds": time.perf_counter() - start, "peak": peak_resident_bytes(), "found": (found + 1).tolist()}


def jpeg_ours(folder: str, cache_dir: str) -> dict:
    start = time.perf_counter()
    from retrack_jax.data.sources.load import load_images
    from retrack_jax.neighbors import nearest

    images = load_images({"source": "folder", "dir": folder, "cache_dir": cache_dir})
    found, _ = nearest(images.images[:1], images.images, 10, exclude=[0])
    return {"seconds": time.perf_counter() - start, "peak": peak_resident_bytes(), "found": found.tolist()}


def jpeg_part(shown: Table) -> None:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache_dir:
        write_jpegs(Path(folder), 2000)
        theirs = child("jpeg-theirs", folder)
        ours, again = (child("jpeg-ours", folder, cache_dir) for _ in range(2))
    found = recall(np.array(ours["found"]), np.array(theirs["found"]))
    what = "1 query, 2,000 JPEGs of 256 x 256 and their decoding"
    shown.add(f"{what}, s", f"{theirs['seconds']:.1f}", f"{ours['seconds']:.1f} (recall {found:.2f})", "", "")
    shown.add("the same, peak memory of the process, GB", f"{theirs['peak'] / 1e9:.2f}", f"{ours['peak'] / 1e9:.2f}", "", "")
    shown.add("the same, once they are decoded, s", "", f"{again['seconds']:.1f}", "", "")


def tree_part(shown: Table) -> None:
    from retrack_jax.neighbors import exact, scann_search

    images, queries = digits(100_000), digits(1000, seed=1)
    true, _ = exact.search(queries, images, 10)
    tree, _, (found, _) = best_of(lambda: scann_search.search(queries, images, 10, tree=True), 1)
    brute, _, _ = best_of(lambda: scann_search.search(queries, images, 10))
    whole, _, _ = best_of(lambda: exact.search(queries, images, 10))
    with_recall = f"{tree:.2f} (recall {recall(found, true):.4f})"
    shown.add("1,000 queries, 100,000 x 784, building included, s", "", f"{whole:.2f}", f"{brute:.2f}", with_recall)


def stream_ours(path: str, count: str) -> dict:
    from types import SimpleNamespace

    from retrack_jax.neighbors.cache import cached_nearest_of_targets

    images = np.memmap(path, np.uint8, "r", shape=(int(count), 256, 256, 3))
    targets = [(np.array([row]), np.array([row])) for row in range(100, 110)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache_dir:
        found = cached_nearest_of_targets(SimpleNamespace(images=images, digest=path), targets, 10, cache_dir=cache_dir)
    return {"seconds": time.perf_counter() - start, "peak": peak_resident_bytes(), "found": [rows.tolist() for rows, _ in found]}


def stream_part(shown: Table, count: int = 30_000) -> None:
    with tempfile.NamedTemporaryFile() as file:
        generator = np.random.default_rng(0)
        for _ in range(count // 100):
            file.write(generator.integers(0, 256, (100, 196_608), dtype=np.uint8).data)
        file.flush()
        ours = child("stream-ours", file.name, str(count))
        shown.add(f"ten targets, {count:,} x 196,608 from a memory map, s", "", f"{ours['seconds']:.1f}", "", "")
        shown.add("the same, peak memory of the process, GB", "", f"{ours['peak'] / 1e9:.2f}", "", "")


PARTS = {"jpeg": jpeg_part, "tree": tree_part, "stream": stream_part}
CHILDREN = {"--jpeg-theirs": jpeg_theirs, "--jpeg-ours": jpeg_ours, "--stream-ours": stream_ours}


def main(arguments: list[str]) -> None:
    if arguments and arguments[0] in CHILDREN:
        print(json.dumps(CHILDREN[arguments[0]](*arguments[1:])))
        return
    parser = parser_of(__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(["queries", *PARTS]))
    options = parser.parse_args(arguments)
    names = options.parts or ["queries", *PARTS]
    if unknown := sorted({*names} - {"queries", *PARTS}):
        parser.error(f"unknown part {unknown[0]}")
    tables = [queries_part()] if "queries" in names else []
    if wanted := [part for name, part in PARTS.items() if name in names]:
        tables.append(Table("neighbors_large", *LARGE))
        for part in wanted:
            part(tables[-1])
    for table in tables:
        table.write(options.results, "python -m tests.benchmarks.neighbors")


if __name__ == "__main__":
    main(sys.argv[1:])
