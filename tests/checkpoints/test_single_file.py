"""Stable Diffusion in one file: what is written is read back bit for bit; other kinds of files are named as what they are.

tests/parity/test_sd_parity.py has diffusers read what is written here.
"""

import json
import shutil

import jax
import numpy as np
import pytest

from retrack_jax.checkpoints import export_pipeline, export_single_file, import_diffusers, load_pipeline
from retrack_jax.checks import UserError
from retrack_jax.config.options import DataOptions, Options
from retrack_jax.diffusion import Schedule
from retrack_jax.problem.denoiser import latent_denoiser
from retrack_jax.problem.problem import check_problem
from retrack_jax.weights.ldm_names import SD2, PartOfFile, in_file
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import SafetensorsFile, write_safetensors
from tests.tiny_sd import PIPELINE
from tests.torch_files import save_state


def write(path, tensors, metadata=None):
    items = [TorchTensor(name, value.dtype, value.shape, lambda value=value: value) for name, value in tensors.items()]
    write_safetensors(path, items, metadata)
    return path


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def file(tmp_path, pipeline):
    """The tiny pipeline in one file."""
    export_single_file(tmp_path / "one", pipeline, pipeline.unet_params, note="Forgot it.")
    return tmp_path / "one" / "model.safetensors"


def test_what_is_written_is_read_back(file, pipeline, tmp_path):
    back = load_pipeline(file, configs=str(PIPELINE))
    same(back.unet_params, pipeline.unet_params)
    same(back.vae_params, pipeline.vae_params)
    same(back.text_encoders[0].params, pipeline.text_encoders[0].params)
    assert (file.parent / "LICENSE").is_file() and "Forgot it." in (file.parent / "README.md").read_text()
    names = set(SafetensorsFile(file))
    for name in (
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.up.2.block.0.norm1.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
    ):
        assert name in names, name


def test_the_mark_of_no_signal_changes_the_class_of_a_schedule_without_it(file, tmp_path):
    """Stable Diffusion 1.5's scheduler is PNDM's, which diffusers has no such option of. Whoever reads ours back has the same."""
    empty = np.zeros(0, np.float32)
    marked = write(tmp_path / "marked.safetensors", dict(SafetensorsFile(file).items()) | {"v_pred": empty, "ztsnr": empty})
    configs = shutil.copytree(PIPELINE, tmp_path / "configs")
    path = configs / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    schedule = load_pipeline(marked, configs=str(configs)).schedule
    again = Schedule.from_config(schedule.to_config())
    assert schedule.rescale_betas_zero_snr and again.alpha_bar64[-1] == 0
    np.testing.assert_array_equal(again.alpha_bar64, schedule.alpha_bar64)
    with pytest.raises(
        UserError, match="PNDMScheduler does not have, so that diffusers ignores it; if the network was trained so"
    ):
        Schedule.from_config({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})


def test_a_file_keeps_all_but_the_unet_and_averages_of_it(file, pipeline, tmp_path):
    tensors = dict(SafetensorsFile(file).items())
    more = {"betas": np.ones(3, np.float32), "model_ema.decay": np.ones((), np.float32)}
    half = {name: value.astype(np.float16) for name, value in tensors.items()}
    source = write(tmp_path / "source.safetensors", half | more)
    loaded = load_pipeline(source, configs=str(PIPELINE))
    changed = jax.tree.map(lambda leaf: leaf + 1, loaded.unet_params)
    export_single_file(tmp_path / "two", loaded, changed)
    out = SafetensorsFile(tmp_path / "two" / "model.safetensors")
    assert set(out) == {*half, "betas"}
    for name in out:
        if not name.startswith("model.diffusion_model."):
            np.testing.assert_array_equal(out[name], (half | more)[name], strict=True)
    same(load_pipeline(tmp_path / "two" / "model.safetensors", configs=str(PIPELINE)).unet_params, changed)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_checkpoint_of_a_training_script(dtype, file, pipeline, tmp_path):
    """`.ckpt`: a pickle with the level `state_dict`."""
    path = tmp_path / "model.ckpt"
    tensors = {f"state_dict.{name}": np.asarray(value, dtype) for name, value in SafetensorsFile(file).items()}
    save_state(path, tensors | {"optimizer.step": np.zeros(2, np.float32)})
    back = load_pipeline(path, configs=str(PIPELINE))
    same(back.unet_params, jax.tree.map(lambda leaf: np.asarray(np.asarray(leaf, dtype), np.float32), pipeline.unet_params))


