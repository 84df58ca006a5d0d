"""Stable Diffusion XL in one file: read back bit for bit, what its other tensors say, and what is refused.

tests/parity/test_single_file_parity.py compares every name with diffusers.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checkpoints import export_single_file, load_pipeline, read_schedule_config
from retrack_jax.checkpoints.single_file import SingleFile
from retrack_jax.checkpoints.stable_diffusion import pipeline_folder
from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.problem.denoiser import latent_denoiser
from retrack_jax.problem.problem import build_problem
from retrack_jax.weights.folder import open_weights
from retrack_jax.weights.kinds import check_supported, is_xl, takes_prompts
from retrack_jax.weights.safetensors_io import SafetensorsFile
from tests.captioned import captioned_pictures, flags
from tests.checkpoints.test_single_file import same, write
from tests.tiny_sd import PIPELINE, hasty_compiler
from tests.tiny_xl import write_xl
from tests.torch_files import save_state

UNET, OPEN_CLIP = "model.diffusion_model.", "conditioner.embedders.1.model."
CLIP = "conditioner.embedders.0.transformer.text_model."
EMPTY = np.zeros(0, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_xl(tmp_path_factory.mktemp("xl") / "pipeline")


@pytest.fixture(scope="module")
def xl(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def file(xl, tmp_path_factory):
    """The tiny pipeline in one file."""
    path = tmp_path_factory.mktemp("one") / "out"
    export_single_file(path, xl, xl.unet_params, note="Forgot it.")
    return path / "model.safetensors"


@pytest.fixture(scope="module")
def tensors(file):
    return dict(SafetensorsFile(file).items())


def same_pipeline(one, other):
    same(one.unet_params, other.unet_params)
    same(one.vae_params, other.vae_params)
    for ours, theirs in zip(one.text_encoders, other.text_encoders, strict=True):
        same(ours.params, theirs.params)
    assert one.schedule.to_config() == other.schedule.to_config()
    assert one.zeros_for_empty == other.zeros_for_empty and one.vae.scaling_factor == other.vae.scaling_factor == 0.13025


def test_a_projection_as_diffusers_scripts_wrote_it_before_2024(tensors, xl, folder, tmp_path):
    """`text_projection.weight`, a linear layer as it is. The real one is square, so that the name alone tells."""
    early = dict(tensors)
    early[f"{OPEN_CLIP}text_projection.weight"] = early.pop(f"{OPEN_CLIP}text_projection").T
    same_pipeline(load_pipeline(write(tmp_path / "early.safetensors", early), configs=str(folder)), xl)


def test_what_is_written_is_read_back(file, tensors, xl, folder):
    same_pipeline(load_pipeline(file, configs=str(folder)), xl)
    assert load_pipeline(file, configs=str(folder), dtype=jnp.bfloat16).vae.dtype == jnp.float32  # force_upcast
    # Every tensor of the folder is in the file, with its bits and its dtype.
    _, second = open_weights(folder / "text_encoder_2", ("model.fp16.safetensors",))
    _, first = open_weights(folder / "text_encoder", ("model.fp16.safetensors",))
    np.testing.assert_array_equal(tensors[f"{OPEN_CLIP}text_projection"], second["text_projection.weight"].T, strict=True)
    rows = np.concatenate([second[f"encoder.layers.2.self_attn.{part}_proj.weight"] for part in "qkv"])
    np.testing.assert_array_equal(tensors[f"{OPEN_CLIP}transformer.resblocks.2.attn.in_proj_weight"], rows, strict=True)
    name = "encoder.layers.1.mlp.fc1.weight"
    np.testing.assert_array_equal(tensors[CLIP + name], first[f"text_model.{name}"], strict=True)
    thirds = 2 * 2 * 3  # weights and biases of query, key and value, in three layers, are one tensor each
    parts = [open_weights(folder / part)[1] for part in ("unet", "vae")]
    assert len(tensors) == sum(map(len, parts)) + len(first) + len(second) - thirds
    for name in ("label_emb.0.0.weight", "label_emb.0.2.bias", "input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight"):
        assert UNET + name in tensors, name


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_checkpoint_of_a_training_script_with_all_that_others_leave_in_it(dtype, tensors, folder, xl, tmp_path):
    others = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
        "conditioner.embedders.0.transformer.text_projection.weight": np.zeros((16, 16), dtype),
        "conditioner.embedders.1.model.logit_scale": np.ones((), dtype),
        "model_ema.decay": np.ones((), np.float32),
        "model_ema.diffusion_modelout2bias": np.ones(4, np.float32),
        "denoiser.sigmas": np.asarray(np.sqrt(1 / xl.schedule.alpha_bar64 - 1), dtype),
    }
    changed = {name: np.asarray(value, dtype) for name, value in tensors.items()} | others
    save_state(tmp_path / "model.ckpt", {f"state_dict.{name}": value for name, value in changed.items()})
    loaded = load_pipeline(tmp_path / "model.ckpt", configs=str(folder))
    same(loaded.unet_params, jax.tree.map(lambda leaf: np.asarray(np.asarray(leaf, dtype), np.float32), xl.unet_params))
    # All but the UNet and averages of it is written again as it was read.
    export_single_file(tmp_path / "out", loaded, loaded.unet_params)
    again = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert set(again) == {name for name in changed if not name.startswith("model_ema.")}
    for name in again:
        if not name.startswith(UNET):
            np.testing.assert_array_equal(again[name], changed[name], strict=True)


# ---- What tensors say of the noise schedule


def with_tensors(tmp_path, tensors, **more):
    return write(tmp_path / "other.safetensors", tensors | {name.replace("__", "."): value for name, value in more.items()})


def test_markers_of_v_prediction_are_honored_and_written(tensors, folder, tmp_path):
    path = with_tensors(tmp_path, tensors, v_pred=EMPTY, ztsnr=EMPTY)
    loaded = load_pipeline(path, configs=str(folder))
    assert loaded.schedule.prediction_type == "v_prediction" and loaded.schedule.rescale_betas_zero_snr
    latent_denoiser(loaded, (8, 8, 4), "unet").export(tmp_path / "unet", loaded.unet_params, "")
    config = json.loads((tmp_path / "unet" / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"] is True
    # A folder says it in its scheduler_config.json, and a file of it by the markers.
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(tmp_path / "unet" / "scheduler" / "scheduler_config.json", copy / "scheduler" / "scheduler_config.json")
    again = load_pipeline(copy)
    export_single_file(tmp_path / "out", again, again.unet_params)
    held = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert held.shape("v_pred") == held.shape("ztsnr") == (0,) and set(held) == {*tensors, "v_pred", "ztsnr"}
    same_pipeline(load_pipeline(tmp_path / "out" / "model.safetensors", configs=str(folder)), again)


def test_the_mark_of_no_signal_alone_is_refused(tensors, folder, tmp_path):
    with pytest.raises(UserError, match="rescale_betas_zero_snr needs prediction_type v_prediction"):
        load_pipeline(with_tensors(tmp_path, tensors, ztsnr=EMPTY), configs=str(folder))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_tables_of_noise_levels_must_be_those_of_the_schedule(dtype, tensors, folder, xl, tmp_path):
    right = xl.schedule.alpha_bar64
    zero = Schedule.from_config(xl.schedule.to_config() | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    tables = {"alphas_cumprod": lambda table: table, "denoiser__sigmas": lambda table: np.sqrt(1 / table - 1)}
    config = read_schedule_config(folder)
    for name, of in tables.items():
        SingleFile(with_tensors(tmp_path, tensors, **{name: of(right).astype(dtype)})).schedule(config, folder)
        for wrong in (zero.alpha_bar64, right[:-1], np.linspace(0.99, 0.01, 1000), np.full(1000, np.nan)):
            with pytest.raises(UserError, match=f"with another noise schedule, {name.replace('__', '.')}, than .*scheduler has"):
                SingleFile(with_tensors(tmp_path, tensors, **{name: of(wrong).astype(dtype)})).schedule(config, folder)
        for table in (right, zero.alpha_bar64):  # training without signal at the last step leaves the old table in many a file
            path = with_tensors(tmp_path, tensors, v_pred=EMPTY, ztsnr=EMPTY, **{name: of(table).astype(dtype)})
            assert SingleFile(path).schedule(config, folder).rescale_betas_zero_snr


def test_metadata_of_v_prediction_need_configs(tensors, folder, tmp_path):
    """kohya's scripts say it there."""
    path, says = tmp_path / "other.safetensors", {"modelspec.prediction_type": "v"}
    write(path, tensors, says)
    with pytest.raises(UserError, match="says in its metadata that its network predicts v, .*; set config.pipeline"):
        pipeline_folder(path)
    assert pipeline_folder(path, str(folder)) == folder


