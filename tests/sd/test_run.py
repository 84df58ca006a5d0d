"""The whole config on the tiny pipeline: encode, neighbors, unlearn, sample, evaluate, report, export."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.api import run
from retrack_jax.checkpoints.stable_diffusion import load_pipeline
from retrack_jax.checks import UserError
from retrack_jax.data.sources.concepts import load_concept
from retrack_jax.evaluate.networks import load_sscd
from retrack_jax.evaluate.prompts import (
    CLASSIFIERS,
    EVALUATORS,
    METRIC_NAMES,
    ConceptTask,
    PromptSamples,
    concept_centers,
    load_clip_iqa,
    memorised_of_both,
    memorised_samples,
)
from retrack_jax.evaluate.results import Unavailable, evaluate
from retrack_jax.problem import text_to_image
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import write_safetensors
from tests.metrics.feature_weights import random_state, sscd_shapes
from tests.sd.openai_clip import openai_tensors
from tests.sd.test_sweep import files_of
from tests.sd.tiny import CONCEPTS, tiny_config
from tests.torch_files import save_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pipeline):
    """A run of ReTrack; the same command again finds nothing to do."""
    tmp_path = tmp_path_factory.mktemp("sd")
    tensors = openai_tensors(pipeline.tokenizer.eos_id + 1)
    (tmp_path / "weights").mkdir()
    items = [
        TorchTensor(name, value.dtype, value.shape, lambda value=value: value) for name, value in sorted(tensors.items())
    ]
    write_safetensors(tmp_path / "weights" / "RN50.safetensors", items)
    save_state(tmp_path / "weights" / "sscd_disc_mixup.torchvision.pt", random_state(sscd_shapes()))  # the real layout

    config = tiny_config(tmp_path)
    summary = run(config, tmp_path / "work")
    (tmp_path / "work" / "retrack" / "seed0-red_circle" / "checkpoints").rename(
        tmp_path / "gone"
    )  # needed for any stage but none
    assert run(config, tmp_path / "work") == summary
    return tmp_path, summary


def test_files_and_metrics(finished):
    tmp_path, summary = finished
    assert summary["methods"]["retrack"]["runs"] == 1
    folder = tmp_path / "work" / "retrack" / "seed0-red_circle"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["unlearned"]) == set(metrics["pretrained"]) == set(METRIC_NAMES)
    for name in ("clip_iqa_original", "sscd_original", "sscd_modified"):
        assert metrics["unlearned"][name] != metrics["pretrained"][name] and -1 <= metrics["unlearned"][name] <= 1
    assert "sscd_disc_mixup" in metrics["provenance"]["metrics"]["sscd_original"]["features"]
    assert metrics["provenance"]["data"]["prompts"]["modified"].startswith("a picture of something")
    assert metrics["steps"] == 2 and metrics["retrained"] is None
    assert (folder / "report.html").is_file() and (folder / "samples.png").is_file()


def test_samples_are_of_both_prompts_in_uint8_and_floats(finished):
    tmp_path, _ = finished
    with np.load(tmp_path / "work" / "retrack" / "seed0-red_circle" / "samples.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert set(arrays) == {"original", "modified", "original_float", "modified_float"}
    assert arrays["original"].shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(arrays["original"], np.floor(255 * arrays["original_float"]))
    assert not np.array_equal(arrays["original"], arrays["modified"])
    with np.load(tmp_path / "work" / "pretrained" / "red_circle" / "samples.npz") as archive:
        assert not np.array_equal(archive["original"], arrays["original"])


def test_export_is_the_unlearned_pipeline(finished, pipeline):
    tmp_path, _ = finished
    folder = tmp_path / "work" / "retrack" / "seed0-red_circle" / "diffusers"
    unlearned = load_pipeline(folder)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), unlearned.unet_params, pipeline.unet_params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    jax.tree.map(np.testing.assert_array_equal, unlearned.vae_params, pipeline.vae_params)
    assert "red_circle" in (folder / "README.md").read_text() and (folder / "LICENSE").is_file()


def test_what_may_change_in_a_workdir_and_what_follows(finished):
    """Sizes of batches change nothing that is done; another classifier and another export are made, and nothing else."""
    tmp_path, summary = finished
    work = tmp_path / "changed"
    shutil.copytree(tmp_path / "work", work)
    folder = work / "retrack" / "seed0-red_circle"
    shutil.copytree(tmp_path / "gone", folder / "checkpoints")
    config = tiny_config(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    stored["sampling"]["batch_size"] = 4  # as it was written before this field was free
    (folder / "config.json").write_text(json.dumps(stored))
    with config.unlocked():
        config.update_from_flattened_dict({"sampling.batch_size": 8, "data.encode_batch_size": 2, "compute.remat": True})
    before = files_of(folder)
    assert run(config, work) == summary and files_of(folder) == before

    with config.unlocked():
        config.update_from_flattened_dict({"eval.classifier": "labels", "export": "unet"})
    run(config, work)
    metrics = json.loads((folder / "metrics.json").read_text())
    notes = metrics["provenance"]["metrics"]
    assert notes["success_rate_original"]["classifier"] == notes["success_rate_modified"]["classifier"] == CLASSIFIERS["labels"]
    assert "sscd_disc_mixup" in notes["sscd_original"]["features"]
    pretrained = json.loads((work / "pretrained" / "red_circle" / "metrics-red_circle.json").read_text())
    assert pretrained["notes"]["success_rate_original"]["classifier"] == CLASSIFIERS["labels"]
    assert (folder / "diffusers" / "config.json").is_file() and not (folder / "diffusers" / "unet").exists()
    for name in ("samples.npz", "log.jsonl"):
        assert files_of(folder)[folder / name] == before[folder / name]
    before = files_of(folder)
    run(config, work)
    assert files_of(folder) == before

    shutil.copytree(CONCEPTS, tmp_path / "concepts")
    prompts = tmp_path / "concepts" / "modified_prompts.json"
    prompts.write_text(json.dumps({**json.loads(prompts.read_text()), "red_circle": "another picture"}))
    with config.unlocked():
        config.data.dir = str(tmp_path / "concepts")
    with pytest.raises(UserError, match="red_circle holds a run with other prompts than the config names now"):
        run(config, work)


def test_experiment_gives_the_stages_what_they_ask(finished):
    tmp_path, _ = finished
    experiment = text_to_image.TextToImageExperiment(tiny_config(tmp_path))
    red, blue = experiment.target("red_circle"), experiment.target("blue_square")
    assert not {*red.forget, *red.remain} & {*blue.forget, *blue.remain}  # rows number the pictures of all concepts

    neighbors = experiment.forget_data(red, 3, "exact")
    assert neighbors.forget["x_0"].shape == (len(red.unique), 8, 8, 4)
    found = neighbors.neighbors["x_0"][neighbors.neighbor_rows]
    difference = np.linalg.norm((neighbors.forget["x_0"][:, None] - found).reshape(*found.shape[:2], -1), axis=-1)
    np.testing.assert_allclose(difference, neighbors.distances, rtol=1e-5)
    assert (np.diff(difference, axis=1) >= 0).all()
    assert set(experiment.forget_data(red, 0, "exact").forget) == {"mean", "std"}  # other methods draw afresh

    streamed = experiment.gather(blue.remain)(np.array([0, 2]))
    assert set(streamed) == {"mean", "std"} and streamed["mean"].shape == (2, 8, 8, 4)
    (embedding,) = experiment.condition(red)
    assert embedding.shape == (1, 77, 16)


def test_metrics_of_samples_with_a_known_answer(tmp_path):
    """One prompt draws the memorised picture, the other one that remains."""
    concept = load_concept(CONCEPTS, "red_circle", resolution=32, cache_dir=tmp_path)
    other = concept.images.images[concept.remain[:3]]
    samples = PromptSamples({"original": np.stack([concept.memorised] * 3), "modified": other})

    def colours(images):
        return {"features": np.asarray(images, np.float32).mean(axis=(1, 2)) - 100}

    colours.description, colours.digest = "mean colour", "0" * 64
    centers = concept_centers(concept, "joblib")
    task = ConceptTask(concept=concept, centers=lambda: centers, centers_name="", sscd=lambda: colours, clip_iqa=None)
    wanted = tuple(name for name in METRIC_NAMES if not name.startswith("clip_iqa"))
    found = evaluate(EVALUATORS, wanted, task, samples, tmp_path / "metrics.json").values
    assert found["success_rate_original"] == 0.0 and found["success_rate_modified"] == 1.0
    assert found["sscd_original"] == pytest.approx(1.0, abs=1e-6) and found["sscd_modified"] < 0.9
    assert list(memorised_samples(task, samples, "original")) == [True] * 3


def test_a_metric_without_its_files_is_unavailable_and_says_what_to_do(tmp_path, pipeline):
    with pytest.raises(Unavailable, match="no sscd_disc_mixup.torchscript.pt or .* in .*mode=check"):
        load_sscd(tmp_path)
    with pytest.raises(Unavailable, match="no RN50.pt or RN50.safetensors in .*mode=check"):
        load_clip_iqa(tmp_path, pipeline.tokenizer, 4)
    (tmp_path / "RN50.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(Unavailable, match="RN50.pt"):
        load_clip_iqa(tmp_path, pipeline.tokenizer, 4)
    concept = load_concept(CONCEPTS, "red_circle", resolution=32, cache_dir=tmp_path)
    hidden = dataclasses.replace(concept, folder=tmp_path)
    with pytest.raises(Unavailable, match="classifier=labels") as raised:
        concept_centers(hidden, "joblib")
    assert str(raised.value).count("labels") == 1  # the advice is given once
    np.testing.assert_allclose(concept_centers(hidden, "labels"), concept_centers(concept, "joblib"), atol=1e-3)


def test_a_classifier_for_another_size_leaves_out_its_metric_alone(tmp_path):
    """A checkpoint of another resolution than the shipped classifier's is no reason to lose the other metrics."""
    concept = load_concept(CONCEPTS, "red_circle", resolution=16, cache_dir=tmp_path)
    samples = PromptSamples({kind: concept.images.images[:3] for kind in ("original", "modified")})

    def colours(images):
        return {"features": np.asarray(images, np.float32).mean(axis=(1, 2))}

    colours.description, colours.digest = "mean colour", "0" * 64
    task = ConceptTask(
        concept=concept,
        centers=lambda: concept_centers(concept, "joblib"),
        centers_name="",
        sscd=lambda: colours,
        clip_iqa=None,
    )
    wanted = ("sscd_original", "success_rate_original")
    found = evaluate(EVALUATORS, wanted, task, samples, tmp_path / "metrics.json")
    assert set(found.values) == {"sscd_original"}
    message = found.absent["success_rate_original"]
    assert "kmeans_classifier.joblib is for 32 x 32 pixels and config.data.resolution gives 16 x 16" in message
    assert message.count("classifier=labels") == 1
    assert memorised_of_both(task, samples) is None
    assert concept_centers(concept, "labels").shape == (2, 16 * 16 * 3)
