"""The search against a float64 oracle, for each engine: ranks, ties, duplicates, exclusions, bounded memory, bad input."""

from pathlib import Path

import numpy as np
import pytest

from retrack_jax.data.dataset import RowView
from retrack_jax.data.distinct import distinct_rows
from retrack_jax.neighbors import exact, nearest, search

ENGINES = ("exact", "scann", "auto")


def oracle(queries, images, k, exclude=()):
    """Distances from differences in float64, sorted by (distance, index)."""
    if queries.dtype == np.uint8 and images.dtype == np.uint8:
        queries, images, scale = queries.astype(np.int64), images.astype(np.int64), 2 / 255
    else:
        queries, images, scale = queries.astype(np.float64), images.astype(np.float64), 1.0
    indices, distances = [], []
    for query in queries:
        squares = np.array([((image - query) ** 2).sum() for image in images], np.float64)
        squares[list(exclude)] = np.inf
        order = np.lexsort((np.arange(len(images)), squares))[:k]
        indices.append(order)
        distances.append(np.sqrt(squares[order]) * scale)
    return np.array(indices), np.array(distances)


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-7, atol=0)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("shape", [(7, 7, 1), (16, 16, 3), (40, 40, 1), (1, 1, 1)])
def test_pixels(backend, shape):
    images = pixels(0, 300, *shape)
    queries = np.concatenate([pixels(1, 4, *shape), images[[5, 299]]])
    assert_same(nearest(queries, images, 12, backend), oracle(queries, images, 12))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("size", [49, 784, 3072])
def test_floats(backend, size):
    generator = np.random.default_rng(2)
    images = generator.uniform(-1, 1, (500, size)).astype(np.float32)
    queries = images[:3] + generator.normal(0, 1e-3, (3, size)).astype(np.float32)
    assert_same(nearest(queries, images, 10, backend), oracle(queries, images, 10))


@pytest.mark.parametrize("backend", ENGINES)
def test_differences_that_float32_squares_cannot_see(backend):
    """Images far from zero that differ in the last bits: the expanded square of float32 has no digit left for them."""
    steps = np.random.default_rng(3).permutation(200).astype(np.float32)
    images = np.full((200, 64), 100.0, np.float32)
    images[:, 0] += steps * 2.0**-12
    queries = np.full((1, 64), 100.0, np.float32)
    assert_same(nearest(queries, images, 20, backend), oracle(queries, images, 20))


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_ties_go_to_the_lower_index(backend, kind):
    images = np.repeat(pixels(4, 5, 6, 6, 1), 40, axis=0)[np.random.default_rng(5).permutation(200)].astype(kind)
    assert_same(nearest(images[:3], images, 50, backend), oracle(images[:3], images, 50))


@pytest.mark.parametrize("backend", ENGINES)
def test_all_images_equal(backend):
    images = np.full((120, 8), 0.3, np.float32)
    indices, distances = nearest(images[:2], images, 5, backend)
    np.testing.assert_array_equal(indices, [[0, 1, 2, 3, 4]] * 2)
    np.testing.assert_array_equal(distances, np.zeros((2, 5)))


@pytest.mark.parametrize("backend", ENGINES)
def test_k_is_all_images(backend):
    images = pixels(6, 30, 5, 5, 1)
    assert_same(nearest(images[:2], images, 30, backend), oracle(images[:2], images, 30))


@pytest.mark.parametrize("backend", ENGINES)
def test_excluded_images_are_not_found(backend):
    images = pixels(7, 100, 5, 5, 1)
    exclude = np.arange(0, 100, 3)
    assert_same(
        nearest(images[exclude[:2]], images, 8, backend, exclude=exclude), oracle(images[exclude[:2]], images, 8, exclude)
    )


def test_one_exclusion_a_query():
    images = pixels(8, 60, 5, 5, 1)
    queries = images[[4, 9, 4]]
    indices, _ = nearest(queries, images, 6, "exact", exclude=[[4], [9, 10], []])
    for row, (query, exclude) in enumerate(zip(queries, ([4], [9, 10], []), strict=True)):
        np.testing.assert_array_equal(indices[row], oracle(query[None], images, 6, exclude)[0][0])
    assert indices[2, 0] == 4 and 4 not in indices[0]


