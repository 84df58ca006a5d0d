"""The door to all sources: images or concepts from the fields of `config.data`."""

from collections.abc import Mapping

from retrack_jax.checks import check
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.sources.concepts import Concepts
from retrack_jax.data.sources.folder import named_images
from retrack_jax.data.sources.source import complete_fields
from retrack_jax.data.sources.table import SOURCES


def load_images(data: Mapping) -> ImageSet:
    """Returns the images that the fields of `config.data` describe.

    Args:
      data: `source`; and, with defaults, `dir`, `format`, `copies`, `resolution`, `crop`, `channels`, `skip_corrupt`,
        `cache_dir`, `split`, `tfds_name`, as `DataOptions` of config/options.py explains them.

    Raises:
      UserError: anything that the user can fix: an unknown source, missing or damaged files, images that do not agree.
    """
    data = complete_fields(data, SOURCES)
    check(
        not SOURCES[data["source"]].gives_concepts,
        f"config.data.source is {data['source']!r}, which holds concepts with prompts and not one set of images; choose another",
    )
    return SOURCES[data["source"]].load(data)


def load_concepts(data: Mapping) -> Concepts:
    """Returns the concepts that the fields of `config.data` describe. Raises `UserError` for a source of plain images."""
    data = complete_fields(data, SOURCES)
    names = ", ".join(name for name, source in SOURCES.items() if source.gives_concepts)
    check(
        SOURCES[data["source"]].gives_concepts,
        f"config.data.source is {data['source']!r}, which has no prompts; choose one of {names}",
    )
    return SOURCES[data["source"]].load(data)


def known_names(data: Mapping) -> ImageSet | None:
    """Returns the names of the images as a set without pixels if they are known before decoding (a folder of images), else None.

    Raises:
      UserError: the folder is missing or holds no image.
    """
    data = complete_fields(data, SOURCES)
    return named_images(data) if data["format"] == "folder" and data["dir"] else None
