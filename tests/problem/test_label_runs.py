"""Whole commands with label-conditional networks: from the data's labels to the export, and what ends in one line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_label
from retrack_jax.checkpoints import export_diffusers, import_diffusers
from retrack_jax.config.reading import read_config
from retrack_jax.main import main
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.problem.problem import build_problem
from tests.messages import error_of
from tests.tiny import flags

CONFIG = "--config=configs/digits_label.py"
METRICS = ("frequency", "label_frequency", "nll_bits_per_dim", "forget_loss")


def run(tmp_path, **fields) -> int:
    return main(["retrack_jax", CONFIG, *flags(tmp_path / "run", **{"eval.metrics": METRICS, **fields})])


def checkpoint(folder, seed=0, **options):
    """Writes a tiny network of digits with labels."""
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    one = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4}
    module = UNet2D(**small, **one, add_attention=False, **options)
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32), *module.smallest_label
    export_diffusers(folder, module, jax.jit(module.init)(jax.random.key(seed), *inputs)["params"], schedule={})
    return folder


def test_a_run_with_labels_from_the_data_to_the_export(tmp_path):
    assert run(tmp_path, **{"sampling.labels": "(7,3)"}) == 0
    (folder,) = (tmp_path / "run" / "retrack").glob("seed0-*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(METRICS) == set(metrics["unlearned"]) == set(metrics["pretrained"])
    assert metrics["provenance"]["metrics"]["label_frequency"]["labels"] == [7] and "note" not in metrics["provenance"]
    module, params = import_diffusers(folder / "diffusers")
    assert module.num_class_embeds == 11 and params["class_embedding"]["embedding"].shape == (11, 32)
    with np.load(folder / "samples.npz") as after, np.load(tmp_path / "run" / "pretrained" / "samples.npz") as before:
        np.testing.assert_array_equal(after["labels"], before["labels"])
        assert after["labels"].shape == (12,) and after["labels"].max() < 10
    page = (folder / "report.html").read_text()
    assert "How often the T-shirt is drawn under each label" in page and "Frequency under its label" in page


def test_samples_are_known_by_all_that_they_depend_on(tmp_path):
    """Guidance leads away from the null label, so other samples come of another one."""
    models = {seed: str(checkpoint(tmp_path / f"model{seed}", seed, num_class_embeds=12)) for seed in (0, 1)}
    same, other = {"sampling.batch_size": 64, "unlearn.num_steps": 3}, {"sampling.seed": 5}
    changes = [{}, same, other, {"data.null_label": 11}, {"sampling.label_guidance": 3.0}, {"sampling.labels": (7,)}]
    changes += [
        {"sampling.sampler": "ddim"},
        {"checkpoint": models[1]},
        {"save_float": False},
        {"compute.param_dtype": "bfloat16"},
    ]
    keys = []
    for change in changes:
        config = digits_label.get_config()
        config.update_from_flattened_dict({"checkpoint": models[0], "data.copies": 8, **change})
        problem = build_problem(read_config(config))
        keys.append(str(problem.sampler.depends_on(problem.target("tshirt_*"), "of the parameters")))
    assert keys[0] == keys[1] and len(set(keys)) == len(keys) - 1


def test_a_whole_class_is_led_to_the_null_label_and_the_card_says_so(tmp_path, capsys):
    fields = {"targets": ("label:3",), "unlearn.retrack.whole_class": "null", "eval.metrics": ("frequency",)}
    fields |= {"sampling.labels": "(3,10)", "sampling.label_guidance": 2.0}
    assert run(tmp_path, **{**fields, "unlearn.retrack.whole_class": ""}) == 2
    assert "no image of label 3 remains besides label:3" in error_of(capsys)
    assert run(tmp_path, **fields) == 0
    folder = tmp_path / "run" / "retrack" / "seed0-label_3"
    sentence = (
        "No image of label 3 remains; under it the model was led to what the pretrained model predicts under the null label"
    )
    assert sentence in (folder / "diffusers" / "README.md").read_text()
    assert sentence in (folder / "report.html").read_text()
    assert json.loads((folder / "metrics.json").read_text())["provenance"]["note"].startswith(sentence)
    with np.load(folder / "samples.npz") as samples:
        assert samples["labels"].tolist() == [3, 10] * 6


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_networks_that_embed_labels_otherwise(tmp_path, kind, capsys):
    folder = checkpoint(tmp_path / "model", class_embed_type=kind)
    fields = {"checkpoint": folder, "data.null_label": None, "sampling.labels": "(7,3)"}
    fields["eval.metrics"] = ("forget_loss", "label_frequency")
    if kind == "identity":
        assert run(tmp_path, **fields) == 2
        assert "set config.data.label_vectors to an .npy file [labels, 32]" in error_of(capsys)
        np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(10, 32)))
        fields["data.label_vectors"] = tmp_path / "vectors.npy"
    else:
        assert run(tmp_path, **fields, **{"data.label_vectors": "vectors.npy"}) == 2
        assert "config.data.label_vectors is vectors.npy, and the network takes no vectors" in error_of(capsys)
    assert run(tmp_path, **fields) == 0
    (exported,) = (tmp_path / "run" / "retrack").glob("*/diffusers")
    module, params = import_diffusers(exported)
    assert module.class_embed_type == kind and ("class_embedding" in params) == (kind == "timestep")
    assert json.loads((exported.parent / "metrics.json").read_text())["unlearned"].keys() == {"forget_loss", "label_frequency"}


def test_labels_that_do_not_fit_the_network_end_the_command_with_one_line(tmp_path, capsys):
    assert run(tmp_path, **{"model.num_class_embeds": 9, "data.null_label": None}) == 2
    assert "has label 9, and the network knows 0 to 8" in error_of(capsys)
    np.savez(tmp_path / "plain.npz", images=np.zeros((9, 8, 8, 1), np.uint8), ids=np.array(list("abcdefghi")))
    plain = {
        "data.source": "npz",
        "data.dir": tmp_path / "plain.npz",
        "data.copies": 0,
        "data.copies_label": None,
        "targets": ("a",),
    }
    assert run(tmp_path, **plain) == 2
    assert "the network takes class labels, and npz has none; of a folder config.data.labels says" in error_of(capsys)
    assert run(tmp_path, **{"model.num_class_embeds": None}) == 2
    assert "config.data.null_label: the network takes no class labels" in error_of(capsys)
    assert run(tmp_path, **{"data.exclude": "label:4", "targets": ("label:4",)}) == 2
    assert "the target 'label:4' names digit_0004, digit_0014, digit_0024, which config.data.exclude" in error_of(capsys)
