"""The same command on other devices: microbatches give way to devices, the batch of samples is rounded up to them, and a CPU
takes no more images at once than its cache holds.
"""

import json
import logging

import jax
import pytest

from configs import celebahq, cifar10, digits_tshirt, mnist5k_tshirt, stable_diffusion
from retrack_jax.checks import UserError
from retrack_jax.config.base import base_config
from retrack_jax.config.devices import fit_to_devices
from retrack_jax.config.reading import read_config
from retrack_jax.models.cpu.microbatch import images_at_once


def fitted(config, devices, monkeypatch, platform="gpu"):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    return fit_to_devices(read_config(config))


@pytest.mark.parametrize(
    ("module", "devices", "accumulation"),
    [(celebahq, 1, 16), (celebahq, 8, 8), (celebahq, 64, 1), (stable_diffusion, 2, 8), (stable_diffusion, 8, 2)],
)
def test_the_official_recipes_fit_other_devices(module, devices, accumulation, monkeypatch, caplog):
    config = module.get_config()
    with caplog.at_level(logging.INFO):
        options = fitted(config, devices, monkeypatch)
    recipe = options.recipe("retrack")
    assert recipe.accumulation == accumulation and recipe.batch_size == config.unlearn.batch_size
    assert ("accumulation is" in caplog.text) == (accumulation != config.unlearn.accumulation)


# Of 2 MiB an image's widest level takes 2^13 bytes (digits), 25,088 * 4 (mnist5k), 2^19 (cifar10). At least 4 images at once.
@pytest.mark.parametrize(
    ("module", "method", "devices", "pretrain", "unlearn"),
    [
        (digits_tshirt, "retrack", 2, 1, 1),  # 64 + 64 of 256
        (mnist5k_tshirt, "retrack", 2, 1, 8),  # 16 of 20, then 8 + 8 of 20 after 128 + 128
        (mnist5k_tshirt, "retrack", 1, 2, 16),
        (mnist5k_tshirt, "vanilla", 2, 1, 4),  # 16, no forgotten ones
        (cifar10, "retrack", 2, 1, 32),  # 2 + 2 of 4; its model comes from a checkpoint
        (cifar10, "siss", 2, 1, 16),  # 4 of 4: one point for each pair
        (cifar10, "erasediff", 2, 1, 16),  # 4, and in another pass 4
        (cifar10, "siss", 64, 1, 1),  # 2
    ],
)
def test_a_cpu_takes_as_many_images_at_once_as_its_cache_holds(
    module, method, devices, pretrain, unlearn, monkeypatch, caplog, tmp_path
):
    config = module.get_config(method)
    if config.checkpoint:  # its own network decides
        config.checkpoint = str(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"sample_size": 32, "block_out_channels": [128, 256, 256, 256]}))
    with caplog.at_level(logging.INFO):
        options = fitted(config, devices, monkeypatch, "cpu")
    recipe = options.recipe(method)
    assert (options.pretrain.accumulation, recipe.accumulation) == (pretrain, unlearn)
    assert recipe.batch_size == config.unlearn.batch_size
    assert (f"config.unlearn.{method}.accumulation is {unlearn} in place of 1" in caplog.text) == (unlearn > 1)
    assert fitted(config, devices, monkeypatch, "gpu").recipe(method).accumulation == 1


def test_a_model_that_is_not_there_changes_nothing(monkeypatch):
    """What is missing is said where it is read."""
    assert fitted(cifar10.get_config(), 2, monkeypatch, "cpu").recipe("retrack").accumulation == 1


def test_a_cpu_takes_no_more_images_than_the_config_says(monkeypatch):
    config = mnist5k_tshirt.get_config()
    config.unlearn.accumulation = 32
    assert fitted(config, 2, monkeypatch, "cpu").recipe("retrack").accumulation == 32