# ---- What is refused, in one line


def without(prefix):
    return lambda held: {name: value for name, value in held.items() if not name.startswith(prefix)}


def renamed(old, new):
    return lambda held: {name.replace(old, new): value for name, value in held.items()}


def changed(name, change):
    return lambda held: held | {name: np.asarray(change(held[name]), order="C")}


def added(name):
    return lambda held: held | {name: np.zeros(2, np.float32)}


def repeated(count):
    return lambda value: np.repeat(value[:, :1], count, axis=1)


IN = f"{UNET}input_blocks.0.0.weight"
IN_PROJ = f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed("conditioner.embedders.1.model", "conditioner.embedders.0.model"), "holds Stable Diffusion XL's refiner"),
        (renamed(CLIP, "cond_stage_model.transformer.text_model."), "it has no conditioner.embedders.0."),
        (without("conditioner.embedders.1."), "no whole Stable Diffusion XL in one file: it has no conditioner.embedders.1."),
        (without("first_stage_model."), "it has no first_stage_model.*; give one that has all parts"),
        (without(UNET), "it has no model.diffusion_model.*"),
        (added("cond_stage_model.transformer.text_model.final_layer_norm.bias"), "and of another model cond_stage_model.transf"),
        (added("conditioner.embedders.2.model.x"), "and of another model conditioner.embedders.2.model.x"),
        (without(f"{UNET}label_emb."), "those of Stable Diffusion XL, and the UNet has no model.diffusion_model.label_emb."),
        (added("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"), "is an adapter (LoRA)"),
        (added("edm_mean"), "EDM's sigmas (Playground 2.5, CosXL), which is read only as a folder"),
        (added("edm_vpred.sigma_max"), "EDM's sigmas"),
        (added("control_model.time_embed.0.weight"), "holds a ControlNet"),
        (changed(IN, repeated(9)), "holds an inpainting model, whose UNet takes 9 channels and gives 4"),
        (changed(IN, repeated(8)), "holds an InstructPix2Pix model"),
        (changed(IN, repeated(6)), "holds another kind of model, whose UNet takes 6"),
        (changed(IN_PROJ, lambda value: value[:-1]), "3 mis-shaped: encoder.layers.0.self_attn.k_proj.weight [71, 24] instead"),
        (changed(IN_PROJ, lambda value: value[0, 0]), "self_attn.k_proj.weight [] instead of [24, 24]"),
        (changed(f"{OPEN_CLIP}text_projection", lambda value: value.T), "text_projection.weight [24, 12] instead of [12, 24]"),
        (renamed("1.model.text_projection", "1.model.text_projection.weight"), "1 mis-shaped: text_projection.weight [24, 12]"),
        (without(f"{OPEN_CLIP}transformer.resblocks.2."), "16 missing: encoder.layers.2"),
        (added(f"{OPEN_CLIP}transformer.resblocks.23.ln_1.bias"), "1 surplus: conditioner.embedders.1.model.transformer"),
        (changed(f"{UNET}out.2.bias", lambda value: value * np.float32(np.nan)), "holds NaN or infinity: 1 tensors: conv_out"),
    ],
)  # fmt: skip
def test_what_else_a_file_may_hold_is_named(spoil, message, tensors, folder, tmp_path):
    path = write(tmp_path / "other.safetensors", spoil(tensors))
    with pytest.raises(UserError) as error:
        load_pipeline(path, configs=str(folder))
    assert message in str(error.value) and str(path) in str(error.value)


