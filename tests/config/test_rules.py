"""The recipe of custom data: rules that meet the official recipes, and fill only what is not given."""

import json

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.config import rules
from retrack_jax.config.reading import read_config
from tests.data.checking import config_of


def complete(config):
    return rules.complete(read_config(config))


def test_rules_meet_the_official_recipes():
    cifar, celeba = config_of("cifar10").unlearn, config_of("celebahq").unlearn
    for official, chosen in ((cifar, rules.rules(50_000, 32)), (celeba, rules.rules(30_000, 256))):
        assert {name: official.retrack[name] if name == "lam" else official[name] for name in chosen} == chosen
    assert rules.rules(5, 64)["num_neighbors"] == 5


def test_custom_recipe_fills_only_what_is_not_given(tmp_path, jpeg_folder):
    folder, _ = jpeg_folder(6)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"sample_size": 64}')
    config = config_of("custom")
    for field, value in (("checkpoint", str(tmp_path / "model")), ("targets", ("00001.jpg",))):
        config[field] = value
    config.data.dir = str(folder)
    config.unlearn.retrack.lam, config.unlearn.siss.num_neighbors = 0.3, 2
    chosen = complete(config)
    recipe = chosen.recipe("retrack")
    assert chosen.data.resolution == 64 and recipe.num_neighbors == 5 and recipe.own.lam == 0.3
    assert recipe.learning_rate == pytest.approx(1.26e-5) and chosen.recipe("siss").num_neighbors == 2
    assert rules.complete(chosen) is chosen and complete(config_of("cifar10")).recipe("retrack").own.lam == 0.02


def custom_config(tmp_path, source, path, targets, model='{"sample_size": 16}'):
    """configs/custom.py with a model folder that holds its config alone."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(model)
    config = config_of("custom")
    config.checkpoint, config.targets = str(tmp_path / "model"), targets
    config.data.source, config.data.dir, config.data.cache_dir = source, str(path), str(tmp_path / "cache")
    return config


def test_custom_k_is_at_most_what_remains_of_the_largest_target(tmp_path, jpeg_folder):
    folder, _ = jpeg_folder(12)
    (tmp_path / "forget.txt").write_text("".join(f"{row:05d}.jpg\n" for row in range(5)))
    config = custom_config(tmp_path, "folder", folder, ("00001.jpg", f"@{tmp_path / 'forget.txt'}"))
    assert complete(config).recipe("retrack").num_neighbors == 7
    config.data.exclude = "00010.jpg+00011.jpg"
    assert complete(config).recipe("retrack").num_neighbors == 5
    config.data.exclude, config.data.held_out = "", 0.25
    config.targets = ("*[02].jpg",)
    assert complete(config).recipe("retrack").num_neighbors < 9  # three are held out, and some of the others forgotten
    config.targets = ("nobody.jpg",)
    with pytest.raises(UserError, match="no image of folder, training part is named 'nobody.jpg'"):
        complete(config)


@pytest.mark.parametrize(
    ("schedule", "sampler"),
    [
        ({"_class_name": "DDPMScheduler"}, "ddpm"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "ddpm"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow_euler"),
        ({"_class_name": "EDMEulerScheduler"}, "euler"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "dpm_solver"),
    ],
)
def test_custom_takes_a_sampler_of_the_models_schedule(tmp_path, jpeg_folder, schedule, sampler):
    config = custom_config(tmp_path, "folder", jpeg_folder(3)[0], ("00001.jpg",))
    (tmp_path / "model" / "scheduler_config.json").write_text(json.dumps(schedule))
    assert complete(config).sampling.sampler == sampler
    config.sampling.sampler = "pndm"
    assert complete(config).sampling.sampler == "pndm"


@pytest.mark.parametrize("source", ["npz", "parquet"])
def test_custom_takes_arrays_and_tables_too(tmp_path, parquet_file, source):
    path, pixels = parquet_file(np.arange(8) % 4, size=16)
    if source == "npz":
        path = tmp_path / "images.npz"
        np.savez(path, images=pixels, labels=np.arange(8) % 4)
    chosen = complete(custom_config(tmp_path, source, path, ("label:1",)))
    assert chosen.recipe("retrack").num_neighbors == 6 and chosen.data.resolution == 16


def test_a_model_config_that_is_no_object_is_one_line(tmp_path, jpeg_folder):
    config = custom_config(tmp_path, "folder", jpeg_folder(3)[0], ("00001.jpg",), model="[16]")
    with pytest.raises(UserError, match="config.json holds no JSON object"):
        complete(config)


@pytest.mark.parametrize(
    ("field", "message"), [("checkpoint", "checkpoint is empty"), ("targets", "targets is empty"), ("dir", "dir is empty")]
)
def test_custom_says_which_flag_is_missing(tmp_path, jpeg_folder, field, message):
    config = config_of("custom")
    config.checkpoint, config.targets, config.data.dir = "model", ("a",), str(jpeg_folder(2)[0])
    if field == "dir":
        config.data.dir = ""
    else:
        config[field] = type(config[field])()
    with pytest.raises(UserError, match=message):
        complete(config)
