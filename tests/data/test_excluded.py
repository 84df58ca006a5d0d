"""Requests that come one after another: what an earlier run forgot is no part of the data of the next."""

import json

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import ImageSet, RowView, image_set
from retrack_jax.data.left_out import resolve_remaining, split_held_out, without
from retrack_jax.main import main
from tests.tiny import flags

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 5, 5, 1), dtype=np.uint8)
IDS = [f"{row}.png" for row in range(40)]


def test_the_rest_keeps_its_names_labels_and_pixels():
    images = image_set("set", PIXELS, IDS, np.arange(40) % 4)
    rest = without(images, "label:1+0.png")
    kept = [row for row in range(1, 40) if row % 4 != 1]
    assert list(rest.ids) == [IDS[row] for row in kept]
    np.testing.assert_array_equal(rest.images, PIXELS[kept])
    np.testing.assert_array_equal(rest.labels, np.array(kept) % 4)
    assert without(images, " ") is images


def test_of_a_mapped_held_out_split_nothing_is_copied(tmp_path):
    """The same images are held out, whatever is excluded after: no model may see them later."""
    PIXELS.tofile(tmp_path / "a.pixels")
    mapped = ImageSet(np.memmap(tmp_path / "a.pixels", np.uint8, "r", shape=PIXELS.shape), IDS, None, "digest", "set")
    training, _ = split_held_out(mapped, 0.25)
    gone = training.ids[3]
    rest = without(training, gone)
    assert isinstance(rest.images, RowView) and rest.digest not in (training.digest, without(training, training.ids[4]).digest)
    kept = [name for name in training.ids if name != gone]
    assert list(rest.ids) == kept
    np.testing.assert_array_equal(np.asarray(rest.images), PIXELS[[IDS.index(name) for name in kept]])


def test_a_target_that_is_excluded_is_told_so():
    images = image_set("set", PIXELS, IDS)
    rest = without(images, "3.png+4.png")
    np.testing.assert_array_equal(resolve_remaining("5.png", rest, images), [3])
    with pytest.raises(UserError, match="the target '3.png' names 3.png, which config.data.exclude leaves out"):
        resolve_remaining("3.png", rest, images)
    with pytest.raises(UserError, match="no image of set, without 2 excluded is named '41.png'"):
        resolve_remaining("41.png", rest, images)


def test_what_is_not_there_is_told_by_the_field():
    images = image_set("set", PIXELS, IDS)
    with pytest.raises(UserError, match="config.data.exclude is '41.png', read as a target is: no image of set is named"):
        without(images, "41.png")
    with pytest.raises(UserError, match="config.data.exclude is '.*', read as a target is: .* nothing would remain"):
        without(images, "*")


def test_a_second_request_goes_on_from_the_first_ones_model(tmp_path, capfd):
    """The excluded images are neither remaining nor to be named; the model is the first run's, and stays that."""
    command = ["retrack_jax", "--config=configs/digits_tshirt.py"]
    assert main([*command, *flags(tmp_path / "first")]) == 0
    (model,) = (tmp_path / "first" / "retrack").glob("*/diffusers")
    second = {"checkpoint": model, "data.exclude": "label:10"}
    assert main([*command, *flags(tmp_path / "second", **second, targets="digit_0003")]) == 0
    (found,) = (tmp_path / "second" / "retrack").glob("*/metrics.json")
    data = json.loads(found.read_text())["provenance"]["data"]
    assert (data["num_forget"], data["num_remain"], data["checkpoint"]) == (1, 1796, str(model))
    assert main([*command, *flags(tmp_path / "third", **second, targets="label:10")]) == 2
    assert "the target 'label:10' names tshirt_000, tshirt_001, tshirt_002, which config.data.exclude" in capfd.readouterr().err

    weights = bytearray((model / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[-2] ^= 1
    (model / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    assert main([*command[:1], f"{command[1]}:vanilla", *flags(tmp_path / "second", **second, targets="digit_0003")]) == 2
    assert "holds a run with other weights in config.checkpoint than the config names now" in capfd.readouterr().err
