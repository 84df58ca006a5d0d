"""An adapter to the tiny Stable Diffusion: its file, the merged pipeline in its place; neither is taken for the other."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from retrack_jax.api import run
from retrack_jax.checkpoints.diffusers_export import LORA_WEIGHTS
from retrack_jax.checks import UserError
from retrack_jax.unlearn.calibration import LARGEST
from retrack_jax.weights.folder import open_weights
from retrack_jax.weights.kinds import check_supported
from tests.tiny_sd import PIPELINE, tiny_config

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run up to its export, with the options that made it."""
    tmp_path = tmp_path_factory.mktemp("lora")
    config = tiny_config(tmp_path)
    with config.unlocked():
        config.mode = "unlearn"
        config.unlearn.adapter, config.unlearn.lora.export = "lora", "adapter"
        config.unlearn.lora.rank, config.unlearn.lora.alpha = 2, 5.0
        config.unlearn.lora.layers = ("to_q", "to_out.0", "conv1")
        config.unlearn.calibrate = "1e9"  # beyond reach: the change is as large as calibration makes any
    run(config, tmp_path / "work")
    return config, tmp_path / "work", tmp_path / "work" / "retrack" / "seed0-red_circle" / "diffusers"


def test_the_file_has_pefts_names_and_its_metadata_have_alpha(adapter):
    _, _, folder = adapter
    assert {path.name for path in folder.iterdir()} == {"README.md", "LICENSE", LORA_WEIGHTS}
    assert "red_circle" in (card := (folder / "README.md").read_text()) and "load_lora_weights" in card
    with safe_open(folder / LORA_WEIGHTS, "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        metadata = file.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert metadata["format"] == "pt" and settings["unet.r"] == 2 and settings["unet.lora_alpha"] == 5
    _, base = open_weights(PIPELINE / "unet")
    assert set(shapes) == {f"unet.{name}.lora_{part}.weight" for name in settings["unet.target_modules"] for part in "AB"}
    assert all(name.endswith(("to_q", "to_out.0", "conv1")) for name in settings["unet.target_modules"])
    out, inside = base.shape(f"{LAYER}.weight")
    assert shapes[f"unet.{LAYER}.lora_A.weight"] == (2, inside) and shapes[f"unet.{LAYER}.lora_B.weight"] == (out, 2)
    out, inside, *kernel = base.shape("mid_block.resnets.0.conv1.weight")
    conv = "unet.mid_block.resnets.0.conv1"
    assert shapes[f"{conv}.lora_A.weight"] == (2, inside, *kernel) and shapes[f"{conv}.lora_B.weight"] == (out, 2, 1, 1)


def test_it_is_no_checkpoint(adapter):
    with pytest.raises(UserError, match="is an adapter .LoRA., which changes a model and is none"):
        check_supported(adapter[2])


def test_the_merged_pipeline_is_base_plus_adapter_and_needs_no_new_training(adapter, tmp_path):
    config, work, folder = adapter
    shutil.copytree(work, tmp_path / "work")
    config = config.copy_and_resolve_references()
    config.unlearn.lora.export = "merged"
    run(config, tmp_path / "work")
    merged_folder = tmp_path / "work" / folder.relative_to(work)
    log = folder.parent / "log.jsonl"
    assert (merged_folder.parent / "log.jsonl").read_text() == log.read_text()
    assert (merged_folder / "model_index.json").is_file() and not (merged_folder / LORA_WEIGHTS).exists()
    calibration = json.loads((folder.parent / "calibration.json").read_text())
    assert calibration["alpha"] == LARGEST != 1  # which both exports have in them
    (_, base), (_, merged) = open_weights(PIPELINE / "unet"), open_weights(merged_folder / "unet")
    with safe_open(folder / LORA_WEIGHTS, "np") as file:
        changes = {name: file.get_tensor(name).astype(np.float64) for name in file.keys()}
    for name in base:
        weight, layer = np.asarray(base[name], np.float64), name.removesuffix(".weight")
        if f"unet.{layer}.lora_A.weight" in changes:
            a, b = (changes[f"unet.{layer}.lora_{part}.weight"] for part in "AB")
            change = (b.reshape(len(b), 2) @ a.reshape(2, -1)).reshape(weight.shape)
            assert np.abs(change).max() > 0
            np.testing.assert_allclose(np.asarray(merged[name], np.float64), weight + 2.5 * change, rtol=1e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(np.asarray(merged[name]), np.asarray(base[name], np.float32))


def test_no_export_leaves_no_adapter_either(adapter, tmp_path):
    config, work, folder = adapter
    config = config.copy_and_resolve_references()
    shutil.copytree(work, tmp_path / "work")
    config.export = "none"
    shutil.rmtree(tmp_path / "work" / folder.relative_to(work))
    run(config, tmp_path / "work")
    assert not (tmp_path / "work" / folder.relative_to(work)).exists()
