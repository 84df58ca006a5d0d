"""What a run on concepts is refused for before it trains; K, devices, and the precision and fingerprint of its samples."""

import jax
import numpy as np
import pytest

from configs import stable_diffusion
from retrack_jax import parallel
from retrack_jax.api import run
from retrack_jax.checks import UserError
from retrack_jax.config.devices import fit_to_devices
from retrack_jax.config.reading import read_config
from retrack_jax.problem import sampler
from retrack_jax.problem.problem import Problem, build_problem, check_problem
from tests.tiny_sd import tiny_config


def changed(config, **fields):
    with config.unlocked():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def problem_of(config) -> Problem:
    return build_problem(read_config(config))


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
        ({"unlearn.num_neighbors": 11}, "K. is 11, but only 10 images remain besides red_circle"),
        ({"export": "all"}, "pipeline, unet, single_file, none"),
        ({"method": "retrain"}, "config.method is retrain, but how .*pipeline was trained is not in this config"),
    ],
)
def test_a_run_of_a_bad_config_is_refused_before_it_begins(tmp_path, change, message):
    config = changed(tiny_config(tmp_path), **change)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "work")
    assert not (tmp_path / "work" / "retrack").exists()


@pytest.mark.parametrize("field, value", [("held_out", 0.05), ("exclude", "red_circle"), ("channels", 3), ("skip_corrupt", True)])
def test_a_field_that_concepts_have_no_use_for_is_refused(tmp_path, field, value):
    config = tiny_config(tmp_path)
    check_problem(read_config(config))
    config.data[field] = value
    with pytest.raises(UserError, match=rf"config.data.{field}: concepts have no use for it; leave it out"):
        check_problem(read_config(config))


def test_a_method_without_neighbors_takes_any_k(tmp_path):
    problem = problem_of(changed(tiny_config(tmp_path, "siss"), unlearn__num_neighbors=11))
    assert len(problem.target("red_circle").remain) == 10


@pytest.mark.parametrize("method", ["neggrad", "retrack"])
def test_a_sweep_with_a_broken_concept_does_not_begin(tmp_path, concepts, method):
    (concepts / "red_circle" / "kmeans_labels.json").unlink()
    config = changed(tiny_config(tmp_path, method), targets=("blue_square,red_circle",), data__dir=str(concepts))
    with pytest.raises(UserError, match="no kmeans_labels.json in .*red_circle"):
        run(config, tmp_path / "work")
    assert not (tmp_path / "work" / method).exists()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_recipe_keeps_its_batch_on_any_number_of_devices(monkeypatch, devices):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    options = fit_to_devices(read_config(stable_diffusion.get_config()))
    recipe = options.recipe("retrack")
    assert (recipe.batch_size, recipe.accumulation) == (16, 16 // devices)
    assert options.sampling.batch_size == max(4, devices)


def test_a_batch_that_two_devices_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    odd = changed(stable_diffusion.get_config(), unlearn__batch_size=15)
    with pytest.raises(UserError, match="batch_size is 15, .* 2 devices x 16 .*choose a multiple of 32$"):
        fit_to_devices(read_config(odd))


def sampled_with(monkeypatch, problem: Problem, params, tmp_path):
    """The network's parameters with which `problem` draws its samples; nothing is drawn."""
    used = []
    monkeypatch.setattr(
        sampler, "generate", lambda p_sample, params, **how: used.append(params) or np.zeros((4, 32, 32, 3), np.uint8)
    )
    problem.sampler.sample(
        problem.target("red_circle"), params, out_dir=tmp_path / "parts", fingerprint="", progress=lambda *counts: None
    )
    assert len(used) == 2  # one for each prompt
    return [each.unet for each in used]


def test_bfloat16_parameters_are_for_sampling_alone(tmp_path, monkeypatch):
    plain = problem_of(tiny_config(tmp_path))
    problem = problem_of(changed(tiny_config(tmp_path), compute__param_dtype="bfloat16"))
    for params in (problem.denoiser.params, jax.eval_shape(lambda: problem.denoiser.init_params(0))):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}  # what training starts from
    given = parallel.replicate(problem.denoiser.params)
    for params in sampled_with(monkeypatch, problem, given, tmp_path):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(jax.numpy.bfloat16)}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))  # else it would take memory rather than save some
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(problem.denoiser.params))  # and the checkpoint's stay
    assert problem.sampler.digest != plain.sampler.digest

    kept = parallel.replicate(plain.denoiser.params)
    for params in sampled_with(monkeypatch, plain, kept, tmp_path):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params, kept))


def test_finished_pictures_stay_of_use_when_only_the_batch_or_their_number_changes(tmp_path):
    digests = set()
    for fields in ({}, {"sampling__batch_size": 8}, {"sampling__num_images": 12}, {"sampling__seed": 1}):
        digests.add(problem_of(changed(tiny_config(tmp_path), **fields)).sampler.digest)
    assert len(digests) == 2  # of the two seeds
