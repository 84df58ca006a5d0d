"""CelebA-HQ at 256 x 256: a folder of 30,000 JPEGs, or TFDS's `celeb_a_hq/256`, prepared from the user's own archive."""

from collections.abc import Iterator, Mapping

from retrack_jax.data.commands import hub, kaggle_folder
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement
from retrack_jax.data.sources.folder import folder_need, load_folder
from retrack_jax.data.sources.source import Source, data_folder
from retrack_jax.data.sources.tfds import load_tfds, tfds_need

_TFDS = "celeb_a_hq/256"


def _load(data: Mapping) -> ImageSet:
    return load_tfds(_TFDS, data) if data["format"] == "tfds" else load_folder(data)


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    if data["format"] == "tfds":
        yield tfds_need(_TFDS, data, first="put data256x256.tar into DATA_DIR/downloads/manual first")
    else:
        yield folder_need(data, kaggle_folder("datasets", "data/datasets/celeba_hq_256", data_folder(data)))


SOURCE = Source(
    formats=("folder", "tfds"),
    load=_load,
    needs=_needs,
    reads=("dir", "labels", "split"),
    checkpoint_command=lambda folder: hub("google/ddpm-ema-celebahq-256", folder),
)
