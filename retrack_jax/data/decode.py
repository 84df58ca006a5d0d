"""Encoded images (JPEG, PNG, WebP, whatever Pillow reads) to uint8 pixels of one size, several at once.

The rules, in this order: take the first frame; turn by the EXIF orientation; with `resolution` S, scale the shorter side to S
(Lanczos) and cut the center S x S; an image that is S x S already keeps its pixels as they are. Gray values of 16 bits become 8
by division by 257, so that white stays white.

No image may have more than `MAX_PIXELS`, as it is or when scaled; its header is checked before memory is taken.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retrack_jax.checks import UserError, check_choice, check_int, shown
from retrack_jax.data.in_order import in_order

CROPS = ("center", "none")
VERSION = 4  # of these rules, and of what the cache keeps of an image; it keys the cache
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3  # Pillow's own bound, beyond which it warns: 256 MB of RGB
_AHEAD = 16  # images in flight for each worker
_MODES = {"L": 1, "RGB": 3}
_NO_RANGE = ("I", "F")  # 32-bit values: nothing says which is white, and Pillow's own conversion clips them at 255
_TO_8_BITS = 257  # 65535 / 255
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How images become pixels.

    Attributes:
      resolution: side in pixels of the square that images become; 0 keeps them as they are, and they must then agree.
      crop: `center`, or `none` to refuse an image that is not square.
      channels: 1 or 3 converts whatever comes; 0 takes what the first image has and refuses one that differs (a grey one
        among RGB).
      skip_corrupt: leave out, rather than refuse, images that cannot be decoded.
    """

    resolution: int = 0
    crop: str = "center"
    channels: int = 0
    skip_corrupt: bool = False

    def __post_init__(self):
        check_int("config.data.resolution", self.resolution, minimum=0)
        check_choice("config.data.crop", self.crop, CROPS)
        if self.channels not in (0, 1, 3):
            raise UserError(f"config.data.channels is {self.channels!r}; it must be 0 (as the images are), 1 or 3")


class CorruptImage(Exception):
    """An image that cannot be decoded; the message says why, without its name."""


class Decoded(NamedTuple):
    """An image.

    Attributes:
      pixels: uint8 `[H, W, C]`. A palette image, or one with transparency, has 3 channels only if they are asked for.
      size: its height and width before it was scaled.
      is_animated: whether the file has several frames; this is the first.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    is_animated: bool


def decode(name: str, source: bytes | Path, options: DecodeOptions) -> Decoded:
    """Returns one image, of which messages speak by `name`.

    Raises:
      CorruptImage: it cannot be decoded.
      UserError: it cannot be read, or is of a kind or shape that `options` refuse.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            _check_pixels(image, options)
            is_animated = getattr(image, "is_animated", False)
            image.load()
            image = ImageOps.exif_transpose(image)
    except (CorruptImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:  # twice the bound: Pillow does not open it
        raise CorruptImage(f"more than {MAX_PIXELS / 1e6:.0f} million pixels") from error
    except UnidentifiedImageError as error:  # its message names an object in memory
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        raise CorruptImage("not an image of a known kind" if size else "empty") from error
    except Exception as error:  # Pillow raises many kinds for a broken file: OSError, SyntaxError, ValueError, struct.error
        if getattr(error, "errno", None) is not None:  # the system's word, not Pillow's: the file is not broken
            raise UserError(f"cannot read image {name} ({error.strerror}); make it readable, or remove it") from error
        raise CorruptImage(str(error)) from error
    if image.mode in _NO_RANGE:
        raise UserError(
            f"image {name} has 32-bit values ({image.mode}), of which none is known as white; save it with 8 or 16 bits"
        )
    if options.channels:
        image = _eight_bits(image).convert("L" if options.channels == 1 else "RGB")
    elif image.mode not in _MODES:
        raise UserError(
            f"image {name} is {image.mode}, neither grey nor RGB; set config.data.channels=3 (or 1) to convert every image"
        )
    pixels = np.asarray(_resized(name, image, options))
    return Decoded(pixels.reshape(*pixels.shape[:2], -1), (image.height, image.width), is_animated)


def _check_pixels(image, options: DecodeOptions) -> None:
    """Raises `CorruptImage` if the image, or what it is scaled to, has more than `MAX_PIXELS`."""
    height, width = image.height, image.width
    if width * height > MAX_PIXELS:
        raise CorruptImage(f"{width}x{height}, more than {MAX_PIXELS / 1e6:.0f} million pixels")
    width, height = _scaled_size(width, height, options.resolution)
    if width * height > MAX_PIXELS:
        raise CorruptImage(
            f"{image.width}x{image.height}, which becomes {width}x{height} at config.data.resolution={options.resolution}, "
            f"more than {MAX_PIXELS / 1e6:.0f} million pixels"
        )


def _scaled_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) once the shorter side is `side`; as they are if that is 0."""
    if not side:
        return width, height
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))


def _eight_bits(image):
    from PIL import Image

    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray(np.round(np.asarray(image) / _TO_8_BITS).astype(np.uint8))


def _resized(name: str, image, options: DecodeOptions):
    from PIL import Image

    side = options.resolution
    if options.crop == "none" and image.width != image.height:
        raise UserError(
            f"image {name} is {image.width}x{image.height}, not square; set config.data.crop=center to cut its center"
        )
    if not side or image.size == (side, side):
        return image
    top, left = center_of(*image.size, side)
    scaled = image.resize(_scaled_size(*image.size, side), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + side, top + side))


def center_of(width: int, height: int, side: int) -> tuple[int, int]:
    """Returns (top, left) of the center `side` x `side` of an image once its shorter side is scaled to `side`."""
    width, height = _scaled_size(width, height, side)
    return (height - side) // 2, (width - side) // 2


def decode_many(
    items: Iterable[tuple[str, bytes | Path]], options: DecodeOptions
) -> Iterator[tuple[str, Decoded | CorruptImage]]:
    """Yields (name, image) in the order of `items`, or (name, what is wrong with it) for a corrupt image.

    Decoding runs in as many threads as there are processors (Pillow releases the interpreter while it decodes); a bounded
    number of images is in flight, whatever `items` holds.

    Raises:
      UserError: an image whose shape or number of channels differs from the first one's.
    """

    def attempt(item):
        try:
            return item[0], decode(*item, options)
        except CorruptImage as error:
            return item[0], error

    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error here
    workers, first, animated = os.cpu_count() or 1, None, []
    for name, image in in_order(attempt, items, ahead=_AHEAD * workers, workers=workers):
        if isinstance(image, Decoded):
            first = first or (name, image.pixels.shape)
            _check_like_first(name, image.pixels.shape, *first)
            animated += [name] * image.is_animated
        yield name, image
    if animated:
        logger.warning("images with several frames, of which the first is taken: %d (%s)", len(animated), shown(sorted(animated)))


def _check_like_first(name, shape, first_name, first_shape) -> None:
    if shape[:2] != first_shape[:2]:
        raise UserError(
            f"image {name} is {shape[1]}x{shape[0]} and {first_name} is {first_shape[1]}x{first_shape[0]}; "
            "set config.data.resolution to bring every image to one size"
        )
    if shape[2] != first_shape[2]:
        kinds = {1: "grey", 3: "RGB"}
        raise UserError(
            f"image {name} is {kinds[shape[2]]} and {first_name} is {kinds[first_shape[2]]}; "
            "set config.data.channels=3 (or 1) to convert every image"
        )
