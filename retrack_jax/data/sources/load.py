"""The door to all sources: images, captioned or not, or concepts from the fields of `config.data`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

from retrack_jax.checks import check, shown
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.sources.concepts import Concept
from retrack_jax.data.sources.folder import named_images
from retrack_jax.data.sources.table import SOURCES, complete_fields

log = logging.getLogger(__name__)


def load_images(data: Mapping) -> ImageSet:
    """Returns the images that the fields of `config.data` describe.

    Args:
      data: `source`; and, with defaults, `dir`, `format`, `copies`, `resolution`, `crop`, `channels`, `skip_corrupt`,
        `cache_dir`, `split`, `tfds_name`, as config/options.py explains them.

    Raises:
      UserError: anything that the user can fix: an unknown source, missing or damaged files, images that do not agree.
    """
    data = complete_fields(data)
    check(
        not SOURCES[data["source"]].gives_concepts,
        f"config.data.source is {data['source']!r}, which holds concepts with prompts and not one set of images; choose another",
    )
    return SOURCES[data["source"]].load(data)


def load_captioned_images(data: Mapping) -> ImageSet:
    """Returns `load_images(data)` with the caption of each image.

    Raises:
      UserError: as `load_images`; the source has no captions; an image has none, or several.
    """
    data = complete_fields(data)
    source, names = SOURCES[data["source"]], [name for name, one in SOURCES.items() if one.captions]
    check(
        source.captions is not None,
        f"the network in config.checkpoint takes a prompt, and images of the source {data['source']!r} have no captions; "
        f"config.data.source may be {' or '.join(names)}",
    )
    images = load_images(data)
    captions = source.captions(data, images)
    if empty := [name for name, caption in zip(images.ids, captions, strict=True) if not caption.strip()]:
        log.warning("%d captions are empty; their pictures are trained without a prompt: %s", len(empty), shown(empty))
    return dataclasses.replace(images, captions=captions)


def load_concepts(data: Mapping) -> Callable[[str], Concept]:
    """Returns `name -> concept` of those that the fields of `config.data` describe. Raises `UserError` for plain images."""
    data = complete_fields(data)
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
    data = complete_fields(data)
    return named_images(data) if data["format"] == "folder" and data["dir"] else None
