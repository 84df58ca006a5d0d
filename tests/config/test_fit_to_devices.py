"""The same command on other devices: microbatches give way to devices, and the batch of samples is rounded up to them."""

import logging

import jax
import pytest

from configs import base, celebahq, digits_tshirt, stable_diffusion
from retrack_jax.checks import UserError
from retrack_jax.config import build
from retrack_jax.evaluate.checks import check_evaluation


def fitted(config, devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    return build.fit_to_devices(config)


@pytest.mark.parametrize(
    ("module", "devices", "accumulation"),
    [(celebahq, 1, 16), (celebahq, 8, 8), (celebahq, 64, 1), (stable_diffusion, 2, 8), (stable_diffusion, 8, 2)],
)
def test_the_official_recipes_fit_other_devices(module, devices, accumulation, monkeypatch, caplog):
    given = module.get_config()
    with caplog.at_level(logging.INFO):
        config = fitted(given, devices, monkeypatch)
    assert config.unlearn.accumulation == accumulation and config.unlearn.batch_size == given.unlearn.batch_size
    assert ("accumulation is" in caplog.text) == (accumulation != given.unlearn.accumulation)
    build.check_config(config)


def test_samples_are_drawn_in_a_multiple_of_the_devices(monkeypatch):
    assert fitted(digits_tshirt.get_config(), 8, monkeypatch).sampling.batch_size == 504
    assert fitted(digits_tshirt.get_config(), 4, monkeypatch).sampling.batch_size == 500


def test_a_batch_that_no_accumulation_mends_is_refused_as_before(monkeypatch):
    config = base.get_config()
    config.targets, config.unlearn.batch_size, config.unlearn.accumulation = ("label:1",), 6, 2
    config = fitted(config, 4, monkeypatch)
    assert config.unlearn.accumulation == 2
    with pytest.raises(UserError, match="does not divide evenly over 4 devices"):
        build.check_config(config)


@pytest.mark.parametrize("field", ["unlearn.accumulation", "pretrain.batch_size", "sampling.batch_size"])
def test_no_number_of_images_is_zero(field, monkeypatch):
    config = base.get_config()
    config.update_from_flattened_dict({field: 0})
    with pytest.raises(UserError, match=f"config.{field} is 0"):
        fitted(config, 2, monkeypatch)


def test_a_batch_of_pretraining_divides_only_where_there_is_pretraining(monkeypatch):
    config = celebahq.get_config()
    config.pretrain.batch_size, config.pretrain.accumulation, config.eval.relearning.batch_size = 126, 1, 64
    build.check_config(fitted(config, 4, monkeypatch))
    config.pretrain.b1 = 2.0  # relearning takes it, so it is checked all the same
    with pytest.raises(UserError, match="config.pretrain.b1 is 2.0"):
        build.check_config(fitted(config, 4, monkeypatch))
    config.pretrain.b1, config.method = 0.9, "retrain"
    with pytest.raises(UserError, match="config.pretrain.batch_size is 126, which does not divide"):
        build.check_config(fitted(config, 4, monkeypatch))


def test_the_forget_batch_counts_too(monkeypatch):
    config = celebahq.get_config()
    config.unlearn.forget_batch_size = 16
    config = fitted(config, 8, monkeypatch)
    assert config.unlearn.accumulation == 2
    build.check_config(config)


def test_relearning_is_held_to_the_devices_only_where_it_is_asked_for(monkeypatch):
    config = digits_tshirt.get_config()
    config.eval.relearning.batch_size, config.eval.metrics = 63, ("frequency",)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    check_evaluation(config.eval)
    config.eval.metrics = ("frequency", "relearning_steps")
    with pytest.raises(UserError, match="config.eval.relearning.batch_size is 63"):
        check_evaluation(config.eval)
