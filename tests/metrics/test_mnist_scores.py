"""MNIST's inception scores: the classifier beside the FID network in one run, its two modes, and files that are not its own."""

import json

import numpy as np
import pytest

from configs import mnist_tshirt
from retrack_jax.api import run
from retrack_jax.checks import UserError
from retrack_jax.evaluate.images import class_score
from retrack_jax.evaluate.networks import MNIST_FILE, check_score_network, feature_network, load_mnist_resnet, load_sscd
from retrack_jax.evaluate.results import Unavailable
from retrack_jax.files import file_digest
from retrack_jax.metrics.features.inception import FILE as INCEPTION_FILE
from retrack_jax.metrics.features.resnet import mnist_resnet_network
from retrack_jax.metrics.inception_score import OFFICIAL, inception_score
from tests.metrics.feature_weights import mnist_shapes, random_images, random_state
from tests.tiny import TINY
from tests.torch_files import save_state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with random weights in the layout of the real file."""
    folder = tmp_path_factory.mktemp("weights")
    save_state(folder / MNIST_FILE, random_state(mnist_shapes()))
    return folder


def test_a_run_without_the_weights_says_so_and_the_same_command_adds_the_scores(tmp_path, weights):
    np.savez(tmp_path / "data.npz", images=random_images(24, 28, 1), labels=np.arange(24) % 11)
    config = mnist_tshirt.get_config("pretrained")  # one model to score, and nothing to unlearn
    with config.unlocked():
        config.update_from_flattened_dict({name: value for name, value in TINY.items() if name != "data.copies"})
        config.data.source, config.data.dir, config.data.copies = "npz", str(tmp_path / "data.npz"), 0
        config.data.cache_dir = str(tmp_path / "cache")
        config.seeds = (0,)
        config.eval.metrics = ("fid", "inception_score", OFFICIAL)
        config.eval.frequency_threshold = 0.0
        config.eval.weights_dir = str(tmp_path / "weights")
    run(config, tmp_path / "work")
    folder = tmp_path / "work" / "pretrained" / "seed0-label_10"
    metrics = json.loads((folder / "metrics.json").read_text())
    absent = metrics["provenance"]["absent"]
    assert metrics["unlearned"] == {} and set(absent) == {"fid", "inception_score", OFFICIAL}
    assert INCEPTION_FILE in absent["fid"] and MNIST_FILE in absent["inception_score"] and "mode=check" in absent[OFFICIAL]
    assert "no mnist.pt in" in (folder / "report.html").read_text()

    with config.unlocked():
        config.eval.weights_dir = str(weights)  # where files lie may differ from one command to the next
    run(config, tmp_path / "work")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["provenance"]["absent"]) == {"fid"}  # Inception's file is still not there
    samples = np.load(tmp_path / "work" / "pretrained" / "samples.npz")["samples_float"]
    notes = metrics["provenance"]["metrics"]
    for name, official in (("inception_score", False), (OFFICIAL, True)):
        network = load_mnist_resnet(weights, official)
        expected = inception_score(network(samples)["logits"], seed=0, official=official).mean
        # Random weights hardly tell images apart: what is above 1 is what must agree.
        assert metrics["unlearned"][name] - 1 == pytest.approx(expected - 1, rel=1e-3) and 1e-6 < expected - 1 < 9
        assert notes[name]["samples"] == "float32" and notes[name]["features_digest"] == file_digest(weights / MNIST_FILE)
    assert "batch of 256" in notes[OFFICIAL]["batch_dependent"] and "batch_dependent" not in notes["inception_score"]


def test_the_official_mode_alone_depends_on_the_batch():
    samples = random_images(24, 28, 1).astype(np.float32) / np.float32(255)
    for name, depends in (("inception_score", False), (OFFICIAL, True)):
        state = random_state(mnist_shapes())
        network = mnist_resnet_network(state, "d" * 64, official=name == OFFICIAL, batch_size=24)
        with_others, alone = network(samples)["logits"][:12], network(samples[:12])["logits"]
        assert (np.abs(with_others - alone).max() > 1e-2) == depends
        (value,) = class_score(name, lambda official, network=network: network, samples)[0].values()
        assert 1.0 <= value <= 10.0


def test_too_few_samples_and_nan(weights):
    values, note = class_score("inception_score", lambda official: None, random_images(9, 28, 1))
    assert values == {} and "10 splits need as many samples; 9 are left" in note["why"]
    samples = np.zeros((12, 28, 28, 1), np.float32)
    samples[3] = np.nan
    with pytest.raises(UserError, match="1 of 12 images hold NaN or infinity, the first is number 3"):
        class_score("inception_score", lambda official: load_mnist_resnet(weights), samples)


def test_what_cannot_be_scored_is_told_before_anything_runs():
    check_score_network("features", ("fid", "inception_score"), (32, 32, 3))
    check_score_network("mnist_resnet", ("inception_score", OFFICIAL), (28, 28, 1))
    check_score_network("mnist_resnet", ("fid",), (32, 32, 3))
    with pytest.raises(UserError, match="inception_score_official, which only the MNIST classifier gives"):
        check_score_network("features", (OFFICIAL,), (28, 28, 1))
    with pytest.raises(UserError, match=r"takes images of \(28, 28, 1\), and these are \(32, 32, 3\)"):
        check_score_network("mnist_resnet", ("inception_score",), (32, 32, 3))
    with pytest.raises(UserError, match="choose one of features, mnist_resnet"):
        check_score_network("mnist", ("fid",), (28, 28, 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "mnist.pt"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "mnist.pt"),
        (lambda path: save_state(path, {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}), "not fit the MNIST ResNet-18"),
        (
            lambda path: save_state(path, random_state(mnist_shapes()) | {"fc.bias": np.zeros(11, np.float32)}),
            r"fc.bias \[11\] instead of \[10\]",
        ),
    ],
    ids=["truncated", "a page", "another network", "another shape"],
)
def test_a_file_that_is_not_the_classifiers_leaves_the_metric_out(tmp_path, weights, spoil, message):
    path = tmp_path / MNIST_FILE
    path.write_bytes((weights / MNIST_FILE).read_bytes())
    spoil(path)
    with pytest.raises(Unavailable, match=message):
        load_mnist_resnet(tmp_path)


@pytest.mark.parametrize("name", ["sscd_disc_mixup.torchscript.pt", "sscd_disc_mixup.classy.pt", INCEPTION_FILE])
def test_other_networks_files_that_are_damaged_or_of_another_network(tmp_path, weights, name):
    def load():
        return feature_network("inception", None, tmp_path, tmp_path, "tf1") if name == INCEPTION_FILE else load_sscd(tmp_path)

    whole = (weights / MNIST_FILE).read_bytes()
    for content in (whole, whole[: len(whole) // 2], b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Unavailable, match=name):
            load()