def test_images_of_the_widest_level_decide_and_other_networks_are_left_alone():
    assert images_at_once({"sample_size": 32, "block_out_channels": (64,)}) == 8
    assert images_at_once({"sample_size": [32, 16], "block_out_channels": [64, 512]}) == 16
    assert images_at_once({"sample_size": 256, "block_out_channels": (128,)}) == 4
    assert images_at_once({"sample_size": 32, "patch_size": 2}) is None


@pytest.mark.parametrize("size", [None, 0, -8, "32", [32], [32, 32, 3], [32, None], {"height": 32}, [[32], 32]])
@pytest.mark.parametrize("widths", [(64,), (), None, 64, "64", [None], [0], ["64"]])
def test_a_damaged_config_is_left_to_the_reader_of_the_network(size, widths):
    assert images_at_once({"sample_size": size, "block_out_channels": widths}) is None
    assert images_at_once({"sample_size": 32, "block_out_channels": widths}) == (8 if widths == (64,) else None)


def test_samples_are_drawn_in_a_multiple_of_the_devices(monkeypatch):
    assert fitted(digits_tshirt.get_config(), 8, monkeypatch).sampling.batch_size == 504
    assert fitted(digits_tshirt.get_config(), 4, monkeypatch).sampling.batch_size == 500


def test_a_batch_that_no_accumulation_fits_is_refused(monkeypatch):
    config = base_config("here")
    config.targets, config.unlearn.batch_size, config.unlearn.accumulation = ("label:1",), 6, 2
    with pytest.raises(UserError, match="config.unlearn.batch_size is 6, which does not divide evenly over 4 devices"):
        fitted(config, 4, monkeypatch)
    config.method = "vanilla"
    config.unlearn.vanilla.batch_size = 8  # the method that runs has a batch that fits
    assert fitted(config, 4, monkeypatch).recipe("vanilla").batch_size == 8


@pytest.mark.parametrize("field", ["unlearn.accumulation", "pretrain.batch_size", "sampling.batch_size"])
def test_no_number_of_images_is_zero(field, monkeypatch):
    config = base_config("here")
    config.update_from_flattened_dict({field: 0})
    with pytest.raises(UserError, match=f"config.{field} is 0"):
        fitted(config, 2, monkeypatch)


def test_a_batch_of_pretraining_must_divide_only_if_there_is_pretraining(monkeypatch):
    config = celebahq.get_config()
    config.pretrain.batch_size, config.pretrain.accumulation, config.eval.relearning.batch_size = 126, 1, 64
    fitted(config, 4, monkeypatch)
    config.pretrain.b1 = 2.0  # relearning takes it, so it is checked all the same
    with pytest.raises(UserError, match="config.pretrain.b1 is 2.0"):
        fitted(config, 4, monkeypatch)
    config.pretrain.b1, config.method = 0.9, "retrain"
    with pytest.raises(UserError, match="config.pretrain.batch_size is 126, which does not divide"):
        fitted(config, 4, monkeypatch)


def test_the_forget_batch_counts_too(monkeypatch):
    config = celebahq.get_config()
    config.unlearn.forget_batch_size = 16
    assert fitted(config, 8, monkeypatch).recipe("retrack").accumulation == 2


def test_methods_that_pair_images_take_batches_of_one_size(monkeypatch):
    config = celebahq.get_config("siss")
    config.unlearn.forget_batch_size = 16
    with pytest.raises(UserError, match="config.unlearn.forget_batch_size is 16, but this method pairs"):
        fitted(config, 1, monkeypatch)


def test_relearning_must_divide_only_if_it_is_asked_for(monkeypatch):
    config = digits_tshirt.get_config()
    config.eval.relearning.batch_size, config.eval.metrics = 63, ("frequency",)
    fitted(config, 2, monkeypatch)
    config.eval.metrics = ("frequency", "relearning_steps")
    with pytest.raises(UserError, match="config.eval.relearning.batch_size is 63"):
        fitted(config, 2, monkeypatch)
