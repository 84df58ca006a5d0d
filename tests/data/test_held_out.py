"""The held-out part: the same images in memory or in a file, of which the training part is never copied whole."""

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import ImageSet, RowView, image_set
from retrack_jax.data.left_out import split_held_out, unseen
from retrack_jax.neighbors.cache import cached_nearest_of_targets

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 1), dtype=np.uint8)


@pytest.fixture
def mapped(tmp_path):
    PIXELS.tofile(tmp_path / "a.pixels")
    pixels = np.memmap(tmp_path / "a.pixels", np.uint8, "r", shape=PIXELS.shape)
    return ImageSet(pixels, [f"{row}.png" for row in range(40)], np.arange(40) % 4, "digest", "set")


def test_a_memory_map_is_not_copied(mapped, tmp_path):
    in_memory = image_set("set", PIXELS, mapped.ids, mapped.labels)
    parts = zip(split_held_out(mapped, 0.25), split_held_out(in_memory, 0.25), (True, False), strict=True)
    for ours, theirs, lazy in parts:
        assert isinstance(ours.images, RowView) == lazy
        assert list(ours.ids) == list(theirs.ids)
        np.testing.assert_array_equal(np.asarray(ours.images), theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    training, _ = split_held_out(mapped, 0.25)
    other, _ = split_held_out(mapped, 0.3)
    assert len({training.digest, other.digest, mapped.digest}) == 3
    (found,) = cached_nearest_of_targets(training, [([3], [3])], 5, cache_dir=tmp_path / "ours")
    there, _ = split_held_out(in_memory, 0.25)
    (expected,) = cached_nearest_of_targets(there, [([3], [3])], 5, cache_dir=tmp_path / "theirs")
    np.testing.assert_array_equal(found[0], expected[0])


def test_shares(mapped):
    assert split_held_out(mapped, 0.0) == (mapped, None)
    for share in (0.001, 0.999):
        with pytest.raises(UserError, match="both parts need some"):
            split_held_out(mapped, share)


def test_a_held_out_image_with_a_copy_in_the_training_part_is_not_unseen(mapped, caplog):
    training, held_out = split_held_out(mapped, 0.25)
    assert unseen(held_out, training) is held_out
    pixels = np.array(held_out.images)
    pixels[1] = training.images[7]  # under another name
    pixels[3] = pixels[2]
    with caplog.at_level("INFO"):
        kept = unseen(image_set("held out", pixels, held_out.ids, held_out.labels), training)
    assert kept.ids == tuple(name for row, name in enumerate(held_out.ids) if row not in (1, 3))
    np.testing.assert_array_equal(kept.labels, np.delete(held_out.labels, [1, 3]))
    assert "2 of 10 are copies" in caplog.text
    with pytest.raises(UserError, match="every image .* has a copy"):
        unseen(image_set("held out", np.array(training.images[:2]), ["a", "b"]), training)
