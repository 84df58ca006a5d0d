"""Captioned images as a problem: text states, conditions, neighbors, anchors; what is refused, and what a config leaves open."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax import api
from retrack_jax.checkpoints import load_pipeline
from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config.options import Options, SamplingOptions
from retrack_jax.config.reading import read_config
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.config.rules import complete
from retrack_jax.data.dataset import image_set
from retrack_jax.main import main
from retrack_jax.models.clip_text import ClipTextEncoder
from retrack_jax.problem.captions import Captions
from retrack_jax.problem.denoiser import latent_denoiser
from retrack_jax.problem.problem import check_problem
from retrack_jax.problem.target import make_target
from retrack_jax.problem.text_states import TextStates, text_states
from retrack_jax.unlearn.options import EraseDiffOptions, RetrackOptions
from retrack_jax.weights.kinds import check_supported, takes_prompts
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import write_safetensors
from tests import toys
from tests.captioned import captioned_pictures, flags
from tests.messages import error_of
from tests.tiny_sd import PIPELINE, hasty_compiler

WORDS = ["cat", "dog", "cow", "", "cat", "fox"]
POOLED = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0], [0.8, -0.6]], np.float32)  # cat, dog, cow, "", fox
NUMBERS = {"cat": 0, "dog": 1, "cow": 2, "": 3, "fox": 4}


@pytest.fixture
def target():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    images = dataclasses.replace(image_set("six", pixels, [f"{i}.png" for i in range(6)]), captions=WORDS)
    return make_target("0.png", images, np.array([0, 5]), np.array([1, 2, 3, 4]))


@pytest.fixture
def captions():
    states = np.arange(5, dtype=np.float32)[:, None, None] * np.ones((1, 3, 2), np.float32)
    options = Options(sampling=SamplingOptions(negative_prompt="blurry", num_captions=2))
    return Captions(TextStates(dict(NUMBERS), states, POOLED, "digest"), lambda prompt: np.full((1, 3, 2), len(prompt)), options)


def test_each_image_has_the_states_of_its_caption(captions, target):
    conditions = captions.of_images(target.images)(np.array([4, 1, 3]))
    np.testing.assert_array_equal(conditions[:, 0, 0], [0, 1, 3])
    assert captions.table(target) is None
    assert captions.null[0, 0, 0] == len("blurry") and captions.dropped[0, 0, 0] == 0


def test_samples_are_of_forgotten_captions_and_of_kept_ones_that_differ_from_them(captions, target):
    shown = captions.shown(target)
    assert list(shown) == ["forgotten_00", "forgotten_01", "kept_00", "kept_01"]
    assert {shown["forgotten_00"], shown["forgotten_01"]} == {0, 5}
    kept = [WORDS[shown[name]] for name in ("kept_00", "kept_01")]
    assert len(set(kept)) == 2 and "cat" not in kept  # 4.png remains and has the caption of 0.png
    sampled = captions.sampled(target)
    for name, row in shown.items():
        assert captions.describe(name, target) == WORDS[row] and sampled[name].shape == (1, 3, 2)
        assert sampled[name][0, 0, 0] == NUMBERS[WORDS[row]]


def test_captions_of_equal_tokens_are_one_for_samples_too(captions, target):
    """Text encoders read "Cat" as "cat": samples under it are no sign of what is kept."""
    captions._states.row_of.update({"Cat": 0, "Dog": 1})
    spelled = dataclasses.replace(target.images, captions=["cat", "dog", "Dog", "", "Cat", "cat"])
    shown = captions.shown(dataclasses.replace(target, images=spelled))
    kept = [spelled.captions[row] for name, row in shown.items() if name.startswith("kept")]
    assert len(kept) == 2 and "" in kept and "Cat" not in kept
    assert sum(name.startswith("forgotten") for name in shown) == 1


def test_forgotten_captions_are_a_random_choice_and_each_has_every_forgotten_picture_of_it(captions):
    """The forgotten images are sorted by their pixels: the first ones would be the darkest."""
    pixels = np.repeat(np.arange(6, dtype=np.uint8), 4 * 4 * 3).reshape(6, 4, 4, 3)
    images = dataclasses.replace(
        image_set("six", pixels, [f"{i}.png" for i in range(6)]), captions=["cat", "dog", "cow", "", "cat", "fox"]
    )
    target = make_target("most", images, np.array([0, 1, 2, 4, 5]), np.array([3]))
    shown = captions.shown(target)
    forgotten = [row for name, row in shown.items() if name.startswith("forgotten")]
    assert len(forgotten) == 2 and forgotten != [0, 1]
    pictures = captions.pictures(target)
    assert {name: rows.tolist() for name, rows in pictures.items() if name == "kept_00"} == {"kept_00": [3]}
    for name, row in shown.items():
        same = [0, 4] if images.captions[row] == "cat" else [row]
        assert pictures[name].tolist() == same
    assert set(captions.digests_of(target)) == {"captions of samples"}  # another choice is another workdir
    every = Captions(captions._states, lambda prompt: np.zeros((1, 3, 2)), Options(sampling=SamplingOptions(num_captions=8)))
    assert every.pictures(target)["forgotten_00"].tolist() == [0, 4] and every.digests_of(target) == {}


def search(captions, target, **options):
    latents = np.zeros((6, 2, 2, 1), np.float32) + np.arange(6, dtype=np.float32)[:, None, None, None]
    find = captions.search(target, RetrackOptions(**options))
    return find(latents[target.unique], latents[target.remain], 2, "exact")


def test_beta_brings_neighbors_with_like_captions(captions, target):
    order = list(target.unique)
    plain, like = (search(captions, target, beta=beta).rows[order.index(0)] for beta in (0.0, 100.0))
    assert list(target.remain[plain]) == [1, 2]
    assert list(target.remain[like]) == [4, 1]  # the cat, then the dog


def test_the_anchor_is_the_nearest_remaining_caption_of_those_that_have_no_like_neighbor(captions, target):
    found = search(captions, target)
    anchor = captions.anchor(target, found.similarity, UnlearnOptions(own=RetrackOptions(anchor=0.7)))
    order = list(target.unique)
    assert not anchor.used[order.index(5)]  # the cat is a neighbor of the fox, with 0.8
    assert anchor.used[order.index(0)]  # the nearest images of the cat are a dog, with 0.6, and a cow
    np.testing.assert_array_equal(anchor.condition[:, 0, 0], 0)  # 4.png, the other cat, is the nearest caption of both
    for none in (RetrackOptions(), RetrackOptions(anchor=-1.0), EraseDiffOptions()):
        assert captions.anchor(target, found.similarity, UnlearnOptions(own=none)) is None


def test_a_caption_that_no_other_image_has_needs_an_anchor_under_same_caption(captions, target):
    with pytest.raises(UserError, match="no picture that remains has the caption of 5.png; set config.unlearn.retrack.same"):
        search(captions, target, same_caption=True)
    found = search(captions, target, same_caption=True, anchor=1.0)
    cat = list(target.unique).index(0)
    assert list(target.remain[found.rows[cat]]) == [4, 4] and list(found.bias[cat]) == [0, -np.inf]
    anchor = captions.anchor(target, found.similarity, UnlearnOptions(own=RetrackOptions(anchor=1.0)))
    assert list(anchor.used) == [row == 5 for row in target.unique]


def test_text_states_are_computed_once_and_equal_tokens_are_one_caption(pipeline, tmp_path, caplog, monkeypatch):
    texts = ["a red circle", "A Red  circle", "a blue square", ""]
    with caplog.at_level(logging.WARNING), hasty_compiler():
        found = text_states(pipeline, texts, tmp_path)
    assert not caplog.text
    assert found.states.shape == (3, 77, 16) and found.row_of["a red circle"] == found.row_of["A Red  circle"]
    np.testing.assert_allclose(np.linalg.norm(found.pooled, axis=1), 1, rtol=1e-6)
    ids = pipeline.tokenizer(["a blue square"])
    expected = np.asarray(pipeline.text_encoders[0].module.apply({"params": pipeline.text_encoders[0].params}, ids))[0]
    row = found.row_of["a blue square"]
    np.testing.assert_allclose(found.states[row], expected, rtol=1e-4, atol=1e-5)
    end = expected[list(ids[0]).index(pipeline.tokenizer.eos_id)]
    np.testing.assert_allclose(found.pooled[row], end / np.linalg.norm(end), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("retrack_jax.problem.text_states.encode_ids", None)
    again = text_states(pipeline, texts, tmp_path)
    np.testing.assert_array_equal(again.states, found.states)
    (path,) = (tmp_path / "captions").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TypeError):  # a file that is not whole is made again
        text_states(pipeline, texts, tmp_path)


def test_a_long_caption_is_cut_as_diffusers_does_and_that_is_said(pipeline, tmp_path, caplog):
    long = "number " * 100
    with caplog.at_level(logging.WARNING), hasty_compiler():
        found = text_states(pipeline, [long, "short"], tmp_path)
    assert "CLIP reads the first 77 tokens of 1 longer prompts: number number" in caplog.text
    ids = pipeline.tokenizer([long])[0]
    assert len(ids) == 77 and ids[-1] == pipeline.tokenizer.eos_id
    end = found.states[found.row_of[long]][76]
    np.testing.assert_allclose(found.pooled[found.row_of[long]], end / np.linalg.norm(end), rtol=1e-6)


# ---- Stable Diffusion 2.x


def test_a_network_that_predicts_v_gives_eps_under_its_caption(pipeline_folder, rng):
    path = pipeline_folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    pipeline = load_pipeline(pipeline_folder)
    denoiser = latent_denoiser(pipeline, (8, 8, 4), "unet")
    keys = jax.random.split(rng)
    x_t, states, t = jax.random.normal(keys[0], (2, 8, 8, 4)), jax.random.normal(keys[1], (2, 77, 16)), jnp.array([10, 700])

    def both(params):
        return denoiser.eps_fn(params, x_t, t, states), pipeline.unet.apply({"params": params}, x_t, t, states)

    with hasty_compiler():
        eps, v = jax.jit(both)(denoiser.params)
    tables = denoiser.schedule.gamma, denoiser.schedule.sigma
    gamma, sigma = (np.asarray(table)[np.asarray(t)][:, None, None, None] for table in tables)
    np.testing.assert_allclose(eps, gamma * v + sigma * x_t, rtol=1e-4, atol=1e-5)
    assert np.abs(eps - v).max() > 0.1


def test_the_text_encoder_of_stable_diffusion_2(tmp_path):
    """The keys of its config.json that an encoder could depend on, and some that it does not."""
    config = {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
        "hidden_act": "gelu", "hidden_size": 1024, "initializer_factor": 1.0, "initializer_range": 0.02,
        "intermediate_size": 4096, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
        "num_attention_heads": 16, "num_hidden_layers": 23, "pad_token_id": 1, "projection_dim": 512, "torch_dtype": "float32",
        "transformers_version": "4.25.0.dev0", "vocab_size": 49408,
    }  # fmt: skip
    module = ClipTextEncoder.from_config(config)
    assert (module.hidden_act, module.num_attention_heads, module.num_hidden_layers) == ("gelu", 16, 23)
    assert module.projection_dim is None  # its states are not projected
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))["params"]
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 340_387_840  # as published


# ---- The command


@pytest.fixture
def pictures(tmp_path):
    captioned_pictures(tmp_path / "pictures", 6)
    return tmp_path / "pictures"


def pixel_model(folder):
    """What tells a model of pixels."""
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')
    return folder


def options_of(tmp_path, **fields):
    return read_config(parse(flags(tmp_path, **fields))[0])


def test_what_a_config_leaves_open_is_stable_diffusions(tmp_path, pictures):
    options = options_of(tmp_path, targets="circle_00.png")
    whole = complete(options)
    assert whole.data.resolution == 32 and whole.recipe("retrack").own.lam == 0.5
    assert whole.recipe("retrack").learning_rate == 1e-5 and whole.sampling.num_images == 4
    assert "sscd_forgotten" in whole.eval.metrics and "fid" not in whole.eval.metrics
    check_problem(whole)


@pytest.mark.parametrize(
    ("version", "resolution"), [("0.2.4", 256), ("0.8.1", 256), ("0.9.0.dev0", 32), ("0.42.1", 32), (None, 32)]
)
def test_an_early_unets_size_is_that_of_stable_diffusion(tmp_path, pictures, version, resolution):
    """Before 0.9 the configs of models of 512 pixels said 32; diffusers' pipeline takes 64, and here 4 pixels are one latent."""
    folder = tmp_path / "model"
    shutil.copytree(PIPELINE, folder)
    path = folder / "unet" / "config.json"
    config = {**json.loads(path.read_text()), "_diffusers_version": version}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    options = options_of(tmp_path, targets="circle_00.png", checkpoint=folder)
    assert complete(options).data.resolution == resolution


