"""The cache returns what a search returns, in one pass for a sweep; its key names all that a result depends on."""

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
    target = np.array(rows), np.array(exclude)
    return cache.cached_nearest_of_targets(images, [target], k, cache_dir=tmp_path, **options)[0]


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


@pytest.mark.parametrize("size", [60, 20_000])
def test_scann_that_does_not_fit_the_memory_is_one_line(images, tmp_path, monkeypatch, size):
    images.images = np.broadcast_to(images.images[:1], (size, 5, 5, 1)) if size > 60 else images.images
    monkeypatch.setattr(search, "available_memory", lambda: 2 * 4 * 25 * 60 - 1)
    with pytest.raises(UserError, match=f"memory for {size} images of 25 values, and .* are free; set .*=exact"):
        find(images, tmp_path, backend="scann")
    assert search.available_memory() < 1 << 20
    monkeypatch.undo()
    assert search.available_memory() > 1 << 20


@pytest.mark.parametrize("change", [{"k": 5}, {"exclude": (3, 7, 9)}, {"rows": (3, 8)}, {"backend": "exact"}, {"digest": "two"}])
def test_whatever_the_result_depends_on_is_in_the_key(images, tmp_path, searches, change):
    find(images, tmp_path)
    if "digest" in change:
        images.digest = change.pop("digest")
    find(images, tmp_path, **change)
    assert len(searches) == 2


@pytest.mark.parametrize("engine", ["scann brute", "exact"])
def test_the_version_of_the_search_and_of_scann_is_in_the_key(images, tmp_path, searches, monkeypatch, engine):
    backend = engine.split()[0]
    find(images, tmp_path, backend=backend)
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "another")
    find(images, tmp_path, backend=backend)
    assert len(searches) == (2 if backend == "scann" else 1)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    find(images, tmp_path, backend=backend)
    assert len(searches) == (3 if backend == "scann" else 2)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "half", "no distances"])
def test_a_file_that_cannot_be_read_is_searched_again(images, tmp_path, searches, caplog, damage):
    find(images, tmp_path)
    (path,) = (tmp_path / "neighbors").glob("*.npz")
    content = path.read_bytes()
    if damage == "no distances":
        np.savez(path, indices=np.zeros((2, 4), np.int64))
    else:
        path.write_bytes({"cut": content[:100], "text": b"hello", "empty": b""}.get(damage, content[: len(content) // 2]))
    with caplog.at_level(logging.WARNING):
        assert_same(find(images, tmp_path), expected(images))
    assert len(searches) == 2 and "making it again" in caplog.text
    assert_same(find(images, tmp_path), expected(images))
    assert len(searches) == 2  # and the file is whole again


def test_too_few_remain(images, tmp_path):
    with pytest.raises(ValueError, match="only 58 images remain"):
        find(images, tmp_path, k=59)
