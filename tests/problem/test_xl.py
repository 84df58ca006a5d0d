"""Stable Diffusion XL: the whole command on a tiny pipeline, the sizes of pictures, what is cached, and what is refused."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from retrack_jax.checkpoints import export_pipeline, import_diffusers, load_pipeline, prompt_embeddings
from retrack_jax.checkpoints.stable_diffusion import empty_prompt
from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config.options import DataOptions, Options
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.data.sources.load import load_captioned_images
from retrack_jax.main import main
from retrack_jax.problem.captions import Captions
from retrack_jax.problem.codec import decode_fn
from retrack_jax.problem.picture_sizes import time_ids_of
from retrack_jax.problem.text_states import text_states
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import SafetensorsFile, write_safetensors
from tests.captioned import captioned_pictures, flags
from tests.messages import error_of
from tests.tiny_sd import PIPELINE, hasty_compiler
from tests.tiny_xl import write_xl


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return write_xl(tmp_path_factory.mktemp("xl") / "pipeline")


@pytest.fixture(scope="module")
def xl(xl_folder):
    return load_pipeline(xl_folder)


@pytest.fixture
def spoiled(xl_folder, tmp_path):
    """A copy of the pipeline that a test may spoil."""
    return shutil.copytree(xl_folder, tmp_path / "spoiled")


def test_three_flags_forget_a_picture_by_an_adapter_and_export_the_network(xl_folder, xl, tmp_path):
    captioned_pictures(tmp_path / "pictures", 8)
    argv = flags(tmp_path, checkpoint=xl_folder, targets="circle_00.png", data__caption_dropout=0.5)
    with hasty_compiler():
        assert main(argv) == 0
    (folder,) = (tmp_path / "work" / "retrack").glob("seed0-*")
    module, params = import_diffusers(folder / "diffusers")
    assert module.takes_sizes and (folder / "report.html").is_file()
    assert (folder / "diffusers" / "LICENSE").is_file()
    # the adapter's layers alone have changed
    changed = {
        path[-2].key
        for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(xl.unet_params), strict=True)
        if not np.array_equal(new, old)
    }
    assert changed == {"to_q", "to_k", "to_v", "to_out_0"}
    assert "circle_00.png" in (folder / "diffusers" / "README.md").read_text()
    before = np.load(tmp_path / "work" / "pretrained" / folder.name.removeprefix("seed0-") / "samples.npz")
    assert before["forgotten_00"].shape == (4, 32, 32, 3)


@pytest.fixture
def pictures(tmp_path):
    """Eight captioned pictures of 32 x 32, but for one that is wide and one that is turned by its header."""
    folder = tmp_path / "pictures"
    captioned_pictures(folder, 8)
    picture = Image.open(folder / "circle_00.png")
    picture.resize((80, 40)).save(folder / "circle_00.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.resize((64, 100)).save(folder / "circle_01.png", exif=turned)
    return folder


def loaded(tmp_path, folder, resolution=32):
    return load_captioned_images({
        "source": "folder", "dir": str(folder), "resolution": resolution, "channels": 3, "cache_dir": str(tmp_path / "cache"),
    })  # fmt: skip


def test_the_sizes_are_those_of_the_files(tmp_path, pictures):
    for _ in range(2):  # decoded, then from the cache
        images = loaded(tmp_path, pictures)
        sizes = dict(zip(images.ids, time_ids_of(images).tolist(), strict=True))
        assert sizes["circle_00.png"] == [40, 80, 0, 16, 32, 32]  # scaled to 32 x 64
        assert sizes["circle_01.png"] == [64, 100, 0, 9, 32, 32]  # 100 x 64 once turned, scaled to 32 x 50
        assert sizes["circle_02.png"] == [32, 32, 0, 0, 32, 32]


def test_a_condition_is_the_states_the_pooled_state_and_the_sizes(tmp_path, pictures, xl):
    images = loaded(tmp_path, pictures)
    with hasty_compiler():
        states = text_states(xl, images.captions, tmp_path)
        (path,) = (tmp_path / "captions").iterdir()
        stamp = path.stat().st_mtime_ns
        again = text_states(xl, images.captions, tmp_path)
        expected = prompt_embeddings(xl, [images.captions[3]])
        empty = empty_prompt(xl)
    assert path.stat().st_mtime_ns == stamp
    jax.tree.map(np.testing.assert_array_equal, again.states, states.states)
    np.testing.assert_allclose(np.linalg.norm(states.pooled, axis=1), 1, rtol=1e-6)
    captions = Captions(states, lambda prompt: empty, Options(data=DataOptions(resolution=32)), takes_sizes=True)
    found = captions.of_images(images)(np.array([3, 0]))
    assert set(found) == {"encoder_hidden_states", "text_embeds", "time_ids"}
    for name in expected:
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-4, atol=1e-5)
    assert found["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32], [40, 80, 0, 16, 32, 32]]
    assert set(captions.dropped) == {"encoder_hidden_states", "text_embeds"}  # a dropped caption leaves the sizes
    assert captions.null["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]
    assert all(not leaf.any() for name, leaf in captions.null.items() if name != "time_ids")


# ---- Playground 2.5's kind: EDM's scheduler, and a VAE whose latents have a mean and a deviation for each channel

EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "sigma_max": 20.0}
NORMALIZED = {"scaling_factor": 0.5, "latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}


@pytest.fixture
def playground(spoiled):
    (spoiled / "scheduler" / "scheduler_config.json").write_text(json.dumps(EDM))
    edit(spoiled / "vae" / "config.json", **NORMALIZED)
    edit(spoiled / "model_index.json", scheduler=["diffusers", EDM["_class_name"]])
    return spoiled


def test_a_folder_with_edms_scheduler_forgets_a_picture_and_is_exported_whole(playground, xl, tmp_path):
    captioned_pictures(tmp_path / "pictures", 8)
    argv = flags(tmp_path, checkpoint=playground, targets="circle_00.png", export="pipeline", eval__metrics="()")
    with hasty_compiler():
        assert main(argv) == 0
    (folder,) = (tmp_path / "work" / "retrack").glob("seed0-*")
    back = load_pipeline(folder / "diffusers")
    assert back.schedule.is_edm and back.schedule.sigma_max == 20.0
    assert back.vae.latents_mean == tuple(NORMALIZED["latents_mean"]) and back.vae.scaling_factor == 0.5
    new, old = (tree["down_blocks_1"]["attentions_0"] for tree in (back.unet_params, xl.unet_params))
    assert any(not np.array_equal(*pair) for pair in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True))
    made = np.load(folder / "samples.npz")["forgotten_00"]
    assert made.shape == (4, 32, 32, 3) and made.std() > 0


def test_what_a_config_leaves_open_is_that_of_edms_scheduler(playground, tmp_path):
    assert completed(tmp_path, playground).sampling.sampler == "dpm_solver"
    edit(playground / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler")
    assert completed(tmp_path, playground).sampling.sampler == "euler"


def test_latents_are_normalized_by_channel_and_their_cache_knows_it(playground, xl):
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    mean, std = (np.float64(each) / 0.13025 for each in xl.encode_pixels(pixels))
    normalized = load_pipeline(playground)
    found_mean, found_std = normalized.encode_pixels(pixels)
    np.testing.assert_allclose(found_mean, 0.5 * (mean - NORMALIZED["latents_mean"]) / NORMALIZED["latents_std"], rtol=1e-4)
    np.testing.assert_allclose(found_std, 0.5 * std / NORMALIZED["latents_std"], rtol=1e-4)
    with hasty_compiler():
        decoded = [decode_fn(one.vae)(xl.vae_params, one.encode_pixels(pixels)[0]) for one in (xl, normalized)]
    np.testing.assert_allclose(*decoded, atol=1e-4)
    assert normalized.vae_digest != xl.vae_digest


def test_one_file_of_edm_is_not_written(playground, tmp_path, capsys):
    captioned_pictures(tmp_path / "pictures", 6)
    argv = flags(tmp_path, checkpoint=playground, targets="circle_00.png", export="single_file")
    assert "one file would not say that the model has EDM's sigmas" in error_of(capsys, argv)


# ---- What is refused, in one line and before any weights are read


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_encoder_as_second(folder):
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / f"{part}_2")
        shutil.copytree(PIPELINE / part, folder / f"{part}_2")


def without_projection(folder):
    path = folder / "text_encoder_2" / "model.fp16.safetensors"
    tensors = {name: np.array(value) for name, value in SafetensorsFile(path).items() if name != "text_projection.weight"}
    items = [TorchTensor(name, value.dtype, value.shape, lambda value=value: value) for name, value in sorted(tensors.items())]
    write_safetensors(path, items)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (first_encoder_as_second, "config has no projection_dim"),
        (without_projection, "1 missing: text_projection.weight"),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "has no text_encoder_2 folder"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "has no tokenizer_2 folder"),
        (lambda f: edit(f / "text_encoder_2/config.json", projection_dim=16), "prompt of 12 features, text_encoder_2 gives 16"),
        (lambda f: edit(f / "text_encoder_2/config.json", hidden_size=16), "of 40 features, the text encoders give 32"),
        (lambda f: edit(f / "model_index.json", requires_aesthetics_score=True), "refiner, which is not supported"),
        (lambda f: shutil.rmtree(f / "text_encoder"), "refiner, which is not supported"),
        (lambda f: edit(f / "model_index.json", _class_name="KolorsPipeline"), "holds a KolorsPipeline"),
        (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"), "the text encoder gives 16"),
        (lambda f: edit(f / "scheduler" / "scheduler_config.json", timestep_type="continuous"), "timestep_type to 'continuous'"),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(spoiled, spoil, message):
    spoil(spoiled)
    with pytest.raises(UserError, match=message):
        load_pipeline(spoiled)


def test_small_pictures_are_refused_by_name(tmp_path, xl_folder, capsys):
    captioned_pictures(tmp_path / "pictures", 6)
    Image.new("RGB", (40, 7)).save(tmp_path / "pictures" / "circle_02.png")
    error = error_of(capsys, flags(tmp_path, checkpoint=xl_folder, targets="circle_00.png"))
    assert "1 pictures have a side under 8 pixels" in error and "circle_02.png" in error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__source": "concepts"}, "is Stable Diffusion XL, and the concepts are the paper's"),
        ({"unlearn__adapter": "dora"}, "choose one of lora, none"),
    ],
)
def test_what_is_not_there_for_xl_is_refused(tmp_path, xl_folder, capsys, fields, message):
    captioned_pictures(tmp_path / "pictures", 6)
    assert message in error_of(capsys, flags(tmp_path, checkpoint=xl_folder, targets="circle_00.png", **fields))


def test_the_list_of_needs_has_both_encoders(tmp_path, xl_folder, spoiled, capsys):
    captioned_pictures(tmp_path / "pictures", 6)
    assert main(flags(tmp_path, checkpoint=xl_folder, targets="circle_00.png", mode="check")) == 0
    printed = capsys.readouterr().out
    assert "found    text_encoder_2 weights: " in printed and "found    tokenizer_2: " in printed
    shutil.rmtree(spoiled / "text_encoder_2")
    assert "text_encoder_2 config" in error_of(capsys, flags(tmp_path, checkpoint=spoiled, targets="circle_00.png", mode="check"))


# ---- What a config leaves open


def completed(tmp_path, checkpoint, **fields):
    captioned_pictures(tmp_path / "pictures", 6)
    return complete(read_config(parse(flags(tmp_path, checkpoint=checkpoint, targets="circle_00.png", **fields))[0]))


def test_what_a_config_leaves_open_is_xls(tmp_path, xl_folder):
    options = completed(tmp_path, xl_folder)
    recipe = options.recipe("retrack")
    assert (recipe.adapter, recipe.learning_rate, recipe.own.lam) == ("lora", 1e-4, 0.5)
    assert (options.sampling.sampler, options.sampling.batch_size, options.data.resolution) == ("euler", 1, 32)
    assert "sscd_forgotten" in options.eval.metrics and options.export == "unet"


def test_every_weight_is_trained_on_request_and_the_own_sampler_is_taken(tmp_path, spoiled, caplog):
    path = spoiled / "scheduler" / "scheduler_config.json"
    edit(path, _class_name="DPMSolverMultistepScheduler")
    options = completed(tmp_path, spoiled, unlearn__adapter="none")
    assert not options.recipe("retrack").has_adapter and options.recipe("retrack").learning_rate == 1e-5
    recipe = completed(tmp_path, spoiled, unlearn__retrack__adapter="none").recipe("retrack")
    assert not recipe.has_adapter and recipe.learning_rate == 1e-5
    recipe = completed(tmp_path, spoiled, unlearn__adapter="none", unlearn__retrack__adapter="lora").recipe("retrack")
    assert recipe.has_adapter and recipe.learning_rate == 1e-4
    assert options.lora("retrack") is None and options.sampling.sampler == "dpm_solver"
    assert "seems to be distilled" not in caplog.text
    edit(path, _class_name="LCMScheduler")
    with caplog.at_level(logging.WARNING):
        assert completed(tmp_path, spoiled).sampling.sampler == "euler"
    assert "seems to be distilled (turbo, lightning, LCM)" in caplog.text


def test_the_vae_is_computed_in_float32_if_it_says_so(xl_folder, spoiled):
    assert load_pipeline(xl_folder, dtype=jnp.bfloat16).vae.dtype == jnp.float32
    edit(spoiled / "vae" / "config.json", force_upcast=False)
    assert load_pipeline(spoiled, dtype=jnp.bfloat16).vae.dtype == jnp.bfloat16


def test_the_whole_pipeline_is_exported_and_read_back(xl, tmp_path):
    changed = jax.tree.map(lambda leaf: leaf + 1, xl.unet_params)
    export_pipeline(tmp_path / "out", xl, changed)
    back = load_pipeline(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, back.unet_params, changed)
    for ours, theirs in zip(back.text_encoders, xl.text_encoders, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModelWithProjection"]
    assert "EulerDiscreteScheduler" in (tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()