@pytest.mark.parametrize("mode", ["run", "check"])
def test_a_lora_as_the_checkpoint_is_refused(tmp_path, pictures, capsys, mode):
    folder = tmp_path / "lora"
    folder.mkdir()
    value = np.zeros((2, 2), np.float32)
    tensor = TorchTensor("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", value.dtype, value.shape, lambda: value)
    write_safetensors(folder / "pytorch_lora_weights.safetensors", [tensor])
    write_safetensors(folder / "mine.safetensors", [tensor])
    for checkpoint in (folder, folder / "mine.safetensors"):
        error = error_of(capsys, flags(tmp_path, checkpoint=checkpoint, targets="circle_00.png", mode=mode))
        assert "is an adapter (LoRA)" in error and "merge it into its model" in error
    (folder / "pytorch_lora_weights.safetensors").rename(tmp_path / "aside")
    (folder / "mine.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        check_supported(folder)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("AuraFlowPipeline", {}),
        ("FluxPipeline", {}),
        ("PixArtAlphaPipeline", {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single"}),  # as DiT's was called
    ],
)
def test_pipelines_without_a_unet_are_refused(tmp_path, pictures, capsys, name, config):
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    error = error_of(capsys, flags(tmp_path, checkpoint=folder, targets="circle_00.png"))
    assert f"holds a {name}, which is not supported; give a Stable Diffusion 1.x, 2.x, XL or 3 folder" in error


def test_models_and_folders_with_adapters_next_to_a_model_pass(tmp_path):
    model = pixel_model(tmp_path / "model")
    (model / "old_lora.safetensors").write_bytes(b"")
    for folder in (model, PIPELINE, tmp_path / "nowhere"):
        check_supported(folder)
    assert takes_prompts(PIPELINE) and not takes_prompts(model) and not takes_prompts("")


def test_the_list_of_needs_has_the_pipeline_and_the_captions(tmp_path, pictures, capsys):
    argv = flags(tmp_path, targets="circle_00.png", mode="check")
    assert main(argv) == 0
    found = capsys.readouterr().out
    for part in ("found    captions: ", "found    tokenizer: ", "found    vae weights: ", "missing  feature network sscd"):
        assert part in found
    (pictures / "metadata.jsonl").write_text('{"file_name": "circle_00.png", "text": "x"}')
    assert "1 of what custom needs is missing: captions" in error_of(capsys, argv)


def test_pictures_without_captions_end_the_command_with_one_line(tmp_path, pictures, capsys):
    (pictures / "metadata.jsonl").unlink()
    assert "no captions in" in error_of(capsys, flags(tmp_path, targets="circle_00.png"))


@pytest.mark.parametrize("field", ["data.caption_dropout=0.1", "unlearn.retrack.beta=2.0", "unlearn.retrack.anchor=0.5"])
def test_options_of_captions_are_refused_without_any(tmp_path, pictures, field):
    name, value = field.split("=")
    only = {"sampling.num_captions": 8, name: value}
    options = options_of(tmp_path, checkpoint=pixel_model(tmp_path / "model"), targets="circle_00.png", **only)
    with pytest.raises(UserError, match=f"config.{name}: only images with captions"):
        check_problem(options)


def test_the_python_door_refuses_them_too():
    images = toys.images(6)
    with pytest.raises(UserError, match="beta: only networks with captions or labels have a use for it"):
        api.unlearn(
            toys.ToyNet().apply, toys.params(), toys.schedule(), images[1:], images[:1], rng=jax.random.key(0), beta=1.0,
            batch_size=4,
        )  # fmt: skip
