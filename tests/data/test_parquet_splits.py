"""Splits and configs of parquet files: rows of another split are never read, and several configs are refused."""

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.data.sources.load import load_images
from retrack_jax.data.sources.parquet_splits import parquet_files


def make(folder, *names):
    for name in names:
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def chosen(folder, split="train"):
    return [path.relative_to(folder).with_suffix("").as_posix() for path in parquet_files(folder, split)]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"], "train", [0, 1]),
        (["data/train-00000-of-00001-5a3b0f", "data/test-00000-of-00001-1c2d"], "test", [1]),
        (["default/train/0000", "default/train/0001", "default/test/0000"], "train", [0, 1]),
        (["default/train/0000", "default/test/0000"], "test", [1]),
        (["default/partial-train/0000", "default/partial-test/0000"], "train", [0]),
        (["train/a", "test/a", "validation/a"], "validation", [2]),
        (["train/part-0", "train/part-1", "val/part-0"], "train", [0, 1]),
        (["cifar-train", "cifar-test"], "train", [0]),
        (["mnist_train", "mnist_test"], "test", [1]),
        (["train_images", "test_images"], "train", [0]),
        (["x.train.0", "x.train.1", "x.test.0"], "train", [0, 1]),
        (["train", "test"], "test", [1]),
        (["training-0", "testing-0"], "train", [0]),
        (["valid-00000-of-00001", "train-00000-of-00001"], "validation", [0]),
        (["train-00000-of-00001", "train_extra-00000-of-00001"], "train", [0]),
        (["train-00000-of-00001", "train_extra-00000-of-00001"], "train_extra", [1]),
        (["default/train/0000", "default/extra/0000"], "train", [0]),
        (["default/train/0000", "default/extra/0000"], "extra", [1]),
        (["train-00000-of-00001", "unsupervised-00000-of-00001"], "unsupervised", [1]),
        (["a", "b"], "train", [0, 1]),
        (["0000", "0001"], "train", [0, 1]),
        (["year=2020/0", "year=2021/0"], "train", [0, 1]),
        (["2020/0", "2021/0"], "train", [0, 1]),
        ([".cache/train-00000-of-00001", "train-00000-of-00001"], "train", [1]),
        (["train_0001", "train_0002", "test_0001"], "train", [0, 1]),
    ],
)
def test_files_of_a_split(tmp_path, names, split, expected):
    make(tmp_path, *names)
    assert chosen(tmp_path, split) == [names[row] for row in expected]


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["full/train-00000-of-00001", "small/train-00000-of-00001"], "train"),
        (["full/train/0000", "small/train/0000"], "train"),
        (["train/full/0000", "train/small/0000"], "train"),
        (["full/0000", "small/0000"], "train"),
        (["full-train", "small-train"], "train"),
        (["full/extra/0000", "small/extra/0000"], "extra"),
        (["train-00000-of-00001", "data/train-00000-of-00001"], "train"),
    ],
)
def test_several_configs_are_refused_and_named(tmp_path, names, split):
    make(tmp_path, *names)
    shown = ", ".join(f"{name}.parquet" for name in sorted(names, key=lambda name: name.split("/")))
    with pytest.raises(UserError) as error:
        parquet_files(tmp_path, split)
    assert f"{tmp_path} holds 2 configs of a data set with split {split} ({shown}); set config.data.dir" in str(error.value)
    one = tmp_path / f"{names[0]}.parquet"
    assert parquet_files(one, split) == [one]


@pytest.mark.parametrize(
    ("names", "split", "there"),
    [
        (["test-00000-of-00001", "validation/0"], "train", ", which has test, validation"),
        (["a", "b"], "test", ""),  # files without a split are the training images, as on the hub
        (["train_extra-00000-of-00001"], "train", ", which has train_extra"),
        ([], "train", ""),
    ],
)
def test_a_split_that_is_not_there(tmp_path, names, split, there):
    make(tmp_path, *names)
    with pytest.raises(UserError) as error:
        parquet_files(tmp_path, split)
    assert f"no {split}-*.parquet in {tmp_path} or below it{there}; set config.data.dir or config.data.split" in str(error.value)


def test_rows_of_folders_that_are_splits(tmp_path, parquet_file):
    """Files of one name and size: neither the rows nor the cache mix them up."""
    folder, train = parquet_file(range(2), folder="hub/default/train", name="0000.parquet")
    _, test = parquet_file(range(3), folder="hub/default/test", name="0000.parquet")
    for split, pixels in (("train", train), ("test", test)):
        data = {"source": "parquet", "dir": str(tmp_path / "hub"), "split": split, "cache_dir": str(tmp_path / "cache")}
        images = load_images(data)
        np.testing.assert_array_equal(images.images, pixels)
        assert images.ids == tuple(f"hf:{row}" for row in range(len(pixels)))


def test_one_file_is_taken_whatever_its_name(tmp_path, parquet_file):
    folder, pixels = parquet_file(range(4), name="small-test.parquet")
    data = {"source": "parquet", "dir": str(folder / "small-test.parquet"), "cache_dir": str(tmp_path / "cache")}
    np.testing.assert_array_equal(load_images(data).images, pixels)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00001-of-00002"],
        ["train-00000-of-00003", "train-00002-of-00003"],
        ["train-00000-of-00001-5a3b0f", "train-00000-of-00002", "train-00001-of-00002"],
    ],
)
def test_a_split_that_is_not_whole_is_refused(tmp_path, names):
    """An image is named by its row over all files of the split: without the first, `hf:0` would be another."""
    make(tmp_path, *names)
    with pytest.raises(UserError, match=r"train-\*.parquet are not the files 0 to \d of \d \(there are \d of \d"):
        parquet_files(tmp_path)
