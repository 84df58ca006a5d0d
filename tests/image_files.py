"""Small data in each real format."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """Data sets that TFDS's own builders prepared (tests/make_tfds_fixtures.py)."""
    folder = tmp_path_factory.mktemp("tfds")
    with zipfile.ZipFile(Path(__file__).parents[0] / "fixtures" / "tfds.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def jpeg_folder(tmp_path):
    """Returns a function that writes `count` RGB JPEGs named as CelebA-HQ's, and returns (folder, decoded pixels)."""

    def make(count=12, size=16, start=0, suffix="jpg"):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        pixels = []
        for row in range(start, start + count):
            image = Image.fromarray(np.random.default_rng(row).integers(0, 256, (size, size, 3), dtype=np.uint8))
            path = folder / f"{row:05d}.{suffix}"
            image.save(path)
            pixels.append(np.asarray(Image.open(path)))
        return folder, np.stack(pixels)

    return make


@pytest.fixture
def parquet_file(tmp_path):
    """Returns a function that writes a Hugging Face image parquet file, and returns (folder, pixels)."""

    def make(
        labels, size=4, channels=3, column="img", folder="parquet", name="train-00000-of-00001.parquet", row_group_size=64, **more
    ):
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), size, size, channels), dtype=np.uint8)
        encoded = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image.squeeze()).save(buffer, "png")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({column: encoded, "label": np.asarray(labels, np.int64), **more})
        pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
        return path.parent, pixels

    return make
