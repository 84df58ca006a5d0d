"""Prepared sets, in parquet files and as TFDS keeps them: rows in their order, names, labels, and what is damaged."""

import json
import shutil
import time

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.data.sources import tfds as tfds_source
from retrack_jax.data.sources.cifar10 import OFFICIAL_LABELS, other_name
from retrack_jax.data.sources.load import load_images


def load(tmp_path, source, **fields):
    return load_images({"source": source, "cache_dir": str(tmp_path / "cache")} | fields)


class TestParquet:
    def test_rows_labels_and_several_files(self, tmp_path, parquet_file):
        folder, first = parquet_file(range(100), name="data/train-00000-of-00002.parquet")
        _, second = parquet_file(range(30), name="data/train-00001-of-00002.parquet")
        parquet_file(range(7), name="data/test-00000-of-00001.parquet")
        images = load(tmp_path, "parquet", dir=str(folder.parent))
        np.testing.assert_array_equal(images.images, np.concatenate([first, second]))
        np.testing.assert_array_equal(images.labels, [*range(100), *range(30)])
        assert images.ids[0] == "hf:0" and images.ids[-1] == "hf:129"

    @pytest.mark.parametrize("page", [0, 1])
    def test_damaged_page_names_its_file(self, tmp_path, parquet_file, page):
        """A reader's OSError is no full disk; page 1 lies in the second file."""
        for part in range(2):
            folder, _ = parquet_file(range(64), name=f"train-0000{part}-of-00002.parquet")
        path = folder / f"train-0000{page}-of-00002.parquet"
        content = bytearray(path.read_bytes())
        for position in range(200, len(content) - 2000, 50):
            content[position] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} is damaged: column 'img' cannot be read .*; download it again"):
            load(tmp_path, "parquet", dir=str(folder))

    @pytest.mark.parametrize(
        ("labels", "kind"), [(["cat", "dog"], "string"), ([1, None], "int64, 1 of 2 missing"), ([0.5, 1.0], "double")]
    )
    def test_labels_that_are_no_numbers(self, tmp_path, parquet_file, labels, kind):
        import pyarrow.parquet

        folder, _ = parquet_file(range(2))
        (path,) = folder.iterdir()
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.set_column(1, "label", pyarrow.array(labels)), path)
        with pytest.raises(UserError, match=rf"column 'label' of {folder} holds no whole numbers \({kind}\)"):
            load(tmp_path, "parquet", dir=str(folder))

    def test_a_later_file_without_the_column(self, tmp_path, parquet_file):
        folder, _ = parquet_file(range(3), name="train-00000-of-00002.parquet")
        parquet_file(range(3), name="train-00001-of-00002.parquet", column="picture")
        with pytest.raises(UserError, match="train-00001-of-00002.parquet has no column named img; it has picture, label"):
            load(tmp_path, "parquet", dir=str(folder))

    def test_damaged_file_and_column(self, tmp_path, parquet_file):
        folder, _ = parquet_file(range(5), column="picture")
        with pytest.raises(UserError, match="no column named image or img; it has picture, label"):
            load(tmp_path, "parquet", dir=str(folder))
        (folder / "train-00000-of-00001.parquet").write_bytes(b"nothing")
        with pytest.raises(UserError, match="not a readable parquet file"):
            load(tmp_path, "parquet", dir=str(folder))
        with pytest.raises(UserError, match=r"no train-\*.parquet"):
            load(tmp_path, "parquet", dir=str(tmp_path / "nowhere"))


class TestCifar10:
    def test_orders(self):
        assert other_name("hf:10000") == "tfds:train_20000" and other_name("hf:10009") == "tfds:train_20009"
        assert other_name("hf:0") == "tfds:train_30000" and other_name("hf:49999") == "tfds:train_09999"
        assert all(other_name(other_name(f"hf:{row}")) == f"hf:{row}" for row in range(0, 50_000, 777))
        assert other_name("hf:50000") is None and other_name("hf:x") is None and other_name("10001.jpg") is None

    @pytest.mark.parametrize("right", [True, False])
    def test_official_labels_are_checked(self, tmp_path, parquet_file, right):
        labels = np.zeros(10_010, np.int64)
        labels[10_000:] = OFFICIAL_LABELS if right else OFFICIAL_LABELS[::-1]
        folder, _ = parquet_file(labels, size=1, row_group_size=4000)
        if right:
            assert len(load(tmp_path, "cifar10", dir=str(folder))) == 10_010
        else:
            with pytest.raises(UserError, match="image hf:10000 of cifar10 has label 2, and in CIFAR-10 it is 8"):
                load(tmp_path, "cifar10", dir=str(folder))

    def test_tfds(self, tmp_path, tfds_dir):
        images = load(tmp_path, "cifar10", format="tfds", dir=str(tfds_dir))
        assert images.ids == tuple(f"tfds:train_{row:05d}" for row in range(50))
        np.testing.assert_array_equal(images.images.reshape(50, -1)[:, 0], np.arange(50))
        np.testing.assert_array_equal(images.labels, np.arange(50) * 3 % 10)


