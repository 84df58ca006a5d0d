"""Tiles keep their pixels, outlines lie around the marked ones and nowhere else, pictures decode to what went in."""

import base64
import io

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.report import grids


def some_images(count=5, side=8, channels=1):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


def test_small_images_grow_by_a_whole_factor_without_smoothing():
    images = some_images()
    tiles = grids.resize(images, 48, 256)
    assert tiles.shape == (5, 48, 48, 3)
    np.testing.assert_array_equal(tiles[:, ::6, ::6, :], np.repeat(images, 3, axis=-1))
    assert set(np.unique(tiles[0])) == set(np.unique(images[0]))


def test_large_images_shrink_by_averaging_and_fitting_ones_stay():
    flat = np.full((2, 512, 256, 3), 77, np.uint8)
    tiles = grids.resize(flat, 48, 128)
    assert tiles.shape == (2, 128, 64, 3) and (tiles == 77).all()
    middle = some_images(2, 64, 3)
    np.testing.assert_array_equal(grids.resize(middle, 48, 128), middle)


@pytest.mark.parametrize("count,columns", [(1, 1), (5, 3), (6, 3), (0, 4)])
def test_grid_holds_every_tile_in_reading_order(count, columns):
    images = some_images(count)
    picture = grids.grid(images, columns=columns, smallest=8)
    step = 8 + grids._GAP
    for index, image in enumerate(images):
        top, left = grids._GAP + index // columns * step, grids._GAP + index % columns * step
        np.testing.assert_array_equal(picture[top : top + 8, left : left + 8, :1], image)
        assert (picture[top : top + 8, left : left + 8, 3] == 255).all()
    assert (picture[..., 3] == 255).sum() == 64 * count  # all else is transparent


def test_only_marked_tiles_are_outlined():
    marked = np.array([False, True, False, False, False])
    picture = grids.grid(some_images(), columns=3, marked=marked, smallest=8)
    outline = (picture[..., :3] == grids.MARK).all(-1) & (picture[..., 3] == 255)
    rows, columns = np.nonzero(outline)
    step = 8 + grids._GAP
    left = grids._GAP + step
    assert outline.any() and rows.max() < step + grids._GAP and columns.min() >= left - grids._GAP
    assert columns.max() < left + 8 + grids._GAP
    np.testing.assert_array_equal(picture[grids._GAP : grids._GAP + 8, left : left + 8, 0], some_images()[1, ..., 0])


def test_what_is_no_picture_is_refused():
    with pytest.raises(UserError, match="uint8"):
        grids.grid(some_images().astype(np.float32), columns=2)
    with pytest.raises(UserError, match=r"\[N, H, W, 1 or 3\]"):
        grids.grid(some_images(channels=4), columns=2)
    with pytest.raises(UserError, match="outlines"):
        grids.grid(some_images(), columns=2, marked=[True])


def test_samples_picture_shows_what_it_was_given(tmp_path):
    from PIL import Image

    before, after = some_images(70), some_images(70)[::-1].copy()
    marked = np.zeros(70, bool)
    marked[[0, 69]] = True
    options = dict(forgotten=before[:1], neighbors=after[None, :3], distances=np.array([[0.5, 1.5, 2.25]]))
    plain = grids.samples_picture(before, after, marked_before=np.zeros(70, bool), marked_after=np.zeros(70, bool))
    full = grids.samples_picture(before, after, marked_before=marked, marked_after=np.zeros(70, bool), **options)
    assert full.height > plain.height
    pixels = np.asarray(full)
    outlined = (pixels == grids.MARK).all(-1)
    assert outlined.any() and not (np.asarray(plain) == grids.MARK).all(-1).any()
    grids.save_png(tmp_path / "samples.png", full)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples.png")), pixels)
    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]


def test_samples_picture_needs_no_before():
    both = grids.samples_picture(some_images(), some_images())
    one = grids.samples_picture(None, some_images())
    assert one.width < both.width


@pytest.mark.parametrize("photo,kind", [(False, "png"), (True, "webp")])
def test_data_addresses_decode(photo, kind):
    from PIL import Image

    picture = grids.grid(some_images(), columns=2)
    address = grids.data_uri(picture, photo=photo)
    head, data = address.split(",", 1)
    assert head == f"data:image/{kind};base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert decoded.shape == picture.shape and (photo or (decoded == picture).all())


def test_samples_that_were_the_forgotten_image_are_shown_first():
    """Rare ones too: sample 65 lies beyond the first 64, and is what the picture is about."""
    before, after = some_images(70), some_images(70)[::-1].copy()
    marked = np.arange(70) == 65
    drawn, first = grids._chosen(before, after, marked, 16, 64)
    assert drawn.tolist() == [65] and first.tolist() == list(range(63))
    assert grids._chosen(before, after, None, 16, 64)[1].tolist() == list(range(64))
    assert grids._chosen(None, after, marked, 16, 64)[0].size == 0
    drawn, first = grids._chosen(before, after, np.ones(70, bool), 16, 8)  # few are shown: half of them are the first of all
    assert drawn.tolist() == first.tolist() == [0, 1, 2, 3]
    picture = np.asarray(grids.samples_picture(before, after, marked_before=marked, marked_after=np.zeros(70, bool)))
    assert (picture == grids.MARK).all(-1).any()
