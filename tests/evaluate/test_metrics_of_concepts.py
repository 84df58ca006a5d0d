"""Metrics of prompts' samples: a known answer, and files that are missing or of another size."""

import dataclasses

import numpy as np
import pytest

from retrack_jax.data.sources.concepts import load_concept
from retrack_jax.evaluate.concepts import EVALUATORS, concept_centers, concept_task, memorised_of_both
from retrack_jax.evaluate.networks import load_sscd
from retrack_jax.evaluate.results import Unavailable, evaluate
from retrack_jax.evaluate.text import load_clip_iqa
from tests.tiny_sd import CONCEPTS


def test_metrics_of_samples_with_a_known_answer(tmp_path):
    """One prompt draws the memorised picture, the other one that remains."""
    concept = load_concept({"dir": CONCEPTS, "resolution": 32, "cache_dir": tmp_path}, "red_circle")
    other = concept.images.images[concept.remain[:3]]
    samples = {"original": np.stack([concept.memorised] * 3), "modified": other}

    def colours(images):
        return {"features": np.asarray(images, np.float32).mean(axis=(1, 2)) - 100}

    colours.description, colours.digest = "mean colour", "0" * 64
    task = concept_task(concept, "joblib", sscd=lambda: colours, clip_iqa=None)
    wanted = tuple(f"{metric}_{kind}" for metric in ("sscd", "success_rate") for kind in ("original", "modified"))
    found = evaluate(EVALUATORS, wanted, task, samples, tmp_path / "metrics.json").values
    assert found["success_rate_original"] == 0.0 and found["success_rate_modified"] == 1.0
    assert found["sscd_original"] == pytest.approx(1.0, abs=1e-6) and found["sscd_modified"] < 0.9
    assert list(memorised_of_both(task, samples)["original"]) == [True] * 3


def test_a_metric_without_its_files_is_unavailable_and_says_what_to_do(tmp_path, pipeline):
    with pytest.raises(Unavailable, match="no sscd_disc_mixup.torchscript.pt or .* in .*mode=check"):
        load_sscd(tmp_path)
    with pytest.raises(Unavailable, match="no RN50.pt or RN50.safetensors in .*mode=check"):
        load_clip_iqa(tmp_path, pipeline.tokenizer, 4)
    (tmp_path / "RN50.pt").write_bytes(b"<html>not found</html>")
    with pytest.raises(Unavailable, match="RN50.pt"):
        load_clip_iqa(tmp_path, pipeline.tokenizer, 4)
    concept = load_concept({"dir": CONCEPTS, "resolution": 32, "cache_dir": tmp_path}, "red_circle")
    hidden = dataclasses.replace(concept, folder=tmp_path)
    with pytest.raises(Unavailable, match="classifier=labels") as raised:
        concept_centers(hidden, "joblib")
    assert str(raised.value).count("labels") == 1  # the advice is given once
    np.testing.assert_allclose(concept_centers(hidden, "labels"), concept_centers(concept, "joblib"), atol=1e-3)


def test_a_classifier_for_another_size_leaves_out_its_metric_alone(tmp_path):
    """A checkpoint of another resolution than the shipped classifier's is no reason to lose the other metrics."""
    concept = load_concept({"dir": CONCEPTS, "resolution": 16, "cache_dir": tmp_path}, "red_circle")
    samples = {kind: concept.images.images[:3] for kind in ("original", "modified")}

    def colours(images):
        return {"features": np.asarray(images, np.float32).mean(axis=(1, 2))}

    colours.description, colours.digest = "mean colour", "0" * 64
    task = concept_task(concept, "joblib", sscd=lambda: colours, clip_iqa=None)
    wanted = ("sscd_original", "success_rate_original")
    found = evaluate(EVALUATORS, wanted, task, samples, tmp_path / "metrics.json")
    assert set(found.values) == {"sscd_original"}
    message = found.absent["success_rate_original"]
    assert "kmeans_classifier.joblib is for 32 x 32 pixels and config.data.resolution gives 16 x 16" in message
    assert message.count("classifier=labels") == 1
    assert memorised_of_both(task, samples) is None
    assert concept_centers(concept, "labels").shape == (2, 16 * 16 * 3)