class TestTfds:
    def test_mnist_rows_are_in_the_original_order(self, tmp_path, tfds_dir):
        images = load(tmp_path, "tfds", tfds_name="mnist", dir=str(tfds_dir))
        np.testing.assert_array_equal(images.images.reshape(40, -1)[:, 0], np.arange(40))
        np.testing.assert_array_equal(images.labels, np.arange(40) % 10)
        assert images.images.shape == (40, 28, 28, 1) and images.ids[1] == "tfds:train_1"

    def test_celeb_a_hq_names(self, tmp_path, tfds_dir):
        images = load(tmp_path, "tfds", tfds_name="celeb_a_hq/32", dir=str(tfds_dir))
        assert images.ids == tuple(f"{row}.png" for row in range(10000, 10012))
        np.testing.assert_array_equal(images.images.reshape(12, -1)[:, 0], np.arange(12))

    def test_mnist_tshirt(self, tmp_path, tfds_dir):
        images = load(tmp_path, "mnist_tshirt", dir=str(tfds_dir), copies=6)
        assert len(images) == 46 and images.ids[40] == "tshirt_000" and (images.labels[40:] == 10).all()
        assert (images.images[40:].reshape(6, -1)[:, 0] == 1).all()  # Fashion-MNIST's image 1
        assert (images.images[40:] == images.images[40]).all()

    def test_missing_set_fails_at_once_and_says_what_to_do(self, tmp_path):
        start = time.monotonic()
        with pytest.raises(UserError, match="tfds build mnist --data_dir=.*--file_format=array_record"):
            load(tmp_path, "mnist_tshirt", dir=str(tmp_path), copies=6)
        with pytest.raises(UserError, match="tfds build celeb_a_hq/256"):
            load(tmp_path, "celebahq", format="tfds", dir=str(tmp_path))
        assert time.monotonic() - start < 5

    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    @pytest.mark.parametrize("damage", ["flip", "cut", "short", "empty"])
    def test_damaged_records(self, tmp_path, tfds_dir, name, damage):
        shutil.copytree(tfds_dir / name, tmp_path / name)
        (path,) = (tmp_path / name).glob(f"*/{name}-train.array_record*")
        content = path.read_bytes()
        flipped = bytes(byte ^ 0xFF for byte in content)
        path.write_bytes({"flip": flipped, "cut": content[: len(content) // 2], "short": content[:700], "empty": b""}[damage])
        get = f"tfds build {name} --data_dir={tmp_path} --file_format=array_record"
        with pytest.raises(UserError, match=f"cannot read the TFDS data set in {path.parent} .*prepare it again: {get}"):
            load(tmp_path, "tfds", tfds_name=name, dir=str(tmp_path))

    @pytest.mark.parametrize("listed", ["30", "1000000000"])
    def test_another_number_of_records_than_dataset_info_lists(self, tmp_path, tfds_dir, listed):
        """With 30 the last ten images would be left out, and the rows of the others wrong."""
        shutil.copytree(tfds_dir / "mnist", tmp_path / "mnist")
        (info,) = (tmp_path / "mnist").glob("*/dataset_info.json")
        content = json.loads(info.read_text())
        next(split for split in content["splits"] if split["name"] == "train")["shardLengths"] = [listed]
        info.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"lists {listed} records of train, the files hold 40.*prepare it again: tfds build"):
            load(tmp_path, "tfds", tfds_name="mnist", dir=str(tmp_path))

    def test_records_are_read_only_to_be_decoded(self, tmp_path, tfds_dir, monkeypatch):
        before = load(tmp_path, "tfds", tfds_name="cifar10", dir=str(tfds_dir))
        monkeypatch.setattr(tfds_source, "_order", None)
        assert load(tmp_path, "tfds", tfds_name="cifar10", dir=str(tfds_dir)).ids == before.ids

    def test_damaged_set(self, tmp_path, tfds_dir):
        shutil.copytree(tfds_dir / "mnist", tmp_path / "mnist")
        (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").write_text("{")
        get = f"tfds build mnist --data_dir={tmp_path} --file_format"
        with pytest.raises(UserError, match=f"cannot read the TFDS data set .*{get}"):
            load(tmp_path, "tfds", tfds_name="mnist", dir=str(tmp_path))
        for path in (tmp_path / "mnist" / "3.0.1").glob("*.array_record*"):
            path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
        with pytest.raises(UserError, match="not prepared as array_record"):
            load(tmp_path, "tfds", tfds_name="mnist", dir=str(tmp_path))


class TestMnistTshirtParquet:
    def test_two_sets(self, tmp_path, parquet_file):
        parquet_file(range(10), channels=1, column="image", folder="data/mnist")
        _, fashion = parquet_file([9, 0, 3], channels=1, column="image", folder="data/fashion_mnist")
        images = load(tmp_path, "mnist_tshirt", format="parquet", dir=str(tmp_path / "data"), copies=3)
        np.testing.assert_array_equal(images.images[10:], fashion[[1, 1, 1]])
        np.testing.assert_array_equal(images.labels, [*range(10), 10, 10, 10])

    def test_image_1_must_be_a_tshirt(self, tmp_path, parquet_file):
        parquet_file(range(10), channels=1, column="image", folder="data/mnist")
        parquet_file([0, 9, 3], channels=1, column="image", folder="data/fashion_mnist")
        with pytest.raises(UserError, match="is not a T-shirt"):
            load(tmp_path, "mnist_tshirt", format="parquet", dir=str(tmp_path / "data"), copies=3)

    def test_ready_made(self, tmp_path, parquet_file):
        folder, pixels = parquet_file([1, 2, 10, 10], channels=1, column="image")
        images = load(tmp_path, "mnist_tshirt", format="parquet", dir=str(folder), copies=606)
        np.testing.assert_array_equal(images.images, pixels)
        assert images.ids == ("hf:0", "hf:1", "hf:2", "hf:3")
        with pytest.raises(UserError, match="config.data.copies_label is 7, and .* has T-shirts with labels"):
            load(tmp_path, "mnist_tshirt", format="parquet", dir=str(folder), copies=606, copies_label=7)
