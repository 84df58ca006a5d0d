"""Pipeline folders: what is refused, and the export of an unlearned UNet back into one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from retrack_jax.api import unlearn
from retrack_jax.checkpoints import export_diffusers, export_pipeline, import_diffusers, load_pipeline, prompt_embeddings
from retrack_jax.checkpoints.diffusers_import import FAMILIES
from retrack_jax.checks import UserError
from retrack_jax.weights.safetensors_io import SafetensorsFile
from tests.tiny_sd import PIPELINE, hasty_compiler


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_half_precision_files_become_float32(pipeline):
    for params in (pipeline.unet_params, pipeline.vae_params, pipeline.text_encoders[0].params):
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert pipeline.schedule.beta_schedule == "scaled_linear" and not pipeline.schedule.clip_sample
    # 50 leading steps with an offset of 1: the official trajectory
    assert list(pipeline.schedule.timesteps(50)[[0, 1, -1]]) == [981, 961, 1]


@pytest.mark.parametrize("old", [{}, {"clip_sample": True, "steps_offset": 0}])
def test_an_early_schedule_is_mended_as_diffusers_pipeline_does(pipeline_folder, old):
    """Latents are not clipped to [-1, 1], and the leading steps have an offset of 1, whatever the config leaves out or says."""
    path = pipeline_folder / "scheduler" / "scheduler_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("clip_sample", "steps_offset")}
    path.write_text(json.dumps(config | {"_class_name": "DDIMScheduler"} | old))
    schedule = load_pipeline(pipeline_folder).schedule
    assert not schedule.clip_sample and list(schedule.timesteps(50)[[0, -1]]) == [981, 1]
    assert schedule.to_config()["clip_sample"] is False  # in an export, too


def test_an_early_unets_size_is_mended_in_an_export_too(pipeline_folder, tmp_path):
    edit(
        pipeline_folder / "unet" / "config.json", _diffusers_version="0.2.4"
    )  # diffusers looks for the version, which is new there
    pipeline = load_pipeline(pipeline_folder)
    export_pipeline(tmp_path / "out", pipeline, pipeline.unet_params)
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["sample_size"] == 64


def test_an_export_keeps_attention_in_float32(pipeline_folder, tmp_path):
    """Stable Diffusion 2.1's UNet overflows in float16 without it."""
    edit(pipeline_folder / "unet" / "config.json", upcast_attention=True)
    pipeline = load_pipeline(pipeline_folder)
    export_pipeline(tmp_path / "out", pipeline, pipeline.unet_params)
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["upcast_attention"] is True


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "has no text_encoder_2, tokenizer_2 folder",
        ),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json holds no JSON object"),
        (lambda f: edit(f / "model_index.json", _class_name=["Flux"]), "Flux.*, which is not supported"),
        (lambda f: edit(f / "unet" / "config.json", addition_embed_type="text_time"), "addition_time_embed_dim"),
        (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline, which is not supported"),
        (lambda f: shutil.rmtree(f / "vae"), "has no vae folder"),
        (lambda f: (f / "unet" / "config.json").unlink(), "no config.json in .*unet"),
        (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights in"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "noise schedule"),
        (lambda f: edit(f / "unet" / "config.json", in_channels=9), "inpainting, depth and upscaling"),
        (lambda f: edit(f / "unet" / "config.json", cross_attention_dim=24), "24 features, the text encoder gives 16"),
        (lambda f: edit(f / "text_encoder" / "config.json", vocab_size=100), "the tokenizer has .* tokens, the text encoder 100"),
        (lambda f: edit(f / "unet" / "config.json", layers_per_block=2), "missing"),
        (lambda f: edit(f / "vae" / "config.json", latent_channels=8), "latents have 8"),
        (lambda f: edit(f / "vae" / "config.json", latents_mean=[0.0] * 4, latents_std=[2.0] * 4), "heeds with .* XL alone"),
        (lambda f: edit(f / "tokenizer" / "special_tokens_map.json", pad_token={"lstrip": True}), "pad_token is .*its content"),
        (lambda f: edit(f / "tokenizer" / "special_tokens_map.json", bos_token=7), "bos_token is 7, neither a text"),
        (lambda f: (f / "tokenizer" / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json holds no JSON object"),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(pipeline_folder, spoil, message):
    spoil(pipeline_folder)
    with pytest.raises(UserError, match=message):
        load_pipeline(pipeline_folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder .*nothing"):
        load_pipeline(tmp_path / "nothing")


def test_names_without_the_old_prefix_and_position_numbers(pipeline_folder, pipeline):
    """transformers 5 writes no `text_model.`; old versions wrote a buffer of positions besides."""
    from retrack_jax.weights.names import TorchTensor
    from retrack_jax.weights.safetensors_io import write_safetensors

    path = pipeline_folder / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): np.array(value) for name, value in SafetensorsFile(path).items()}
    tensors["embeddings.position_ids"] = np.arange(77)[None]
    items = [TorchTensor(name, value.dtype, value.shape, lambda value=value: value) for name, value in sorted(tensors.items())]
    write_safetensors(path, items)
    found, expected = (one.text_encoders[0].params for one in (load_pipeline(pipeline_folder), pipeline))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


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


def test_what_lies_beside_the_parts_of_a_pipeline_is_not_exported(tmp_path, pipeline_folder, pipeline):
    """Scripts that train keep checkpoints there, with the weights that are unlearned."""
    checkpoint = pipeline_folder / "checkpoint-500"
    shutil.copytree(pipeline_folder / "unet", checkpoint / "unet")
    (checkpoint / "optimizer.bin").write_bytes(b"moments")
    (pipeline_folder / "logs").mkdir()
    for index in ("there", "absent"):
        if index == "absent":
            (pipeline_folder / "model_index.json").unlink()
        out = tmp_path / index
        export_pipeline(out, load_pipeline(pipeline_folder), pipeline.unet_params)
        assert sorted(entry.name for entry in out.iterdir() if entry.is_dir()) == [
            "scheduler", "text_encoder", "tokenizer", "unet", "vae",
        ]  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, load_pipeline(out).unet_params, pipeline.unet_params)


def test_a_pipeline_from_one_file_is_not_exported_with_another_models_parts(tmp_path, pipeline):
    of_file = dataclasses.replace(pipeline, file=object())
    with pytest.raises(UserError, match="this model is one file; choose single_file or unet"):
        export_pipeline(tmp_path / "out", of_file, pipeline.unet_params)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionPAGPipeline"])
def test_pipelines_of_the_same_parts_for_other_uses_are_read(pipeline_folder, pipeline, name):
    edit(pipeline_folder / "model_index.json", _class_name=name)
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(pipeline_folder).unet_params, pipeline.unet_params)


def as_variants(folder, *endings):
    """Names the weights of VAE and text encoder as a download of the half-precision variant alone does."""
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole = folder / part / f"{stem}.safetensors"
        for ending in endings:
            shutil.copy(whole, folder / part / f"{stem}{ending}")
        whole.unlink()


def test_export_names_variants_plainly(tmp_path, pipeline_folder, pipeline):
    """The UNet is written as no variant, and diffusers reads all parts of one pipeline under one."""
    as_variants(pipeline_folder, ".fp16.safetensors")
    out = tmp_path / "unlearned"
    export_pipeline(out, load_pipeline(pipeline_folder), pipeline.unet_params)
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        assert [file.name for file in (out / part).glob("*.safetensors")] == [f"{name}.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(out).vae_params, pipeline.vae_params)
    assert (pipeline_folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()  # the source stays as it is


def test_of_variants_safetensors_are_read_and_a_choice_is_refused(pipeline_folder, pipeline):
    as_variants(pipeline_folder, ".fp16.safetensors", ".fp16.bin")
    jax.tree.map(np.testing.assert_array_equal, load_pipeline(pipeline_folder).vae_params, pipeline.vae_params)
    vae = pipeline_folder / "vae"
    shutil.copy(vae / "diffusion_pytorch_model.fp16.safetensors", vae / "diffusion_pytorch_model.ema.safetensors")
    with pytest.raises(UserError, match="only variants.*model.ema.safetensors, diffusion_pytorch_model.fp16.safetensors; copy"):
        load_pipeline(pipeline_folder)


def test_the_unet_alone_takes_licence_and_card_from_a_pipeline_without_an_index(tmp_path, pipeline_folder, pipeline):
    (pipeline_folder / "model_index.json").unlink()
    for name in ("LICENSE", "README.md"):
        (pipeline_folder / "unet" / name).unlink(missing_ok=True)
    out = tmp_path / "unet"
    export_diffusers(out, pipeline.unet, pipeline.unet_params, source=pipeline_folder / "unet")
    assert (out / "LICENSE").read_text() == (PIPELINE / "LICENSE").read_text()
    assert "Tiny pipeline" in (out / "README.md").read_text()
    # A folder that only lies beside others is no part of a pipeline.
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "LICENSE").write_text("of something else")
    shutil.copytree(pipeline_folder / "unet", tmp_path / "models" / "unet")
    export_diffusers(out, pipeline.unet, pipeline.unet_params, source=tmp_path / "models" / "unet")
    assert not (out / "LICENSE").exists()


def test_import_diffusers_reads_a_text_conditioned_unet(tmp_path, pipeline):
    export_diffusers(tmp_path / "unet", pipeline.unet, pipeline.unet_params)
    for path in (tmp_path / "unet", PIPELINE):
        module, params = import_diffusers(path, remat=True)
        assert module == pipeline.unet.clone(remat=True)
        jax.tree.map(np.testing.assert_array_equal, params, pipeline.unet_params)
    edit(tmp_path / "unet" / "config.json", _class_name="UNet3DConditionModel")
    with pytest.raises(UserError, match="UNet3DConditionModel; only UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel"):
        import_diffusers(tmp_path / "unet")


def test_the_digest_of_a_sharded_vae_covers_its_shards(pipeline_folder, pipeline):
    vae = pipeline_folder / "vae"
    whole, shard = vae / "diffusion_pytorch_model.safetensors", vae / "diffusion_pytorch_model-00001-of-00001.safetensors"
    names = list(SafetensorsFile(whole))
    (vae / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard.name)})
    )
    whole.rename(shard)
    before = load_pipeline(pipeline_folder).vae_digest
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # the last bit that matters least of one weight
    shard.write_bytes(data)
    assert load_pipeline(pipeline_folder).vae_digest != before != pipeline.vae_digest


