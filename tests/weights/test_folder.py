"""Which of a folder's files is read: what diffusers would load, wrapped names, and files that are no weights."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.checkpoints.diffusers_import import FAMILIES, example_inputs
from retrack_jax.checks import UserError
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.weights.folder import (
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    find_weights,
    open_weights,
    read_config,
    weights_digest,
)
from retrack_jax.weights.names import RenameTable, from_torch
from tests.tiny_xl import random_params
from tests.weights.test_torch_reader import dict_of, tensor, zip_file

DATA = Path(__file__).parents[1] / "fixtures" / "diffusers"
WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 454741108\n"


@pytest.fixture
def model(tmp_path):
    """A copy of a whole model in safetensors that a test may spoil."""
    return Path(shutil.copytree(DATA / "safetensors", tmp_path / "model"))


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / WEIGHTS)


def same_params(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def save_shards(folder, tensors):
    shards = {name: f"diffusion_pytorch_model-{index % 2 + 1:05}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if shards[name] == shard}, folder / shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


def test_shards_are_read_before_a_whole_file_as_diffusers_does(model, caplog):
    save_shards(model, {name: value + 1 for name, value in tensors_of(model).items()})
    with caplog.at_level(logging.INFO):
        _, params = import_diffusers(model)
    np.testing.assert_array_equal(params["conv_in"]["bias"], tensors_of(model)["conv_in.bias"] + 1)
    assert f"{WEIGHTS}.index.json, as diffusers does, and not the older {WEIGHTS}" in caplog.text


def test_safetensors_are_read_before_a_newer_bin_with_a_warning(model, caplog):
    zip_file(model / "diffusion_pytorch_model.bin", dict_of(w=tensor()))
    os.utime(model / WEIGHTS, (1, 1))
    with caplog.at_level(logging.WARNING):
        _, params = import_diffusers(model)
    np.testing.assert_array_equal(params["conv_in"]["bias"], tensors_of(model)["conv_in.bias"])
    assert "not the newer diffusion_pytorch_model.bin" in caplog.text


def test_the_text_encoders_whole_file_is_read_before_its_shards(tmp_path):
    for name in TRANSFORMERS_WEIGHTS:
        (tmp_path / name).write_text("{}")
    assert find_weights(tmp_path, TRANSFORMERS_WEIGHTS) == [tmp_path / "model.safetensors"]
    assert find_weights(tmp_path / "absent") == []


def test_files_and_digest_of_shards(tmp_path):
    folder = DATA / "sharded_pipeline" / "unet"
    index, *shards = find_weights(folder)
    assert index.name == DIFFUSERS_WEIGHTS[0] and shards == sorted(folder.glob("*-of-*.safetensors"))
    assert len(weights_digest(folder)) == 1 + len(shards) and isinstance(weights_digest(DATA / "safetensors"), str)


def test_a_choice_of_variants_is_refused_by_name(model):
    shutil.copy(model / WEIGHTS, model / "diffusion_pytorch_model.fp16.safetensors")
    (model / WEIGHTS).rename(model / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(UserError, match=r"only variants.*fp16.safetensors, .*non_ema.safetensors; copy"):
        find_weights(model)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "state_dict.", "module._orig_mod.", "ema.module."])
def test_names_behind_one_wrapper_are_read(model, wrapper):
    _, expected = import_diffusers(model)
    tensors = {wrapper + name: value for name, value in tensors_of(model).items()}
    safetensors.numpy.save_file(tensors | {"n_averaged": np.array(7)}, model / WEIGHTS)
    assert same_params(import_diffusers(model)[1], expected)


def test_a_wrapper_of_some_names_alone_is_named(model):
    plain = tensors_of(model)
    for levels in (("state_dict.", "ema."), ("", "ema.")):
        tensors = {level + name: value for level in levels for name, value in plain.items()}
        safetensors.numpy.save_file(tensors, model / WEIGHTS)
        with pytest.raises(UserError, match="surplus.*ema[.]conv"):
            import_diffusers(model)
    both = {level + name: value for level in ("state_dict.", "ema.") for name, value in plain.items()}
    safetensors.numpy.save_file(both, model / WEIGHTS)
    with pytest.raises(UserError, match="behind ema. and state_dict.: save one of these alone"):
        import_diffusers(model)


def test_a_name_of_the_network_is_no_wrapper():
    target = {"net": {"layers_0": {"kernel": jax.ShapeDtypeStruct((1, 2), np.float32)}}}
    params = from_torch({"net.layers.0.weight": np.ones((2, 1))}, target, table=RenameTable(lists=("layers",)))
    np.testing.assert_array_equal(params["net"]["layers_0"]["kernel"], np.ones((1, 2), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_in_float32_are_named(model, value):
    tensors = tensors_of(model)
    tensors["conv_out.bias"] = np.full(3, value)
    safetensors.numpy.save_file(tensors, model / WEIGHTS)
    with pytest.raises(UserError, match=f"{WEIGHTS} holds NaN or infinity: 1 tensors: conv_out.bias"):
        import_diffusers(model)


def to_folder(path):
    path.unlink()
    path.mkdir()


def to_fifo(path):
    path.unlink()
    os.mkfifo(path)


def to_link(path):
    path.unlink()
    path.symlink_to("../gone.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text(POINTER), "Git LFS pointer.*run `git lfs pull`"),
        (to_folder, "no regular file"),
        (to_fifo, "no regular file"),
        (to_link, "link to ../gone.bin, which is not there"),
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin", "config.json", f"{WEIGHTS}.index.json", "shard"])
def test_what_is_no_file_of_weights_is_named(model, name, spoil, words):
    if name == "shard":
        save_shards(model, tensors_of(model))
        path = sorted(model.glob("*-of-*"))[1]
    else:
        path = model / name
        if name != "config.json":
            (model / WEIGHTS).unlink()
            path.write_text("{}")
    spoil(path)
    with pytest.raises(UserError, match=f"{path.name}.*{words}") as caught:
        import_diffusers(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard", ["\ud800.safetensors", "a\0b.safetensors", "../x.safetensors", ""])
def test_a_shards_name_that_is_none_is_refused(model, shard):
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match="outside its folder or no file's name|half of a surrogate pair") as caught:
        open_weights(model)
    str(caught.value).encode()  # can be printed


def test_an_index_with_a_name_that_is_no_text_is_refused(model):
    index = {"weight_map": {"\ud800": "diffusion_pytorch_model-1.safetensors"}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="half of a surrogate pair"):
        open_weights(model)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"sample_size": ' + "9" * 5000 + "}"], ids=["deep", "long"])
def test_a_config_that_python_cannot_read_is_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        read_config(tmp_path)


def test_the_schedule_of_a_training_checkpoint_lies_one_level_up(tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-500"
    shutil.copytree(DATA / "safetensors", checkpoint / "unet")
    assert read_schedule_config(checkpoint) is None
    (tmp_path / "out" / "scheduler").mkdir()
    (tmp_path / "out" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    for path in (checkpoint, checkpoint / "unet", tmp_path / "out"):
        assert read_schedule_config(path) == {"prediction_type": "v_prediction"}
    (checkpoint / "scheduler").mkdir()
    (checkpoint / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "sample"}')
    for path in (checkpoint, checkpoint / "unet"):
        assert read_schedule_config(path) == {"prediction_type": "sample"}


def test_a_pipelines_schedule_is_never_sought_outside_it(tmp_path):
    shutil.copytree(DATA / "safetensors", tmp_path / "a" / "unet")
    (tmp_path / "a" / "model_index.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    assert read_schedule_config(tmp_path / "a") is None


def saved_transformer(folder, name):
    """A diffusion transformer as diffusers saves one, under the class `name`."""
    fields = {"sample_size": 4, "in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4}
    own = {"num_embeds_ada_norm": 1}
    if FAMILIES[name].module is MMDiT:
        own = {"joint_attention_dim": 4, "pooled_projection_dim": 4, "caption_projection_dim": 8, "pos_embed_max_size": 2}
    module = FAMILIES[name].module.from_config({**fields, **own})
    params = random_params(module, 0, *example_inputs(module))
    export_diffusers(folder, module, params)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": name}))
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_averaged_network_of_each_family_is_read(tmp_path, name):
    tiny_sd = DATA.parent / "tiny_sd" / "pipeline" / "unet"
    saved = {"UNet2DModel": DATA / "safetensors", "UNet2DConditionModel": tiny_sd}
    source = saved[name] if name in saved else saved_transformer(tmp_path / "saved", name)
    folder = Path(shutil.copytree(source, tmp_path / "model" / "unet_ema"))
    config = json.loads((folder / "config.json").read_text())
    # What EMAModel.save_pretrained writes.
    config |= {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 0, "power": 2 / 3}
    config |= {"update_after_step": 0, "use_ema_warmup": False}
    (folder / "config.json").write_text(json.dumps(config))
    module, params = import_diffusers(tmp_path / "model")
    module_again, params_again = import_diffusers(source)
    assert module == module_again and isinstance(module, FAMILIES[name].module) and same_params(params, params_again)
    assert all(type(leaf) is np.ndarray and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
