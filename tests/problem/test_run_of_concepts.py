"""The whole config on the tiny pipeline: encode, neighbors, unlearn, sample, evaluate, report, export."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.api import run
from retrack_jax.checkpoints.stable_diffusion import load_pipeline
from retrack_jax.checks import UserError
from retrack_jax.evaluate.concepts import EVALUATORS
from retrack_jax.metrics.kmeans import CLASSIFIERS
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import write_safetensors
from tests.metrics.feature_weights import random_state, sscd_shapes
from tests.openai_clip import openai_tensors
from tests.problem.test_sweep_of_concepts import files_of
from tests.tiny_sd import CONCEPTS, tiny_config
from tests.torch_files import save_state


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pipeline):
    """A run of ReTrack; the same command again finds nothing to do."""
    tmp_path = tmp_path_factory.mktemp("sd")
    tensors = openai_tensors(pipeline.tokenizer.eos_id + 1)
    (tmp_path / "weights").mkdir()
    items = [TorchTensor(name, value.dtype, value.shape, lambda value=value: value) for name, value in sorted(tensors.items())]
    write_safetensors(tmp_path / "weights" / "RN50.safetensors", items)
    save_state(tmp_path / "weights" / "sscd_disc_mixup.torchvision.pt", random_state(sscd_shapes()))  # the real layout

    config = tiny_config(tmp_path)
    summary = run(config, tmp_path / "work")
    (tmp_path / "work" / "retrack" / "seed0-red_circle" / "checkpoints").rename(
        tmp_path / "gone"
    )  # needed for any stage but none
    assert run(config, tmp_path / "work") == summary
    return tmp_path, summary


def test_a_run_leaves_a_report_and_metrics_of_both_models(finished):
    tmp_path, summary = finished
    assert summary["methods"]["retrack"]["runs"] == 1
    folder = tmp_path / "work" / "retrack" / "seed0-red_circle"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (
        set(metrics["unlearned"]) == set(metrics["pretrained"]) == {name for evaluator in EVALUATORS for name in evaluator.names}
    )
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


def test_the_export_is_the_unlearned_pipeline(finished, pipeline):
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
    with config.unlocked():
        config.update_from_flattened_dict({"sampling.batch_size": 8, "data.encode_batch_size": 2, "compute.remat": True})
    before = files_of(folder)
    assert run(config, work) == summary and files_of(folder) == before

    with config.unlocked():
        config.update_from_flattened_dict({"eval.classifier": "labels", "export": "unet"})
    run(config, work)
    metrics = json.loads((folder / "metrics.json").read_text())
    notes = metrics["provenance"]["metrics"]
    assert notes["success_rate_original"]["classifier"] == notes["success_rate_modified"]["classifier"]
    assert "sscd_disc_mixup" in notes["sscd_original"]["features"]
    pretrained = json.loads((work / "pretrained" / "red_circle" / "metrics-red_circle.json").read_text())
    assert pretrained["notes"]["success_rate_original"]["classifier"].startswith(CLASSIFIERS["labels"])
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