def test_arrays_in_parameters_out_with_a_prompt(pipeline):
    """As docs/guide/text-to-image.md shows, with a UNet of a single block: it compiles in a third of the time."""
    small = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "mid_block_type": None}
    unet = pipeline.unet.clone(block_out_channels=(16,), **small)
    first = jax.jit(unet.init)(jax.random.key(0), *FAMILIES["UNet2DConditionModel"].inputs(unet))["params"]
    prompt = prompt_embeddings(pipeline, ["a picture of something"])

    def apply_fn(variables, x_t, t):
        return unet.apply(variables, x_t, t, prompt)

    latents = np.random.default_rng(0).normal(size=(6, 4, 4, 4)).astype(np.float32)
    how = {"method": "vanilla", "num_steps": 1, "batch_size": 4, "rng": jax.random.key(0)}
    with hasty_compiler():
        params = unlearn(apply_fn, first, pipeline.schedule, latents[:4], latents[4:], **how)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, first)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3


def test_export_leaves_other_folders_alone(tmp_path, pipeline, pipeline_folder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("keep")
    with pytest.raises(UserError, match="no export of retrack_jax"):
        export_pipeline(tmp_path / "mine", pipeline, pipeline.unet_params)
    with pytest.raises(UserError, match="no local folder"):
        export_pipeline("gs://bucket/mine", pipeline, pipeline.unet_params)
    with pytest.raises(UserError, match="came from"):
        export_pipeline(pipeline_folder, load_pipeline(pipeline_folder), pipeline.unet_params)
    assert (tmp_path / "mine" / "work.txt").read_text() == "keep"


def test_long_prompts_are_cut_with_a_warning(pipeline, caplog):
    with caplog.at_level("WARNING"):
        assert prompt_embeddings(pipeline, ["word " * 200]).shape == (1, 77, 16)
    assert "CLIP reads the first 77 tokens of 1 longer prompts" in caplog.text
