"""Stable Diffusion 3: the whole command on a tiny pipeline, what is cached, what is exported, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from retrack_jax.checkpoints import export_pipeline, export_single_file, import_diffusers, load_pipeline, prompt_embeddings
from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.main import main
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.problem.codec import decode_fn
from retrack_jax.problem.denoiser import latent_denoiser
from retrack_jax.problem.text_states import text_states
from retrack_jax.train.lora import LoraOptions, init
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import SafetensorsFile, write_safetensors
from tests.captioned import captioned_pictures, flags
from tests.messages import error_of
from tests.tiny_sd import PIPELINE, hasty_compiler
from tests.tiny_sd3 import add_t5, write_sd3


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def sd3(sd3_folder):
    return load_pipeline(sd3_folder)


@pytest.fixture(scope="module")
def with_t5(sd3_folder, tmp_path_factory):
    return add_t5(shutil.copytree(sd3_folder, tmp_path_factory.mktemp("t5") / "pipeline"))


@pytest.fixture
def spoiled(sd3_folder, tmp_path):
    """A copy of the pipeline that a test may spoil."""
    return shutil.copytree(sd3_folder, tmp_path / "spoiled")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_three_flags_forget_a_picture_by_an_adapter_and_export_the_pipeline(with_t5, sd3, tmp_path):
    captioned_pictures(tmp_path / "pictures", 8)
    argv = flags(tmp_path, checkpoint=with_t5, targets="circle_00.png", export="pipeline", data__caption_dropout=0.5)
    with hasty_compiler():
        assert main(argv) == 0
    (folder,) = (tmp_path / "work" / "retrack").glob("seed0-*")
    exported = load_pipeline(folder / "diffusers")
    assert exported.network == "transformer" and (folder / "report.html").is_file()
    changed = {
        path[-2].key
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(exported.unet_params), jax.tree.leaves(sd3.unet_params), strict=True
        )
        if not np.array_equal(new, old)
    }
    assert changed == {"to_q", "to_k", "to_v", "to_out_0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    index = json.loads((folder / "diffusers" / "model_index.json").read_text())
    assert index["transformer"][1] == "SD3Transformer2DModel" and index["text_encoder_3"][1] == "T5EncoderModel"
    weights = [root / "text_encoder_3" / "model.safetensors" for root in (folder / "diffusers", with_t5)]
    assert weights[0].read_bytes() == weights[1].read_bytes() and len(exported.text_encoders) == 3
    assert exported.schedule.to_config() == sd3.schedule.to_config() and exported.schedule.shift == 3.0
    assert (folder / "diffusers" / "LICENSE").is_file()
    assert "circle_00.png" in (folder / "diffusers" / "README.md").read_text()
    before = np.load(tmp_path / "work" / "pretrained" / folder.name.removeprefix("seed0-") / "samples.npz")
    assert before["forgotten_00"].shape == (4, 32, 32, 3)
    recipe = json.loads((folder / "config.json").read_text())["model"]["unlearn"]
    assert recipe["logit_normal"] == [0.0, 1.0] and recipe["adapter"] == "lora"


def test_the_adapter_alone_and_the_network_alone_are_exported(sd3, tmp_path):
    denoiser, lora = latent_denoiser(sd3, (8, 8, 16), "unet"), LoraOptions(rank=2)
    denoiser.export(tmp_path / "network", sd3.unet_params, "Nothing was forgotten.")
    module, params = import_diffusers(tmp_path / "network")
    assert isinstance(module, MMDiT)
    jax.tree.map(np.testing.assert_array_equal, params, sd3.unet_params)
    assert (tmp_path / "network" / "LICENSE").is_file()
    assert "FlowMatchEuler" in (tmp_path / "network" / "scheduler" / "scheduler_config.json").read_text()
    denoiser.export_adapter(tmp_path / "adapter", init(lora, sd3.unet_params, jax.random.key(0)), lora, "Nothing was forgotten.")
    names = list(SafetensorsFile(tmp_path / "adapter" / "pytorch_lora_weights.safetensors"))
    assert "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight" in names
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)


def test_states_are_cached_without_their_zeros(sd3, tmp_path):
    captions = ["a red circle", "a blue square", "a red circle"]
    with hasty_compiler():
        states = text_states(sd3, captions, tmp_path)
        expected = prompt_embeddings(sd3, captions)
    assert states.states["encoder_hidden_states"].shape == (2, 77, 40)
    found = states.take(states.rows(captions))
    assert found["encoder_hidden_states"].shape == (3, 77 + 256, 48) and found["text_embeds"].shape == (3, 28)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not found["encoder_hidden_states"][:, 77:].any() and not found["encoder_hidden_states"][..., 40:].any()
    np.testing.assert_allclose(np.linalg.norm(states.pooled, axis=1), 1, rtol=1e-6)


def test_t5s_states_follow_those_of_clip(with_t5, sd3, tmp_path, caplog):
    """In the cache and out of it, of weights that stay as they are stored; a prompt keeps 256 tokens, not CLIP's 77."""
    pipeline = load_pipeline(with_t5)
    assert {leaf.dtype for leaf in jax.tree.leaves(pipeline.text_encoders[2].params)} == {np.dtype(np.float16)}
    long = "a red circle on " * 25  # 252 of CLIP's tokens, 101 of T5's
    captions = ["a red circle", long + "a", long + "red"]
    prompt_embeddings(pipeline, [long, long * 3])
    assert "CLIP reads the first 77 tokens of 2 longer" in caplog.text and "T5 reads the first 256 tokens of 1" in caplog.text
    with hasty_compiler():
        states = text_states(pipeline, captions, tmp_path)
        found = states.take(states.rows(captions))["encoder_hidden_states"]
        expected = prompt_embeddings(pipeline, captions)["encoder_hidden_states"]
        without = prompt_embeddings(sd3, captions)["encoder_hidden_states"]
    assert states.states["t5_states"].shape == (3, 256, 48) and found.shape == (3, 77 + 256, 48)
    # Batches of other sizes, and without T5: float32's rounding, for states up to 3 in size.
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found[:, :77] - without[:, :77]).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(found[1, 77:] - found[2, 77:]).max() > 0.01  # the captions differ behind what CLIP keeps
    np.testing.assert_array_equal(without[1], without[2])


