"""The same command on other devices: microbatches give way to devices, and the batch of samples is rounded up to them."""

import logging

import jax
import pytest

from configs import celebahq, digits_tshirt, stable_diffusion
from retrack_jax.checks import UserError
from retrack_jax.config.base import base_config
from retrack_jax.config.devices import fit_to_devices
from retrack_jax.config.reading import read_config


def fitted(config, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
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
