"""The cache returns what a search returns, in one pass for a sweep, and never trusts a stale or damaged file."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.neighbors import cache, nearest, search


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 5, 5, 1), dtype=np.uint8)
    return SimpleNamespace(images=pixels, digest="one")


@pytest.fixture
def searches(monkeypatch):
    """Counts the passes over the images."""
    calls = []

    def counted(queries, *arguments, **options):
        calls.append(len(queries))
        return nearest(queries, *arguments, **options)

    monkeypatch.setattr(cache, "nearest", counted)
    return calls


def find(images, tmp_path, rows=(3, 7), exclude=(3, 7), k=4, **options):
    return cache.cached_nearest(images, np.array(rows), k, exclude=np.array(exclude), cache_dir=tmp_path, **options)


def expected(images, rows=(3, 7), exclude=(3, 7), k=4):
    return nearest(images.images[list(rows)], images.images, k, "exact", exclude=list(exclude))


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_second_time_is_read(images, tmp_path, searches):
    for _ in range(2):
        assert_same(find(images, tmp_path), expected(images))
    assert searches == [2]


def test_one_pass_for_a_sweep(images, tmp_path, searches):
    find(images, tmp_path, (5,), (5,))
    targets = [([3], [3]), ([5], [5]), ([7, 8], [7, 8])]
    found = cache.cached_nearest_of_targets(images, targets, 4, cache_dir=tmp_path)
    assert searches == [1, 3]  # the one that is known is not searched, the others together
    for result, (rows, exclude) in zip(found, targets, strict=True):
        assert_same(result, expected(images, rows, exclude))
    assert 5 in nearest(images.images[[3]], images.images, 60, "exact")[0]  # a target may find another target's image
    find(images, tmp_path, (7, 8), (7, 8))
    assert len(searches) == 2


def test_a_sweep_and_single_runs_choose_alike(images, tmp_path, searches, monkeypatch):
    """Each target is below the number of queries that a tree takes; together they are above it."""
    for module in (cache, search):
        monkeypatch.setattr(module, "TREE_QUERIES", 10)
    monkeypatch.setattr(search, "TREE_IMAGES", 20)
    images.images[30:42] = images.images[30]
    targets = [(np.arange(start, start + 8),) * 2 for start in (0, 8, 16)] + [(np.arange(30, 42),) * 2]
    cache.cached_nearest_of_targets(images, targets, 4, cache_dir=tmp_path)
    assert searches == [36]  # twelve copies are one query, so brute force does for them too
    for rows, exclude in targets:
        assert_same(find(images, tmp_path, rows, exclude), expected(images, rows, exclude))
    assert searches == [36]


@pytest.mark.parametrize("size", [60, 20_000])
def test_scann_that_does_not_fit_the_memory_is_one_line(images, tmp_path, monkeypatch, size):
    images.images = np.broadcast_to(images.images[:1], (size, 5, 5, 1)) if size > 60 else images.images
    monkeypatch.setattr(search, "available_memory", lambda: 2 * 4 * 25 * 60 - 1)
    with pytest.raises(UserError, match=f"memory for {size} images of 25 values, and .* are free; set .*=exact"):
        find(images, tmp_path, backend="scann")
    assert search.available_memory() < 1 << 20
    monkeypatch.undo()
    assert search.available_memory() > 1 << 20


@pytest.mark.parametrize(
    "change", [{"k": 5}, {"exclude": (3, 7, 9)}, {"rows": (3, 8)}, {"backend": "exact"}, {"space": "latents"}, {"digest": "two"}]
)
def test_whatever_the_result_depends_on_is_in_the_key(images, tmp_path, searches, change):
    find(images, tmp_path)
    if "digest" in change:
        images.digest = change.pop("digest")
    find(images, tmp_path, **change)
    assert len(searches) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "empty", "other"])
def test_damaged_file_is_searched_again(images, tmp_path, searches, caplog, damage):
    find(images, tmp_path)
    (path,) = (tmp_path / "neighbors").glob("*.npz")
    content = path.read_bytes()
    if damage == "other":  # a whole file, of another key
        find(images, tmp_path, (20, 21), (20, 21))
        (other,) = set((tmp_path / "neighbors").glob("*.npz")) - {path}
        path.write_bytes(other.read_bytes())
        searches.clear()
        searches.append(2)
    else:
        path.write_bytes({"cut": content[:100], "text": b"hello", "empty": b""}.get(damage, content))
    if damage == "flip":
        with np.load(path) as saved:
            arrays = dict(saved)
        arrays["indices"][0, 0] = (arrays["indices"][0, 0] + 1) % 60
        np.savez(path, **arrays)
    with caplog.at_level(logging.WARNING):
        assert_same(find(images, tmp_path), expected(images))
    assert len(searches) == 2 and "searching again" in caplog.text
    assert_same(find(images, tmp_path), expected(images))
    assert len(searches) == 2  # and the file is whole again


def test_a_flipped_bit_anywhere_in_the_file(images, tmp_path):
    wanted = find(images, tmp_path)
    (path,) = (tmp_path / "neighbors").glob("*.npz")
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert_same(find(images, tmp_path), wanted)


def test_too_few_remain(images, tmp_path):
    with pytest.raises(ValueError, match="only 58 images remain"):
        find(images, tmp_path, k=59)
