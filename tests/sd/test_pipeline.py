"""Pipeline folders: what is refused, and the export of an unlearned UNet back into one."""

import json
import shutil

import jax
import numpy as np
import pytest

from retrack_jax.checkpoints.pipeline import export_pipeline, load_pipeline, prompt_embeddings
from retrack_jax.checks import UserError
from tests.sd.tiny import PIPELINE


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_half_precision_files_become_float32(pipeline):
    for params in (pipeline.unet_params, pipeline.vae_params, pipeline.text_params):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert pipeline.schedule.beta_schedule == "scaled_linear" and not pipeline.schedule.clip_sample
    # 50 leading steps with an offset of 1: the official trajectory
    assert list(pipeline.schedule.timesteps(50)[[0, 1, -1]]) == [981, 961, 1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "Stable Diffusion XL, which is not supported",
        ),
        (lambda f: (f / "text_encoder_2").mkdir(), "Stable Diffusion XL, which is not supported"),
        (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline, which is not supported"),
        (lambda f: shutil.rmtree(f / "vae"), "has no vae folder"),
        (lambda f: (f / "unet" / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights in"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "noise schedule"),
        (lambda f: edit(f / "unet" / "config.json", in_channels=9), "inpainting, depth and upscaling"),
        (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=24), "24 features, the text encoder gives 16"),
        (lambda f: edit(f / "text_encoder" / "config.json", vocab_size=100), "do not fit the text encoder's 100 tokens"),
        (lambda f: edit(f / "unet" / "config.json", layers_per_block=2), "missing"),
        (lambda f: edit(f / "vae" / "config.json", latent_channels=8), "latents have 8"),
    ],
)
def test_folders_that_do_not_fit(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load_pipeline(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no folder .*nothing"):
        load_pipeline(tmp_path / "nothing")


def test_names_without_the_old_prefix_and_position_numbers(folder, pipeline):
    """transformers 5 writes no `text_model.`; old versions wrote a buffer of positions besides."""
    from retrack_jax.checkpoints.names import TorchTensor
    from retrack_jax.checkpoints.safetensors_io import SafetensorsFile, write_safetensors

    path = folder / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): np.array(value) for name, value in SafetensorsFile(path).items()}
    tensors["embeddings.position_ids"] = np.arange(77)[None]
    items = [
        TorchTensor(name, value.dtype, value.shape, lambda value=value: value) for name, value in sorted(tensors.items())
    ]
    write_safetensors(path, items)
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(folder).text_params, pipeline.text_params)


def test_export_carries_everything_and_is_read_back(tmp_path, pipeline):
    changed = jax.tree.map(lambda leaf: leaf + 1, pipeline.unet_params)
    out = tmp_path / "unlearned"
    export_pipeline(out, pipeline, changed, note="Unlearned by retrack; forgotten: red_circle.")
    back = load_pipeline(out)
    jax.tree.map(np.testing.assert_array_equal, back.unet_params, changed)
    jax.tree.map(np.testing.assert_array_equal, back.vae_params, pipeline.vae_params)
    assert (out / "LICENSE").read_text() == (PIPELINE / "LICENSE").read_text() == (out / "unet" / "LICENSE").read_text()
    card = (out / "README.md").read_text()
    assert "Tiny pipeline" in card and "forgotten: red_circle" in card
    # The source lacks these two, so diffusers must not look for them.
    index = json.loads((out / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    export_pipeline(out, pipeline, pipeline.unet_params)  # an earlier export is replaced
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(out).unet_params, pipeline.unet_params)


def test_export_leaves_other_folders_alone(tmp_path, pipeline, folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("keep")
    with pytest.raises(UserError, match="no export of retrack_jax"):
        export_pipeline(tmp_path / "mine", pipeline, pipeline.unet_params)
    with pytest.raises(UserError, match="no local folder"):
        export_pipeline("gs://bucket/mine", pipeline, pipeline.unet_params)
    with pytest.raises(UserError, match="came from"):
        export_pipeline(folder, load_pipeline(folder), pipeline.unet_params)
    assert (tmp_path / "mine" / "work.txt").read_text() == "keep"


def test_long_prompts_are_cut_with_a_warning(pipeline, caplog):
    with caplog.at_level("WARNING"):
        assert prompt_embeddings(pipeline, ["word " * 200]).shape == (1, 77, 16)
    assert "is cut to 77" in caplog.text
