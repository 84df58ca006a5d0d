"""Pictures: grids of samples before and after unlearning, and the forgotten image with its neighbors.

All images come in as uint8 `[N, H, W, C]` with C = 1 or 3. Small ones are enlarged by whole factors without smoothing, so that an
8 x 8 digit keeps its pixels; large ones are reduced so that a grid fits a screen. Functions import Pillow when they need it.
"""

import base64
import io
import math

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.files import write_bytes

MARK = (232, 89, 12)  # outline of the forgotten image: 3:1 against black, white and the dark page
_INK, _FAINT, _PAPER = (33, 37, 41), (108, 117, 125), (255, 255, 255)
_GAP, _LINE, _MARGIN = 6, 3, 18  # pixels: between tiles, an outline (which lies in the gap), around the whole


def as_rgb(images) -> np.ndarray:
    """uint8 `[N, H, W, 1 or 3]` -> uint8 `[N, H, W, 3]`."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(f"a picture needs uint8 images [N, H, W, 1 or 3]; got {images.dtype} {images.shape}")
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def resize(images, smallest: int, largest: int) -> np.ndarray:
    """Returns RGB tiles whose longer side is in [smallest, largest]: enlarged by a whole factor, or reduced by averaging."""
    from PIL import Image

    images = as_rgb(images)
    side = max(images.shape[1:3])
    if side > largest:
        height, width = (max(1, round(size * largest / side)) for size in images.shape[1:3])
        reduced = [np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)) for image in images]
        return np.stack(reduced) if reduced else np.zeros((0, height, width, 3), np.uint8)
    factor = max(1, math.ceil(smallest / side)) if side < smallest else 1
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(images, *, columns: int, marked=None, smallest: int = 48, largest: int = 256) -> np.ndarray:
    """Returns one RGBA picture, uint8 `[H', W', 4]`, of `images` in rows of `columns`, transparent between them.

    Args:
      images: uint8 `[N, H, W, C]`.
      columns: tiles in a row.
      marked: bool `[N]` or None; the True ones get an outline.
      smallest, largest: bounds on a tile's longer side in pixels, see `resize`.
    """
    tiles = resize(images, smallest, largest)
    marked = np.zeros(len(tiles), bool) if marked is None else np.asarray(marked, bool)
    if marked.shape != (len(tiles),):
        raise UserError(f"the outlines are {marked.shape} for {len(tiles)} images")
    height, width = tiles.shape[1] + _GAP, tiles.shape[2] + _GAP
    rows = max(1, math.ceil(len(tiles) / columns))
    canvas = np.zeros((rows * height + _GAP, columns * width + _GAP, 4), np.uint8)
    for index, tile in enumerate(tiles):
        top, left = _GAP + index // columns * height, _GAP + index % columns * width
        bottom, right = top + tile.shape[0], left + tile.shape[1]
        if marked[index]:
            canvas[top - _LINE - 1 : bottom + _LINE + 1, left - _LINE - 1 : right + _LINE + 1] = (*MARK, 255)
            canvas[top - 1 : bottom + 1, left - 1 : right + 1] = 0  # a thin gap keeps the outline apart from the picture
        canvas[top:bottom, left:right] = np.concatenate([tile, np.full((*tile.shape[:2], 1), 255, np.uint8)], axis=-1)
    return canvas


def samples_picture(
    before,
    after,
    *,
    titles=("Before", "After"),
    marked_before=None,
    marked_after=None,
    mark_name="forgotten image",
    forgotten=None,
    num_forgotten=None,
    neighbors=None,
    distances=None,
    count: int = 64,
):
    """Returns the `PIL.Image` of `samples.png`: samples before and after, side by side, tile i of both from the same noise.

    Args:
      before, after: uint8 `[N, H, W, C]`, of which `count` are shown: two rows of those that were the forgotten image before
        (otherwise unlearning a rare image would show nothing), then the first ones. `before` may be None.
      titles: headings of the two grids.
      marked_before, marked_after: bool `[N]`, which samples are outlined, or None if that is unknown.
      mark_name: what the outlined ones are.
      forgotten, num_forgotten, neighbors, distances: as in `html.run_report`, or None: below, each image outlined and its
        neighbors beside it.
      count: how many samples of each are shown.
    """
    from PIL import Image

    columns = 8 if max(np.shape(after)[1:3]) <= 64 else 4
    drawn, first = _chosen(before, after, marked_before, 2 * columns, count)
    sides = []
    for images, mask, title in zip((before, after), (marked_before, marked_after), titles, strict=True):
        if images is None:
            continue
        note = f"{len(images):,} samples"
        if mask is not None:
            note += f", {int(np.sum(mask)):,} of them the {mark_name}" if np.any(mask) else f", none of them the {mark_name}"
        parts = [_line(title, 22), _line(note, 14, _FAINT)]
        if len(drawn):
            of_all = f"{len(drawn)} of the {int(np.sum(marked_before)):,} that are the {mark_name}"
            parts += [_line(of_all if images is before else "What the same noise gives", 14), _part(images, mask, drawn, columns)]
            parts.append(_line(f"The first {len(first)}", 14))
        sides.append(_joined([*parts, _part(images, mask, first, columns)], axis=0))
    below = [] if forgotten is None else _strips(forgotten, num_forgotten or len(forgotten), neighbors, distances)
    picture = Image.fromarray(_joined([_joined(sides, axis=1), *below], axis=0))
    canvas = Image.new("RGB", (picture.width + 2 * _MARGIN, picture.height + 2 * _MARGIN), _PAPER)
    canvas.paste(picture, (_MARGIN, _MARGIN), picture)
    return canvas


def _chosen(before, after, marked_before, most: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to show: up to `most` that were the forgotten image before, at most half of `count`, and then the first
    of all, `count` together.
    """
    shared = len(after) if before is None else min(len(before), len(after))
    marked = np.zeros(shared, bool) if before is None or marked_before is None else np.asarray(marked_before)[:shared]
    drawn = np.flatnonzero(marked)[: min(most, count // 2)]
    return drawn, np.arange(min(shared, count - len(drawn)))


def _part(images, mask, rows, columns: int) -> np.ndarray:
    return grid(images[rows], columns=columns, marked=None if mask is None else np.asarray(mask)[rows])


def _strips(forgotten, count: int, neighbors, distances, most: int = 4) -> list[np.ndarray]:
    """Returns a heading, and a picture of each of the first of `count` forgotten images with its neighbors to the right of it."""
    shown = min(most, len(forgotten))
    heading = f"Forgotten: {shown} of {count:,}" if count > shown else "Forgotten"
    if neighbors is not None:
        heading += f", and the {neighbors.shape[1]} nearest remaining images, nearest first"
    strips = [_line(heading, 16)]
    for row, image in enumerate(forgotten[:most]):
        tiles = [grid(image[None], columns=1, marked=[True], smallest=64, largest=160)]
        for k, neighbor in enumerate(() if neighbors is None else neighbors[row]):
            below = [] if distances is None else [_line(f"{float(distances[row][k]):.2f}", 13, _FAINT)]
            tiles.append(_joined([grid(neighbor[None], columns=1, smallest=64, largest=160), *below], axis=0))
        strips.append(_joined(tiles, axis=1))
    return strips


def _joined(pictures: list[np.ndarray], *, axis: int) -> np.ndarray:
    """Returns RGBA pictures one below the other (axis 0) or side by side (1), transparent between them."""
    across, padded = max(picture.shape[1 - axis] for picture in pictures), []
    for picture in pictures:
        gap, rest = (0, _GAP), (0, across - picture.shape[1 - axis])
        padded.append(np.pad(picture, (gap, rest, (0, 0)) if axis == 0 else (rest, gap, (0, 0))))
    return np.concatenate(padded, axis)


def _line(text: str, size: int, ink=_INK) -> np.ndarray:
    """Returns a line of text on paper as an RGBA picture."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    canvas = Image.new("RGBA", (_GAP + math.ceil(font.getlength(text)), round(1.3 * size)), _PAPER)
    ImageDraw.Draw(canvas).text((_GAP, 0), text, font=font, fill=ink)
    return np.asarray(canvas)


def save_png(path, picture) -> None:
    """Writes a `PIL.Image` or a uint8 `[H, W, 3 or 4]` array as PNG, whole or not at all."""
    write_bytes(path, _encode(picture, "PNG"))


def data_uri(picture, *, photo: bool = False) -> str:
    """Returns a picture as a `data:` address: PNG, or for photographs WebP, which is a tenth of the size."""
    kind = "WEBP" if photo else "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(_encode(picture, kind)).decode()}"


def _encode(picture, kind: str) -> bytes:
    from PIL import Image

    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 92} if kind == "WEBP" else {"optimize": True}))
    return buffer.getvalue()