def test_many_blocks_and_tiles(monkeypatch):
    monkeypatch.setattr(exact, "_BLOCK_VALUES", 1)
    monkeypatch.setattr(exact, "_QUERY_TILE", 7)
    images = pixels(9, 1000, 3, 3, 1) // 64  # small values: many ties across blocks
    for kind in (np.uint8, np.float32):
        found = nearest(images[:20].astype(kind), images.astype(kind), 15, "exact", exclude=[3, 500, 999])
        assert_same(found, oracle(images[:20].astype(kind), images.astype(kind), 15, [3, 500, 999]))


def test_wide_queries_are_searched_a_bounded_number_at_a_time(monkeypatch):
    monkeypatch.setattr(exact, "_TILE_VALUES", 100)
    tiles, search_tile = [], exact._search_tile
    monkeypatch.setattr(exact, "_search_tile", lambda queries, *rest: tiles.append(len(queries)) or search_tile(queries, *rest))
    images = pixels(9, 60, 5, 5, 1)
    exclude = [[row] for row in range(10)]
    indices, _ = nearest(images[:10], images, 6, "exact", exclude=exclude)
    assert tiles == [4, 4, 2]
    for row in range(10):
        np.testing.assert_array_equal(indices[row], oracle(images[row][None], images, 6, [row])[0][0])


def test_distinct_rows():
    rows = np.array([[1, 2], [3, 4], [1, 2], [1, 2], [0, 0]], np.uint8)
    first, inverse = distinct_rows(rows)
    assert first.tolist() == [0, 1, 4] and inverse.tolist() == [0, 1, 0, 0, 2]
    first, inverse = distinct_rows(rows, np.array([0, 0, 0, 1, 0]))
    assert first.tolist() == [0, 1, 3, 4] and inverse.tolist() == [0, 1, 0, 2, 3]


def test_equal_queries_are_searched_once(caplog):
    images = pixels(10, 50, 4, 4, 1)
    queries = np.repeat(images[:2], 5, axis=0)
    with caplog.at_level("INFO", logger="retrack_jax"):
        indices, _ = nearest(queries, images, 3)
    assert "10 queries (2 distinct)" in caplog.text
    np.testing.assert_array_equal(indices, np.repeat(nearest(images[:2], images, 3)[0], 5, axis=0))


def test_largest_pixel_distance_is_exact():
    """All chunks at the bound of (2): black against white, over several chunks of 1024."""
    images = np.stack([np.zeros(5000, np.uint8), np.full(5000, 255, np.uint8)])
    images = np.concatenate([images, images[1:]])
    images[2, 17] = 254
    indices, distances = nearest(images[:1], images, 3, "exact")
    np.testing.assert_array_equal(indices, [[0, 2, 1]])
    np.testing.assert_array_equal(distances[0], np.float32([0, np.sqrt(4999 * 255**2 + 254**2) * 2 / 255, np.sqrt(5000) * 2]))


def test_auto_keeps_to_the_memory_budget(monkeypatch, caplog):
    monkeypatch.setattr(search, "MEMORY_BUDGET", 100)
    with caplog.at_level("INFO", logger="retrack_jax"):
        nearest(pixels(11, 1, 9), pixels(12, 40, 9), 2)
    assert "by exact: ScaNN would need" in caplog.text


def test_the_choice_of_an_engine():
    def chosen(*arguments):
        return search.choose_backend(*arguments)[0]

    assert chosen("auto", (60_000, 784)) == chosen("scann", (60_000, 784)) == "scann brute"
    assert chosen("scann", (100_000, 784)) == "scann tree" and chosen("auto", (100_000, 784)) == "scann brute"
    assert chosen("auto", (30_000, 196_608)) == "exact" and chosen("exact", (10, 10)) == "exact"
    assert chosen("auto", (150_000, 1200)) == "scann brute" and chosen("auto", (180_000, 1200)) == "exact"  # 1.5 GiB


def test_without_scann(monkeypatch):
    monkeypatch.setattr(search, "scann_installed", lambda: False)
    assert search.choose_backend("auto", (10, 10)) == ("exact", "ScaNN is not installed")
    with pytest.raises(ValueError, match="ScaNN is not installed"):
        nearest(pixels(0, 1, 9), pixels(1, 9, 9), 2, "scann")


def test_memory_map(tmp_path):
    images = pixels(13, 80, 6, 6, 3)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert_same(nearest(images[:2], mapped, 4, "exact"), oracle(images[:2], images, 4))


