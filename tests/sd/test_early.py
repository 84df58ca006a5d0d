"""What is told before anything is trained: a config that cannot run, a sweep with a broken concept; and in what runs compute."""

import jax
import numpy as np
import pytest

from configs import stable_diffusion
from retrack_jax.checks import UserError
from retrack_jax.config import build
from retrack_jax.problem.text_to_image import TextToImageExperiment
from retrack_jax.run.sweep import run
from tests.sd.tiny import tiny_config


def changed(config, **fields):
    with config.unlocked():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("red_circle+blue_square",)}, "one run forgets one concept"),
        ({"targets": ("red_circel",)}, "did you mean 'red_circle'"),
        ({"checkpoint": ""}, "config.checkpoint is empty"),
        ({"eval.metrics": ("sscd",)}, "choose one of sscd_original"),
        ({"eval.classifier": "pickle"}, "joblib, labels"),
        ({"data.original_prompts": "gone.json"}, "no file .*gone.json"),
        ({"data.resolution": 36}, "config.data.resolution is 36; .*pipeline need a multiple of 8"),
        ({"sampling.guidance_scale": -1.0}, "guidance_scale"),
        ({"sampling.sampler": "dmp"}, "config.sampling.sampler is 'dmp'; choose one of .*; did you mean 'pndm'"),
        ({"sampling.sampler": "pndm", "sampling.num_steps": 1}, "PNDM steps is 1"),
        ({"unlearn.num_neighbors": 11}, "K. is 11, but only 10 images remain beside red_circle"),
        ({"export": "all"}, "pipeline, unet, none"),
        ({"method": "retrain"}, "cannot be pretrained or retrained"),
    ],
)
def test_bad_configs(tmp_path, change, message):
    config = changed(tiny_config(tmp_path), **change)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "work")
    assert not (tmp_path / "work" / "retrack").exists()  # nothing was begun


def test_methods_without_neighbors_need_no_k(tmp_path):
    experiment = TextToImageExperiment(changed(tiny_config(tmp_path, "siss"), unlearn__num_neighbors=11))
    assert len(experiment.target("red_circle").remain) == 10


@pytest.mark.parametrize("method", ["neggrad", "retrack"])
def test_a_sweep_with_a_broken_concept_does_not_begin(tmp_path, concepts, method):
    (concepts / "red_circle" / "kmeans_labels.json").unlink()
    config = changed(tiny_config(tmp_path, method), targets=("blue_square,red_circle",), data__dir=str(concepts))
    with pytest.raises(UserError, match="no kmeans_labels.json in .*red_circle"):
        run(config, tmp_path / "work")
    assert not (tmp_path / "work" / method).exists()


def test_default_batch_on_two_devices_names_the_accumulation_that_keeps_the_recipe(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    message = "batch_size is 16, .* 2 devices x 16 .*multiple of 32, or set config.unlearn.accumulation to 8$"
    with pytest.raises(UserError, match=message):
        build.check_config(stable_diffusion.get_config())
    build.check_config(changed(stable_diffusion.get_config(), unlearn__accumulation=8))
    odd = changed(stable_diffusion.get_config(), unlearn__batch_size=15)
    with pytest.raises(UserError, match="choose a multiple of 32$"):  # no accumulation mends that
        build.check_config(odd)


def test_the_documented_flags_for_eight_devices_pass(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    config = changed(stable_diffusion.get_config(), unlearn__accumulation=2, sampling__batch_size=8)
    build.check_config(config)
    assert config.unlearn.batch_size == 16  # the recipe's


def test_bfloat16_parameters_are_for_sampling_alone(tmp_path):
    plain = TextToImageExperiment(tiny_config(tmp_path))
    experiment = TextToImageExperiment(changed(tiny_config(tmp_path), compute__param_dtype="bfloat16"))
    for params in (experiment.imported_params(), jax.eval_shape(lambda: experiment.init_params(0))):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}  # what training starts from
    target, given = experiment.target("red_circle"), jax.device_put(experiment.imported_params())
    seen = {}
    experiment._sampler.sample = lambda prompts, params, **how: seen.update(params=params)
    experiment.sample(target, given)
    assert {leaf.dtype for leaf in jax.tree.leaves(seen["params"])} == {np.dtype(jax.numpy.bfloat16)}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))  # else it would take memory rather than save some
    assert experiment.sampling_digest(target) != plain.sampling_digest(plain.target("red_circle"))

    kept = jax.device_put(plain.imported_params())
    plain._sampler.sample = lambda prompts, params, **how: seen.update(params=params)
    plain.sample(plain.target("red_circle"), kept)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, seen["params"], kept))


def test_finished_pictures_stay_of_use_when_only_the_batch_changes(tmp_path):
    digests = set()
    for fields in ({}, {"sampling__batch_size": 8}, {"sampling__num_images": 12}, {"sampling__seed": 1}):
        experiment = TextToImageExperiment(changed(tiny_config(tmp_path), **fields))
        digests.add(experiment.sampling_digest(experiment.target("red_circle")))
    assert len(digests) == 2  # of the two seeds