def test_half_a_file_is_refused(file, folder, tmp_path):
    content = file.read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half.safetensors is a damaged safetensors file"):
        load_pipeline(tmp_path / "half.safetensors", configs=str(folder))


def test_configs_of_another_model_are_refused(file, folder, xl, pipeline, tmp_path):
    with pytest.raises(UserError, match="holds Stable Diffusion XL, and the configs in .* are for text_encoder; set"):
        load_pipeline(file, configs=str(PIPELINE))
    export_single_file(tmp_path / "one", pipeline, pipeline.unet_params)
    with pytest.raises(UserError, match="Stable Diffusion 1.x, and the configs in .* are for text_encoder and text_encoder_2"):
        load_pipeline(tmp_path / "one" / "model.safetensors", configs=str(folder))


# ---- A run


def test_a_files_name_says_nothing(tensors, tmp_path):
    """A checkpoint with `lora` in its name, because one was merged into it."""
    path = write(tmp_path / "xl_with_lora_merged.safetensors", tensors)
    check_supported(path)
    assert takes_prompts(path) and is_xl(path)


def test_one_file_to_one_file(file, folder, xl, tmp_path):
    """The command's parts on a file: the rules of XL, and what a run exports."""
    captioned_pictures(tmp_path / "pictures", 6)
    argv = flags(tmp_path, checkpoint=file, pipeline=folder, targets="circle_00.png", export="single_file")
    options = complete(read_config(parse(argv)[0]))
    assert options.recipe("retrack").adapter == "lora" and options.sampling.sampler == "euler" and options.data.resolution == 32
    with hasty_compiler():
        problem = build_problem(options)
    assert problem.denoiser.module.takes_sizes and problem.sampler is not None
    changed = jax.tree.map(lambda leaf: leaf + 1, problem.denoiser.params)
    problem.denoiser.export(tmp_path / "diffusers", changed, "Forgot it.")
    back = load_pipeline(tmp_path / "diffusers" / "model.safetensors", configs=str(folder))
    same(back.unet_params, jax.tree.map(lambda leaf: leaf + 1, xl.unet_params))
    assert (tmp_path / "diffusers" / "LICENSE").is_file()
    assert f"The weights came from {file.name}." in (tmp_path / "diffusers" / "README.md").read_text()


def test_the_sampler_is_that_of_the_configs(file, folder, tmp_path):
    captioned_pictures(tmp_path / "pictures", 6)
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DPMSolverMultistepScheduler"}))
    argv = flags(tmp_path, checkpoint=file, pipeline=copy, targets="circle_00.png")
    assert complete(read_config(parse(argv)[0])).sampling.sampler == "dpm_solver"