def test_shards_of_a_variant_are_read_and_exported_under_plain_names(with_t5, tmp_path):
    folder = shutil.copytree(with_t5, tmp_path / "variant")
    part = folder / "text_encoder_3"
    whole = SafetensorsFile(part / "model.safetensors")
    shards = {name: f"model.fp16-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(whole))}
    for shard in set(shards.values()):
        mine = {name: whole[name] for name in whole if shards[name] == shard}
        tensors = [TorchTensor(name, one.dtype, one.shape, lambda one=one: one) for name, one in mine.items()]
        write_safetensors(part / shard, tensors)
    (part / "model.safetensors").unlink()
    (part / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": shards}))
    pipeline = load_pipeline(folder)
    export_pipeline(tmp_path / "exported", pipeline, pipeline.unet_params)
    names = {path.name for path in (tmp_path / "exported" / "text_encoder_3").iterdir()}
    plain = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert names == plain | {"config.json", "model.safetensors.index.json"}
    for each in (pipeline, load_pipeline(tmp_path / "exported")):
        jax.tree.map(np.testing.assert_array_equal, each.text_encoders[2].params, load_pipeline(with_t5).text_encoders[2].params)


def test_a_folder_without_an_index_is_known_by_its_network_and_exported_with_one(with_t5, tmp_path):
    folder = shutil.copytree(with_t5, tmp_path / "pipeline")
    (folder / "model_index.json").unlink()
    pipeline = load_pipeline(folder)
    export_pipeline(tmp_path / "exported", pipeline, pipeline.unet_params)
    expected, found = (json.loads((root / "model_index.json").read_text()) for root in (with_t5, tmp_path / "exported"))
    assert {name: value for name, value in expected.items() if name != "_diffusers_version"} == found


def test_latents_are_shifted_and_their_cache_knows_it(sd3, spoiled):
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    mean, std = sd3.encode_pixels(pixels)
    moved = sd3.vae.clone(shift_factor=0.5)
    found_mean, found_std = moved.apply({"params": sd3.vae_params}, pixels, method="encode")
    np.testing.assert_allclose(mean - found_mean, (0.5 - 0.0609) * 1.5305, rtol=1e-4)
    np.testing.assert_array_equal(std, found_std)
    with hasty_compiler():
        decoded = [decode_fn(vae)(sd3.vae_params, latent) for vae, latent in ((sd3.vae, mean), (moved, found_mean))]
    np.testing.assert_allclose(*decoded, atol=1e-5)
    edit(spoiled / "vae" / "config.json", shift_factor=0.5)
    assert load_pipeline(spoiled).vae_digest != sd3.vae_digest


# ---- What is refused, in one line and before any weights are read


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: edit(f / "vae/config.json", latent_channels=4), "transformer takes 16 and gives 16 .* latents have 4"),
        (lambda f: shutil.rmtree(f / "text_encoder_3"), "has no text_encoder_3 folder.*, or set text_encoder_3 and tokenizer_3"),
        (lambda f: edit(f / "text_encoder_3/config.json", d_model=40), "reads prompts of 48 features, T5 gives 40"),
        (
            lambda f: edit(f / "text_encoder_3/config.json", feed_forward_proj="relu"),
            "feed_forward_proj is 'relu'; only gated-gelu",
        ),
        (lambda f: edit(f / "text_encoder_3/config.json", model_type="umt5"), "model_type is 'umt5'; only t5"),
        (lambda f: edit(f / "text_encoder_3/config.json", relative_attention_max_distance=4), "16 buckets of distances up to 4"),
        (lambda f: edit(f / "text_encoder_3/config.json", vocab_size=90), "tokenizer_3 has 100 tokens, text_encoder_3 90"),
        (lambda f: (f / "tokenizer_3/tokenizer.json").unlink(), "no .*tokenizer_3/tokenizer.json; save the tokenizer"),
        (
            lambda f: shutil.copy(f / "tokenizer_3/tokenizer_config.json", f / "tokenizer_3/tokenizer.json"),
            "not a tokenizer file",
        ),
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "has no text_encoder_2 folder"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "has no tokenizer_2 folder"),
        (lambda f: edit(f / "text_encoder/config.json", projection_dim=15), "prompt of 28 features, the text encoders give 27"),
        (lambda f: edit(f / "text_encoder_2/config.json", hidden_size=36), "prompts of 48 features, the text encoders give 52"),
        (lambda f: edit(f / "vae/config.json", shift_factor=None), "the VAE's shift_factor is None"),
        (lambda f: edit(f / "model_index.json", _class_name="KolorsPipeline"), "holds a KolorsPipeline"),
        (lambda f: shutil.copy(PIPELINE / "scheduler/scheduler_config.json", f / "scheduler"), "the scheduler is no flow's"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", use_dynamic_shifting=True), "sets use_dynamic_shifting to True"),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused(with_t5, tmp_path, spoil, message):
    folder = shutil.copytree(with_t5, tmp_path / "spoiled")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)


