"""IDX files: the values as they were written, and damage of every kind in one line before memory is taken."""

import gzip

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.data.sources.idx import read_idx
from retrack_jax.data.sources.load import load_images

PIXELS = np.arange(6 * 4 * 5, dtype=np.uint8).reshape(6, 4, 5)
LABELS = np.array([5, 0, 4, 1, 9, 2], np.uint8)


def idx(values: np.ndarray, sizes=None, magic=None) -> bytes:
    magic = bytes((0, 0, 8, values.ndim)) if magic is None else magic
    return magic + b"".join(int(size).to_bytes(4) for size in sizes or values.shape) + values.tobytes()


def write_set(folder, pixels=PIXELS, labels=LABELS, *, prefix="train", ending="", separator="-"):
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if ending else bytes
    for kind, values in (("images", pixels), ("labels", labels)):
        if values is not None:
            name = f"{prefix}-{kind}{separator}idx{values.ndim}-ubyte{ending}"
            (folder / name).write_bytes(pack(idx(values)))
    return folder


def load(folder, source="idx", **fields):
    return load_images({"source": source, "dir": str(folder)} | fields)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_values_names_and_labels(tmp_path, ending, separator):
    images = load(write_set(tmp_path, ending=ending, separator=separator))
    np.testing.assert_array_equal(images.images, PIXELS[..., None])
    np.testing.assert_array_equal(images.labels, LABELS)
    assert images.ids == tuple(f"idx:{row}" for row in range(6)) and images.labels.dtype == np.int64


def test_the_split_chooses_the_files(tmp_path):
    write_set(tmp_path)
    write_set(tmp_path, PIXELS[:2], LABELS[:2], prefix="t10k")
    assert len(load(tmp_path)) == 6 and len(load(tmp_path, split="test")) == 2
    with pytest.raises(UserError, match="no file more-images-idx3-ubyte or .gz in .* set config.data.dir"):
        load(tmp_path, split="more")


def test_labels_may_be_missing_but_must_agree(tmp_path):
    assert load(write_set(tmp_path / "a", labels=None)).labels is None
    with pytest.raises(UserError, match="has 6 images and .*labels-idx1-ubyte 3 labels"):
        load(write_set(tmp_path / "b", labels=LABELS[:3]))


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with nothing"),
        (idx(LABELS), "begins with 00000801, and IDX of this kind with 00000803"),
        (idx(PIXELS, magic=b"\x00\x00\x0d\x03"), "begins with 00000d03"),  # floats
        (b"\x89PNG" + bytes(200), "begins with 89504e47"),
        (idx(PIXELS)[:9], "ends in its header"),
        (idx(PIXELS)[:-1], r"120 values, and holds 119|cannot hold them"),
        (idx(PIXELS) + b"\0", "holds more"),
        (idx(PIXELS, sizes=(0, 4, 5)), "cannot hold them"),
        (idx(PIXELS, sizes=(2**32 - 1,) * 3), "cannot hold them"),
    ],
)
def test_damage(tmp_path, ending, content, message):
    path = tmp_path / f"train-images-idx3-ubyte{ending}"
    path.write_bytes(gzip.compress(content) if ending else content)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[:-12], lambda packed: packed[:30] + b"\xff" * 30, lambda packed: b"IDX"]
)
def test_damaged_gzip(tmp_path, damage):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (9, 9, 9), np.uint8)))))
    with pytest.raises(UserError, match="cannot be read .* download it again"):
        read_idx(path, 3)


def test_no_more_memory_is_taken_than_is_free(tmp_path, monkeypatch):
    """A gzip file of 1 MB may claim 1 GB honestly; the limit is then the machine's memory."""
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((100, 100, 100), np.uint8))))
    assert read_idx(path, 3).size == 10**6
    monkeypatch.setattr("retrack_jax.data.sources.idx.available_memory", lambda: 10**6 - 1)
    with pytest.raises(UserError, match="needs 0.0 GB of memory, more than is free"):
        read_idx(path, 3)


def test_a_conversion_is_refused(tmp_path):
    write_set(tmp_path)
    with pytest.raises(UserError, match="images of 5x4 and config.data.resolution is 32"):
        load(tmp_path, resolution=32)
    with pytest.raises(UserError, match="config.data.channels is 3, but the arrays of 'idx'"):
        load(tmp_path, channels=3)


class TestMnistTshirt:
    def load(self, tmp_path, **fields):
        return load(tmp_path, "mnist_tshirt", format="idx", copies=3, **fields)

    def test_two_folders(self, tmp_path):
        write_set(tmp_path / "mnist", ending=".gz")
        fashion = PIXELS[::-1]
        write_set(tmp_path / "fashion_mnist", fashion, np.array([9, 0, 0, 3, 0, 2], np.uint8))
        images = self.load(tmp_path)
        np.testing.assert_array_equal(images.images[6:, ..., 0], fashion[[1, 1, 1]])
        np.testing.assert_array_equal(images.labels, [*LABELS, 10, 10, 10])
        assert images.ids[5:7] == ("mnist_00005", "tshirt_000")
        np.testing.assert_array_equal(self.load(tmp_path, copies_label=7).labels, [*LABELS, 7, 7, 7])

    def test_labels_are_needed_and_image_1_must_be_a_tshirt(self, tmp_path):
        write_set(tmp_path / "mnist")
        write_set(tmp_path / "fashion_mnist", labels=None)
        with pytest.raises(UserError, match="fashion_mnist has no labels"):
            self.load(tmp_path)
        write_set(tmp_path / "fashion_mnist", labels=LABELS + 1)
        with pytest.raises(UserError, match="is not a T-shirt"):
            self.load(tmp_path)