@pytest.mark.parametrize("backend", ENGINES)
def test_some_rows_of_a_memory_map(tmp_path, backend):
    images = pixels(13, 80, 6, 6, 3)
    images.tofile(tmp_path / "images.pixels")
    mapped = np.memmap(tmp_path / "images.pixels", np.uint8, "r", shape=images.shape)
    rows = np.arange(0, 80, 3)
    part = RowView(mapped, rows)
    assert part.shape == (27, 6, 6, 3) and len(part) == 27
    np.testing.assert_array_equal(part[[1, 4]], images[[3, 12]])
    np.testing.assert_array_equal(np.asarray(part), images[rows])
    assert_same(nearest(images[:2], part, 4, backend, exclude=[0, 5]), oracle(images[:2], images[rows], 4, [0, 5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 41}, "only 40 images remain"),
        ({"k": 38, "exclude": [1, 2, 3]}, "only 37 images remain"),
        ({"k": 0}, "k is 0"),
        ({"backend": "scan"}, "did you mean 'scann'"),
        ({"exclude": [40]}, "outside"),
        ({"queries": np.zeros((1, 8), np.uint8)}, "must be the same"),
        ({"images": np.zeros((0, 9), np.uint8)}, "N at least 1"),
        ({"queries": np.full((1, 9), np.nan, np.float32)}, "not finite"),
        ({"images": np.full((40, 9), np.inf, np.float32), "backend": "exact"}, "image 0 holds values"),
    ],
)
def test_bad_input(arguments, message):
    whole = {"queries": pixels(14, 1, 9), "images": pixels(15, 40, 9), "k": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        nearest(whole.pop("queries"), whole.pop("images"), whole.pop("k"), **whole)


def test_pages_of_a_memory_map_are_given_back(tmp_path):
    """Mapped pages that stay count as memory of the process: after a search of 48 MB, all but the last blocks must be gone."""
    path = tmp_path / "images.pixels"
    pixels(16, 4000, 12_288).tofile(path)
    mapped = np.memmap(path, np.uint8, "r", shape=(4000, 64, 64, 3))
    nearest(np.array(mapped[:2]), mapped, 3, "exact")
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    resident = sum(int(part.split("Rss:")[1].split()[0]) for part in maps) * 1024
    assert resident < 16e6


def test_the_tree_is_approximate_and_says_so(monkeypatch, caplog):
    """Images with structure, as real ones have: points of a 6-dimensional surface, and noise."""
    size = 12_000
    monkeypatch.setattr(search, "TREE_IMAGES", size)
    generator = np.random.default_rng(0)
    surface = np.tanh(generator.normal(size=(size, 6)) @ generator.normal(size=(6, 64)))
    images = np.clip(127.5 + 100 * surface + 4 * generator.normal(size=surface.shape), 0, 255).astype(np.uint8)
    rows = np.arange(0, size, size // 30)
    with caplog.at_level("INFO", logger="retrack_jax"):
        indices, distances = nearest(images[rows], images, 10, "scann", exclude=rows)
    assert "by scann tree: asked for; approximate" in caplog.text
    expected_indices, expected_distances = nearest(images[rows], images, 10, "exact", exclude=rows)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices, expected_indices, strict=True)])
    assert recall > 0.9 and not np.isin(indices, rows).any() and (np.diff(distances, axis=1) >= 0).all()
    same = indices == expected_indices
    np.testing.assert_array_equal(distances[same], expected_distances[same])


@pytest.mark.parametrize("k", [140, 150])
def test_what_the_tree_does_not_fill_is_searched_exactly(monkeypatch, k):
    monkeypatch.setattr(search, "TREE_IMAGES", 100)
    images = pixels(17, 150, 8)
    assert_same(nearest(images[:3], images, k, "scann"), oracle(images[:3], images, k))


def test_more_ties_than_scann_is_asked_for():
    """Nothing certifies which of them brute force returned, so the exact search decides."""
    images = np.repeat(pixels(18, 2, 40), 100, axis=0)
    assert_same(nearest(images[:1], images, 5, "scann"), oracle(images[:1], images, 5))


def test_an_image_that_is_not_finite_is_named_by_scann_too():
    images = np.random.default_rng(0).normal(size=(50, 9)).astype(np.float32)
    images[17, 3] = np.nan
    with pytest.raises(ValueError, match="image 17 holds values that are not finite"):
        nearest(images[:1], images, 3, "scann")
