"""The tree index: recall against the exact search, exclusions at query time, saving and loading, damaged files."""

import json
import logging
import resource
from types import SimpleNamespace

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.neighbors import cache, exact
from retrack_jax.neighbors.scann_index import ScannIndex


@pytest.fixture(scope="module")
def images():
    """Images with structure, as real ones have: points of a 6-dimensional surface, and noise."""
    generator = np.random.default_rng(0)
    surface = np.tanh(generator.normal(size=(3000, 6)) @ generator.normal(size=(6, 64)))
    return np.clip(127.5 + 100 * surface + 4 * generator.normal(size=surface.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def index(images):
    return ScannIndex.build(images, tree=True)


def recall(found, true):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, true, strict=True)])


def test_recall_distances_and_exclusions(images, index):
    rows = np.arange(0, 3000, 30)
    exclude = [(np.arange(100), rows)]
    found, distances = index.search(images[rows], images, 10, exclude)
    true, true_distances = exact.search(images[rows], images, 10, exclude)
    assert index.recall >= 0.99 and recall(found, true) >= 0.99
    assert not np.isin(found, rows).any()
    same = (found == true).all(axis=1)
    np.testing.assert_allclose(distances[same], true_distances[same], rtol=1e-12)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_saved_index_answers_alike(images, index, tmp_path):
    index.save(tmp_path / "index")
    loaded = ScannIndex.load(tmp_path / "index", len(images))
    for one, other in zip(index.search(images[:20], images, 7), loaded.search(images[:20], images, 7), strict=True):
        np.testing.assert_array_equal(one, other)
    assert loaded.recall == index.recall and not list(tmp_path.glob(".*"))


def test_an_index_that_cannot_be_written_is_one_line_and_leaves_what_was_there(index, tmp_path):
    index.save(tmp_path / "index")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(UserError, match="cannot write .*index: .*cache_dir"):
            index.save(tmp_path / "index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ScannIndex.load(tmp_path / "index", 3000) is not None and not list(tmp_path.glob(".*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        index.save(tmp_path / "file" / "index")


@pytest.mark.parametrize("name", ["hashed_dataset.npy", "manifest.json", "scann_config.pb"])
def test_damaged_index_is_not_loaded(index, tmp_path, caplog, name):
    index.save(tmp_path / "index")
    path = tmp_path / "index" / name
    path.write_bytes(path.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        assert ScannIndex.load(tmp_path / "index", 3000) is None
    assert "building it again" in caplog.text
    assert ScannIndex.load(tmp_path / "nowhere", 3000) is None


@pytest.mark.parametrize(("field", "value"), [("leaves", 1), ("size", 2999), ("largest_norm", 0.0), ("recall", 1.0)])
def test_changed_manifest_is_not_loaded(index, tmp_path, caplog, field, value):
    index.save(tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest[field] != value
    path.write_text(json.dumps(manifest | {field: value}))
    with caplog.at_level(logging.WARNING):
        assert ScannIndex.load(tmp_path / "index", 3000) is None
    assert "building it again" in caplog.text


def test_an_index_of_fewer_images_is_not_loaded(index, tmp_path):
    index.save(tmp_path / "index")
    assert ScannIndex.load(tmp_path / "index", 3001) is None


def test_a_low_recall_is_told(caplog):
    """Noise has no structure that a tree could use; what it misses is said, not promised away."""
    noise = np.random.default_rng(0).integers(0, 256, (2000, 1024), dtype=np.uint8)
    with caplog.at_level(logging.WARNING):
        built = ScannIndex.build(noise, tree=True)
    assert built.recall < 0.99 and "misses none" in caplog.text


def test_asked_for_everything_it_finds_everything(images):
    small = images[:300]
    found, _ = ScannIndex.build(small, tree=True).search(small[:3], small, 290, [(np.arange(3), np.arange(10))])
    np.testing.assert_array_equal(found, exact.search(small[:3], small, 290, [(np.arange(3), np.arange(10))])[0])


def test_no_local_folder_no_tree(images):
    with pytest.raises(ValueError, match="config.data.cache_dir is gs://bucket/cache; ScaNN's tree is kept in local folders"):
        cache.kept_index(SimpleNamespace(images=images, digest="one"), "gs://bucket/cache")


def test_repeated_deletions_build_one_index(images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TREE_IMAGES", 1000)
    builds = []
    build = ScannIndex.build.__func__
    monkeypatch.setattr(ScannIndex, "build", classmethod(lambda cls, *a, **b: builds.append(1) or build(cls, *a, **b)))
    image_set = SimpleNamespace(images=images.reshape(-1, 8, 8, 1), digest="one")
    for row in (5, 6, 7):
        rows = np.array([row])
        found, _ = cache.cached_nearest(image_set, rows, 5, exclude=rows, cache_dir=tmp_path, backend="scann")
        assert row not in found
    assert len(builds) == 1
    cache.cached_nearest(
        SimpleNamespace(images=image_set.images, digest="two"), rows, 5, exclude=rows, cache_dir=tmp_path, backend="scann"
    )
    assert len(builds) == 2
