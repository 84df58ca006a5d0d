"""The k-means reader: what scikit-learn predicts, without unpickling; hostile and damaged files."""

import bz2
import gzip
import lzma
import os
import tracemalloc
import zlib

import joblib
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from retrack_jax.checks import UserError
from retrack_jax.metrics.kmeans import centers_from_labels, clusters, read_centers, success_rate
from retrack_jax.weights import joblib_reader

PIXELS = np.random.default_rng(0).random((40, 48)).astype(np.float32) * 255


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("bz2", 3), ("xz", 3), ("lzma", 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reads_what_scikit_learn_wrote(tmp_path, compress, dtype):
    model = KMeans(2, random_state=np.random.RandomState(3), n_init=1).fit(PIXELS.astype(dtype))
    joblib.dump(model, tmp_path / "k.joblib", compress=compress)
    centers = read_centers(tmp_path / "k.joblib")
    np.testing.assert_array_equal(centers, model.cluster_centers_)
    samples = PIXELS.reshape(40, 4, 4, 3) / np.float32(255)
    np.testing.assert_array_equal(clusters(samples, centers), model.predict(PIXELS.astype(dtype)))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["root", "attribute", "array"])
def test_hostile_files_run_nothing(tmp_path, place):
    hostile = Hostile(tmp_path / "ran")
    model = KMeans(2, n_init=1).fit(PIXELS)
    model.extra = hostile
    joblib.dump({"root": hostile, "attribute": model, "array": np.array([hostile], dtype=object)}[place], tmp_path / "k.joblib")
    with pytest.raises(UserError, match="refused, and nothing of it was run"):
        read_centers(tmp_path / "k.joblib")
    assert not (tmp_path / "ran").exists()
    joblib.load(tmp_path / "k.joblib")
    assert (tmp_path / "ran").exists()  # the file is hostile indeed


@pytest.mark.parametrize(
    ("value", "message"),
    [(KMeans(2), "without cluster centers"), ({"a": 1}, "holds a dict"), (PCA(2).fit(PIXELS), "PCA"), (np.zeros(3), "ndarray")],
)
def test_files_of_something_else_are_refused(tmp_path, value, message):
    joblib.dump(value, tmp_path / "k.joblib")
    with pytest.raises(UserError, match=message):
        read_centers(tmp_path / "k.joblib")


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no file"):
        read_centers(tmp_path / "k.joblib")
    joblib.dump(KMeans(2, n_init=1).fit(PIXELS), tmp_path / "k.joblib")
    whole = (tmp_path / "k.joblib").read_bytes()
    for size in (0, 1, 10, 100, len(whole) // 2, len(whole) - 5):
        (tmp_path / "k.joblib").write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole joblib file|is damaged"):
            read_centers(tmp_path / "k.joblib")


NESTED = b"\x80\x04)" + b"\x85" * 2_000_000 + b"."


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zlib.compress, bz2.compress, lzma.compress])
def test_tuples_without_end_are_one_line(tmp_path, compress):
    (tmp_path / "k.joblib").write_bytes(compress(NESTED))
    with pytest.raises(UserError, match="tuples 101 deep"):
        read_centers(tmp_path / "k.joblib")


def lzma_alone(data):
    return lzma.compress(data, lzma.FORMAT_ALONE)


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, bz2.compress, lzma.compress, lzma_alone])
def test_a_small_file_that_unpacks_to_much_is_refused(tmp_path, monkeypatch, compress):
    monkeypatch.setattr(joblib_reader, "MAX_BYTES", 1 << 20)
    (tmp_path / "k.joblib").write_bytes(compress(bytes(64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="unpacks to more than 1 MiB|emory usage limit"):
            read_centers(tmp_path / "k.joblib")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"f4", b"O8"), (b"f4", b"V9"), (b"cluster_centers_", b"cluster_centerz_"), (b"NumpyArrayWrapper", b"NumpyArrayWrappex")],
)
def test_a_changed_word_is_refused(tmp_path, old, new):
    joblib.dump(KMeans(2, n_init=1).fit(PIXELS), tmp_path / "k.joblib")
    data = (tmp_path / "k.joblib").read_bytes()
    assert old in data
    (tmp_path / "k.joblib").write_bytes(data.replace(old, new))
    with pytest.raises(UserError):
        read_centers(tmp_path / "k.joblib")


def test_with_any_bytes_changed_it_is_read_or_refused(tmp_path):
    joblib.dump(KMeans(2, n_init=1).fit(PIXELS), tmp_path / "k.joblib")
    data = (tmp_path / "k.joblib").read_bytes()
    numbers, refused = np.random.default_rng(0), 0
    for _ in range(500):
        changed = bytearray(data)
        for place in numbers.integers(len(data), size=3):
            changed[place] = numbers.integers(256)
        (tmp_path / "k.joblib").write_bytes(changed)
        try:
            read_centers(tmp_path / "k.joblib")
        except UserError:
            refused += 1
    assert refused > 50


def test_a_fifo_and_a_pointer_are_named(tmp_path):
    os.mkfifo(tmp_path / "k.joblib")
    with pytest.raises(UserError, match="no regular file"):
        read_centers(tmp_path / "k.joblib")
    (tmp_path / "l.joblib").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_centers(tmp_path / "l.joblib")


def test_big_endian_and_fortran_arrays_are_read(tmp_path):
    model = KMeans(2, n_init=1).fit(PIXELS)
    centers = model.cluster_centers_
    for array in (centers.astype(">f8"), np.asfortranarray(centers)):
        model.cluster_centers_ = array
        joblib.dump(model, tmp_path / "k.joblib")
        np.testing.assert_array_equal(read_centers(tmp_path / "k.joblib"), centers)


def test_success_needs_every_sample_in_cluster_0():
    black, white = np.zeros((1, 2, 2, 3)), np.ones((1, 2, 2, 3))
    centers = np.stack([np.full(12, 20.0), np.full(12, 240.0)])
    assert success_rate(np.concatenate([black, black]), centers) == 1.0
    assert success_rate(np.concatenate([black, white]), centers) == 0.0
    # Distances are taken at 255 x: halfway between the centers is 130 / 255.
    assert list(clusters(np.full((1, 2, 2, 3), 129 / 255), centers)) == [0]
    assert list(clusters(np.full((1, 2, 2, 3), 131 / 255), centers)) == [1]
    with pytest.raises(UserError, match="one image size"):
        success_rate(np.zeros((1, 4, 4, 3)), centers)
    with pytest.raises(UserError, match="at least one sample"):
        success_rate(np.zeros((0, 2, 2, 3)), centers)


def test_centers_from_labels_are_where_k_means_converges():
    numbers = np.random.default_rng(1)
    images = np.concatenate([numbers.integers(0, 60, (6, 4, 4, 3)), numbers.integers(200, 256, (5, 4, 4, 3))]).astype(np.uint8)
    labels = np.array([0] * 6 + [1] * 5)
    centers = centers_from_labels(images, labels)
    flat = images.reshape(11, -1).astype(np.float64)
    fitted = KMeans(2, init=centers, n_init=1).fit(flat)
    np.testing.assert_allclose(fitted.cluster_centers_, centers)
    np.testing.assert_array_equal(fitted.labels_, labels)
    with pytest.raises(UserError, match="no image has label 1"):
        centers_from_labels(images, np.zeros(11))