def test_one_file_in_the_layout_of_stabilitys_own_code_is_refused(tmp_path, capsys):
    captioned_pictures(tmp_path / "pictures", 6)
    value = np.zeros((2, 2), np.float32)
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    write_safetensors(tmp_path / "sd3.safetensors", [TorchTensor(name, value.dtype, value.shape, lambda: value)])
    error = error_of(capsys, flags(tmp_path, checkpoint=tmp_path / "sd3.safetensors", targets="circle_00.png"))
    assert "holds Stable Diffusion 3, which is read only as a folder that diffusers saved" in error


def test_one_file_of_it_is_not_written(sd3, tmp_path):
    with pytest.raises(UserError, match="one file is written of Stable Diffusion 1.x, 2.x and XL alone"):
        export_single_file(tmp_path / "one", sd3, sd3.unet_params)


def test_a_shift_is_refused_of_other_pipelines(tmp_path):
    folder = shutil.copytree(PIPELINE, tmp_path / "sd")
    edit(folder / "vae" / "config.json", shift_factor=0.1)
    with pytest.raises(UserError, match="shift_factor is 0.1; Stable Diffusion 3 has one, and it alone"):
        load_pipeline(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"export": "single_file"}, "single_file, which is not written for Stable Diffusion 3"),
        ({"data__source": "concepts"}, "is Stable Diffusion 3, and the concepts are the paper's"),
        ({"sampling__sampler": "ddpm"}, "flow"),
        ({"data__resolution": 104}, "13 x 13 patches, and the network 12 a side"),
        ({"data__resolution": 36}, "need a multiple of 8"),
    ],
)
def test_what_is_not_there_for_3_is_refused(tmp_path, sd3_folder, capsys, fields, message):
    captioned_pictures(tmp_path / "pictures", 6)
    assert message in error_of(capsys, flags(tmp_path, checkpoint=sd3_folder, targets="circle_00.png", **fields))


def test_the_list_of_needs_has_the_transformer_and_all_encoders(tmp_path, with_t5, capsys):
    captioned_pictures(tmp_path / "pictures", 6)
    assert main(flags(tmp_path, checkpoint=with_t5, targets="circle_00.png", mode="check")) == 0
    printed = capsys.readouterr().out
    for part in ("transformer weights", "text_encoder_2 weights", "text_encoder_3 weights", "tokenizer_3", "vae weights"):
        assert f"found    {part}: " in printed


# ---- What a config leaves open


def completed(tmp_path, checkpoint, **fields):
    captioned_pictures(tmp_path / "pictures", 6)
    return complete(read_config(parse(flags(tmp_path, checkpoint=checkpoint, targets="circle_00.png", **fields))[0]))


def test_what_a_config_leaves_open_is_3s(tmp_path, sd3_folder):
    options = completed(tmp_path, sd3_folder)
    recipe = options.recipe("retrack")
    assert (recipe.adapter, recipe.learning_rate, recipe.own.lam, recipe.logit_normal) == ("lora", 1e-4, 0.5, (0.0, 1.0))
    assert (options.sampling.sampler, options.sampling.batch_size, options.data.resolution) == ("flow_euler", 1, 32)
    assert "sscd_forgotten" in options.eval.metrics and options.export == "unet"


def test_uniform_timesteps_and_every_weight_on_request(tmp_path, sd3_folder):
    fields = {"unlearn__adapter": "none", "unlearn__logit_normal": "()", "unlearn__siss__logit_normal": "(1.0,2.0)"}
    options = completed(tmp_path, sd3_folder, **fields)
    recipe = options.recipe("retrack")
    assert not recipe.has_adapter and recipe.learning_rate == 1e-5 and recipe.logit_normal == ()
    assert options.recipe("siss").logit_normal == (1.0, 2.0)
