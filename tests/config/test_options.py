"""Typed options: one default each, a method's own, the more specific field wins, and messages name the field."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits_flow, digits_tshirt, stable_diffusion
from retrack_jax.checks import UserError
from retrack_jax.config.options import Options
from retrack_jax.config.reading import default_config, read_config
from retrack_jax.config.recipes import PretrainOptions
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.options import RetrackOptions


def test_the_default_config_reads_as_the_records_defaults():
    options = read_config(default_config())
    assert dataclasses.replace(options, methods={}) == Options()
    assert options.recipe("retrack").own == RetrackOptions() and set(options.methods) == set(METHODS) - {"retrain"}


def test_a_methods_own_field_overrides_the_shared_one_for_that_method_alone():
    config = default_config()
    config.unlearn.learning_rate, config.unlearn.erasediff.learning_rate, config.unlearn.erasediff.eta = 1e-3, 2e-4, 0.5
    options = read_config(config)
    rates = {name: recipe.learning_rate for name, recipe in options.methods.items()}
    assert rates.pop("erasediff") == 2e-4 and set(rates.values()) == {1e-3}
    assert options.recipe("erasediff").own.eta == 0.5


def test_retracks_weight_and_sisss_mixture_are_two_options():
    options = read_config(stable_diffusion.get_config("all"))
    assert options.recipe("retrack").own.lam == 0.5 and options.recipe("siss").own.mixture == 0.5
    options = read_config(digits_tshirt.get_config("all"))
    assert options.recipe("retrack").own.lam == 0.005 and options.recipe("siss").own.mixture == 0.5
    assert options.recipe("siss").own.scale == options.recipe("siss_no_is").own.scale == 5.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("unlearn.retrack.lam", 1.5, "config.unlearn.retrack.lam is 1.5; it must be a number in"),
        ("unlearn.siss.mixture_schedule", "linear", "config.unlearn.siss.mixture_end is not set"),
        ("unlearn.siss.learning_rate", -1.0, "config.unlearn.learning_rate is -1.0"),
        ("eval.relearning.batch_size", 0, "config.eval.relearning.batch_size is 0"),
        ("data.crop", "round", "config.data.crop is 'round'; choose one of center, none"),
        ("method", "retrak", "config.method is 'retrak'; .*did you mean 'retrack'"),
        ("seeds", (), "config.seeds is empty"),
        ("sampling.sampler", "dppm", "did you mean 'ddpm'"),
        ("schedule.shift", 3.0, "config.schedule.shift is 3.0, but prediction_type is epsilon, which does not read it"),
    ],
)
def test_a_wrong_value_names_its_field(field, value, message):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        read_config(config)


@pytest.mark.parametrize(("num_steps", "warned"), [(500, True), (501, False)])
def test_a_warm_up_as_long_as_the_run_is_warned_of(num_steps, warned, caplog):
    PretrainOptions(num_steps=num_steps).warn_of_warmup("config.pretrain")
    assert (f"config.pretrain.warmup_steps is 500, and in {num_steps} steps the rate neither" in caplog.text) == warned


def test_numbers_of_numpy_become_those_of_python():
    config = default_config()
    config.seeds = tuple(np.arange(2))
    seeds = read_config(config).seeds
    assert seeds == (0, 1) and all(type(seed) is int for seed in seeds)


def test_a_field_that_a_flow_does_not_read_is_refused():
    config = digits_flow.get_config()
    config.schedule.shift = 3.0
    read_config(config)
    config.schedule.beta_end = 0.03
    with pytest.raises(UserError, match="config.schedule.beta_end is 0.03, but prediction_type is flow_prediction, which"):
        read_config(config)


def test_config_dicts_end_in_this_package():
    assert not any(isinstance(value, ConfigDict) for value in dataclasses.asdict(read_config(default_config())).values())