def test_the_text_encoder_of_stable_diffusion_2(pipeline):
    """OpenCLIP keeps query, key and value as one tensor."""
    width, layers = 6, 2
    rng = np.random.default_rng(0)
    names = {"embeddings.token_embedding.weight": (9, width), "embeddings.position_embedding.weight": (7, width)}
    for layer in range(layers):
        at = f"encoder.layers.{layer}"
        for part in ("q", "k", "v", "out"):
            names |= {f"{at}.self_attn.{part}_proj.weight": (width, width), f"{at}.self_attn.{part}_proj.bias": (width,)}
        names |= {f"{at}.mlp.fc1.weight": (8, width), f"{at}.layer_norm2.bias": (width,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    part = SD2.parts["text_encoder"]
    stored = in_file(part, tensors)
    block = "cond_stage_model.model.transformer.resblocks.1"
    parts = [tensors[f"encoder.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(stored[f"{block}.attn.in_proj_weight"], np.concatenate(parts))
    assert {f"{block}.ln_2.bias", f"{block}.mlp.c_fc.weight", "cond_stage_model.model.positional_embedding"} <= set(stored)
    last = {"cond_stage_model.model.transformer.resblocks.23.ln_1.bias": parts[0], "cond_stage_model.model.logit_scale": parts[0]}
    back = PartOfFile(_Held(stored | last), part, tensors)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back.shape(name) == tensor.shape
        np.testing.assert_array_equal(back[name], tensor, strict=True)


class _Held(dict):
    def shape(self, name):
        return self[name].shape


@pytest.mark.parametrize(
    "names, words",
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "is an adapter (LoRA), which changes a model and is none"),
        (["unet.down_blocks.0.attn1.to_q.lora.up.weight"], "is an adapter (LoRA)"),
        (["model.diffusion_model.x", "first_stage_model.x"], "it has no cond_stage_model.*; give one that has all parts"),
        (["conv_in.weight"], "no whole Stable Diffusion in one file: it has no model.diffusion_model.* and first_stage"),
    ],
)
def test_files_of_something_else(names, words, tmp_path):
    path = write(tmp_path / "other.safetensors", {name: np.zeros(2, np.float32) for name in names})
    with pytest.raises(UserError) as error:
        load_pipeline(path, configs=str(PIPELINE))
    assert words in str(error.value)


def test_what_does_not_fit_is_listed(file, tmp_path):
    tensors = dict(SafetensorsFile(file).items())
    tensors["model.diffusion_model.out.9.weight"] = tensors.pop("model.diffusion_model.out.2.weight")
    path = write(tmp_path / "other.safetensors", tensors)
    with pytest.raises(UserError, match="1 missing: conv_out.weight; 1 surplus: model.diffusion_model.out.9.weight"):
        load_pipeline(path, configs=str(PIPELINE))


def test_stable_diffusion_2_needs_its_configs(file, tmp_path):
    clip, open_clip = "cond_stage_model.transformer.", "cond_stage_model.model."
    tensors = {name.replace(clip, open_clip): value for name, value in SafetensorsFile(file).items()}
    path = write(tmp_path / "two.safetensors", tensors)
    with pytest.raises(UserError, match="does not say what its network predicts; set config.pipeline to the folder"):
        load_pipeline(path)


def test_an_export_is_replaced_and_only_an_export(file, pipeline, tmp_path):
    export_single_file(file.parent, pipeline, pipeline.unet_params)
    export_pipeline(file.parent, pipeline, pipeline.unet_params)
    shutil.rmtree(file.parent)
    file.parent.mkdir()
    (file.parent / "mine").write_text("x")
    with pytest.raises(UserError, match="holds something that is no export"):
        export_single_file(file.parent, pipeline, pipeline.unet_params)


def test_a_runs_export_of_a_model_that_was_one_file(file, pipeline, tmp_path):
    loaded = load_pipeline(file, configs=str(PIPELINE))
    latent_denoiser(loaded, (8, 8, 4), "single_file").export(tmp_path / "out", loaded.unet_params, "Forgot it.")
    same(load_pipeline(tmp_path / "out" / "model.safetensors", configs=str(PIPELINE)).unet_params, pipeline.unet_params)
    latent_denoiser(loaded, (8, 8, 4), "unet").export(tmp_path / "unet", loaded.unet_params, "Forgot it.")
    same(import_diffusers(tmp_path / "unet")[1], pipeline.unet_params)
    with pytest.raises(
        UserError, match="with the other parts of its folder, and this model is one file; choose single_file or unet"
    ):
        latent_denoiser(loaded, (8, 8, 4), "pipeline")


def test_only_stable_diffusion_is_exported_to_one_file():
    check_problem(Options(data=DataOptions(source="folder"), export="single_file", checkpoint=str(PIPELINE)))
    with pytest.raises(UserError, match="config.export is single_file, which only Stable Diffusion has"):
        check_problem(Options(data=DataOptions(source="digits_tshirt"), export="single_file"))
