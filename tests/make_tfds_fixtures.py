"""Writes tests/fixtures/tfds.zip: tiny data sets that TFDS itself prepared, so that `make test` needs no TensorFlow.

    pip install tensorflow-cpu tensorflow-datasets importlib_resources && python tests/make_tfds_fixtures.py

TFDS's own builders of MNIST, Fashion-MNIST, CIFAR-10 and CelebA-HQ prepare them, from source files in the original formats
that are
written here: image i of MNIST and its kin has value i in its first pixel, so a test can tell rows apart.
"""

import shutil
import struct
import sys
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TARGET = Path(__file__).with_name("fixtures") / "tfds"
ROWS = {"mnist": 40, "fashion_mnist": 12, "cifar10": 50, "celeb_a_hq": 12}


def pixels(seed: int, count: int, *shape: int) -> np.ndarray:
    """Smooth images (they compress), with the row's number in the first value."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 2, 2, *shape[2:]))
    images = np.kron(coarse, np.ones((1, shape[0] // 2, shape[1] // 2) + (1,) * len(shape[2:]))).astype(np.uint8)
    images.reshape(count, -1)[:, 0] = np.arange(count)
    return images


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    """MNIST's own format, as TFDS finds it after the download: gunzipped."""
    (folder / f"{prefix}_data").write_bytes(struct.pack(">IIII", 2051, len(images), 28, 28) + images.tobytes())
    (folder / f"{prefix}_labels").write_bytes(struct.pack(">II", 2049, len(labels)) + labels.astype(np.uint8).tobytes())


def prepare(builder) -> None:
    builder.download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(register_checksums=False)
    )


def mnist_like(name: str, seed: int, data_dir: Path, work: Path) -> None:
    from tensorflow_datasets.image_classification import mnist

    images = pixels(seed, ROWS[name], 28, 28)
    labels = np.arange(len(images)) % 10
    if name == "fashion_mnist":
        labels[1] = 0  # Fashion-MNIST's training image 1 is a T-shirt
    write_idx(work, "train", images, labels)
    write_idx(work, "test", images[:2], labels[:2])
    paths = {f"{split}_{kind}": str(work / f"{split}_{kind}") for split in ("train", "test") for kind in ("data", "labels")}
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    with (
        mock.patch.object(tfds.download.DownloadManager, "download_and_extract", lambda self, urls: paths),
        mock.patch.object(mnist, "_TRAIN_EXAMPLES", len(images)),
        mock.patch.object(mnist, "_TEST_EXAMPLES", 2),
    ):
        prepare(builder)


def cifar10(data_dir: Path, work: Path) -> None:
    folder = work / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("\n".join("airplane automobile bird cat deer dog frog horse ship truck".split()))
    images = pixels(3, ROWS["cifar10"], 32, 32, 3)
    labels = (np.arange(len(images)) * 3 % 10).astype(np.uint8)
    per_file = len(images) // 5
    for part in range(5):
        rows = range(part * per_file, (part + 1) * per_file)
        data = b"".join(labels[row].tobytes() + images[row].transpose(2, 0, 1).tobytes() for row in rows)
        (folder / f"data_batch_{part + 1}.bin").write_bytes(data)
    (folder / "test_batch.bin").write_bytes(labels[0].tobytes() + images[0].transpose(2, 0, 1).tobytes())
    builder = tfds.builder("cifar10", data_dir=data_dir, file_format="array_record")
    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(work)):
        prepare(builder)


def celeb_a_hq(data_dir: Path, work: Path) -> None:
    """Names as a user's own tar may have them; a resolution of 32 keeps the fixture small."""
    images = pixels(4, ROWS["celeb_a_hq"], 32, 32, 3)
    with tarfile.open(work / "data32x32.tar", "w") as archive:
        for row, image in enumerate(images):
            path = work / f"{10000 + row}.png"
            Image.fromarray(image).save(path)
            archive.add(path, arcname=path.name)
    builder = tfds.builder("celeb_a_hq/32", data_dir=data_dir, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=work)
    builder.download_and_prepare(file_format="array_record", download_config=config)


def main() -> None:
    makers = {
        "mnist": lambda data, work: mnist_like("mnist", 1, data, work),
        "fashion_mnist": lambda data, work: mnist_like("fashion_mnist", 2, data, work),
        "cifar10": cifar10,
        "celeb_a_hq": celeb_a_hq,
    }
    with tempfile.TemporaryDirectory() as data_dir:
        for make in makers.values():
            with tempfile.TemporaryDirectory() as work:
                make(Path(data_dir), Path(work))
        # array_record pads its files with zeros to 128 KiB, which the archive takes away.
        shutil.make_archive(str(TARGET), "zip", data_dir)
    print(f"{TARGET}.zip: {TARGET.with_suffix('.zip').stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
