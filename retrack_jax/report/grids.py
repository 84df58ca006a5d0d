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


def thumbnails(images: np.ndarray, largest: int = 128) -> np.ndarray:
    """Returns images of at most about `largest` pixels per side, by means over squares; smaller ones are left as they are."""
    factor = max(1, images.shape[1] // largest)
    if factor == 1:
        return np.ascontiguousarray(images)
    count, height, width, channels = images.shape
    height, width = height // factor, width // factor
    squares = images[:, : height * factor, : width * factor].reshape(count, height, factor, width, factor, channels)
    return squares.mean(axis=(2, 4)).astype(np.uint8)


def grid(images, *, columns: int, marked=None, smallest: int = 48, largest: int = 256) -> np.ndarray:
    """Returns one RGBA picture, uint8 `[H', W', 4]`, of `images` in rows of `columns`, transparent between them.

    Args:
      images: uint8 `[N, H, W, C]`.
      columns: tiles in a row.
      marked: bool `[N]` or None; the True ones get an outline.
      smallest, largest: bounds on a tile's longer side in pixels, see `resize`.
    """
    tiles = resize(images, smallest, largest)
    marked = _mask(marked, len(tiles))
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
    neighbors=None,
    distances=None,
    columns: int | None = None,
    count: int = 64,
):
    """Returns the `PIL.Image` of `samples.png`: samples before and after, side by side, tile i of both from the same noise.

    Args:
      before, after: uint8 `[N, H, W, C]`, of which `count` are shown: two rows of those that were the forgotten image before
        (otherwise unlearning a rare image would show nothing), then the first ones. `before` may be None.
      titles: headings of the two grids.
      marked_before, marked_after: bool `[N]`, which samples are outlined, or None if that is unknown.
      mark_name: what the outlined ones are.
      forgotten: uint8 `[F, H, W, C]` or None: shown below, outlined.
      neighbors: uint8 `[F, K, H, W, C]` or None: shown to the right of it, nearest first.
      distances: float `[F, K]` or None: written under the neighbors.
      columns: tiles in a row of each grid; by default 8, of photographs 4.
      count: how many samples of each are shown.
    """
    from PIL import Image

    blocks, left, bottom = [], _GAP, 0
    columns = columns or (8 if max(np.shape(after)[1:3]) <= 64 else 4)
    drawn, first = _chosen(before, after, marked_before, 2 * columns, count)
    for images, mask, title in zip((before, after), (marked_before, marked_after), titles, strict=True):
        if images is None:
            continue
        note = f"{len(images):,} samples"
        if mask is not None:
            note += f", {int(np.sum(mask)):,} of them the {mark_name}" if np.any(mask) else f", none of them the {mark_name}"
        blocks += [(left, 0, title, 22, _INK), (left, 30, note, 14, _FAINT)]
        top, widest = 56, 0
        shown = f"{len(drawn)} of the {int(np.sum(marked_before)) if len(drawn) else 0:,} that are the {mark_name}"
        for rows, caption in (
            (drawn, shown if images is before else "What the same noise gives"),
            (first, f"The first {len(first)}"),
        ):
            if not len(rows):
                continue
            picture = grid(images[rows], columns=columns, marked=None if mask is None else np.asarray(mask)[rows])
            if len(drawn):
                blocks.append((left, top, caption, 14, _INK))
                top += 22
            blocks.append((left - _GAP, top, picture))
            top += picture.shape[0] + 10
            widest = max(widest, picture.shape[1])
        left += widest + 28
        bottom = max(bottom, top - 10)
    if forgotten is not None:
        bottom = _strip_blocks(blocks, bottom + 22, forgotten, neighbors, distances)
    width = max(block[0] + (block[2].shape[1] if len(block) == 3 else _text_width(block[2], block[3])) for block in blocks)
    canvas = Image.new("RGB", (width + 2 * _MARGIN, bottom + 2 * _MARGIN), _PAPER)
    for block in blocks:
        _paint(canvas, block)
    return canvas


def _chosen(before, after, marked_before, most: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows to show: up to `most` that were the forgotten image before, then the first of all, `count` together."""
    shared = len(after) if before is None else min(len(before), len(after))
    marked = np.zeros(shared, bool) if before is None or marked_before is None else np.asarray(marked_before)[:shared]
    drawn = np.flatnonzero(marked)[:most]
    return drawn, np.arange(min(shared, count - (most if len(drawn) else 0)))


def _strip_blocks(blocks, top, forgotten, neighbors, distances, rows: int = 4) -> int:
    """Adds the forgotten images and their neighbors to `blocks`; returns the bottom edge."""
    shown = f"{min(rows, len(forgotten))} of {len(forgotten)}" if len(forgotten) > rows else ""
    blocks.append((_GAP, top, " ".join(filter(None, ["Forgotten", shown])), 16, _INK))
    first = grid(forgotten[:1], columns=1, marked=[True], smallest=64, largest=160)
    start = max(first.shape[1] + 24, _text_width(blocks[-1][2], 16) + 24)
    if neighbors is not None:
        blocks.append((start, top, f"Its {neighbors.shape[1]} nearest remaining images, nearest first", 16, _INK))
    top += 26
    for row in range(min(rows, len(forgotten))):
        picture = grid(forgotten[row : row + 1], columns=1, marked=[True], smallest=64, largest=160)
        blocks.append((0, top, picture))
        if neighbors is not None:
            strip = grid(neighbors[row], columns=neighbors.shape[1], smallest=64, largest=160)
            blocks.append((start - _GAP, top, strip))
            step = (strip.shape[1] - _GAP) / neighbors.shape[1]
            for k in range(neighbors.shape[1]) if distances is not None else ():
                text = f"{float(distances[row][k]):.2f}"
                middle = start + step * k + (step - _GAP) / 2
                blocks.append((int(middle - _text_width(text, 13) / 2), top + strip.shape[0], text, 13, _FAINT))
        top += picture.shape[0] + (24 if distances is not None else 4)
    return top


def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _text_width(text: str, size: int) -> int:
    return math.ceil(_font(size).getlength(text))


def _paint(canvas, block):
    from PIL import Image, ImageDraw

    if len(block) == 3:
        left, top, picture = block
        picture = Image.fromarray(picture)
        canvas.paste(picture, (left + _MARGIN, top + _MARGIN), picture)
    else:
        left, top, text, size, ink = block
        ImageDraw.Draw(canvas).text((left + _MARGIN, top + _MARGIN), text, font=_font(size), fill=ink)


def _mask(marked, count: int) -> np.ndarray:
    marked = np.zeros(count, bool) if marked is None else np.asarray(marked, bool)
    if marked.shape != (count,):
        raise UserError(f"the outlines are {marked.shape} for {count} images")
    return marked


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
