"""Import and export: every layout of the fixtures, what is refused, whole or absent, bit-exact round trips.

The fixtures' outputs are compared in tests/models/test_unet2d.py, and what diffusers reads back in
tests/parity/test_unet2d_parity.py.
"""

import json
import logging
import os
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import ModelCard

from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.checks import UserError
from retrack_jax.weights.names import DIFFUSERS, RenameTable, from_torch, to_torch
from retrack_jax.weights.safetensors_io import SafetensorsFile, write_safetensors
from tests import toys
from tests.torch_files import read_torch

DATA = Path(__file__).parents[1] / "fixtures" / "diffusers"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tmp_path):
    """A copy of the plain fixture that a test may spoil."""
    return Path(shutil.copytree(DATA / "safetensors", tmp_path / "model"))


def equal(a, b):
    """Whether two trees are equal bit by bit."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))


def rewrite(folder, change):
    """Applies `change` to the tensors in `folder`."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(change(tensors) or tensors, folder / WEIGHTS)


def test_every_tensor_arrives_once_in_the_right_layout():
    _, params = import_diffusers(DATA / "safetensors")
    torch = safetensors.numpy.load_file(DATA / "safetensors" / WEIGHTS)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(array.size for array in torch.values())
    block = params["down_blocks_1"]
    name = "down_blocks.1.attentions.0.to_out.0.weight"
    np.testing.assert_array_equal(block["attentions_0"]["to_out_0"]["kernel"], torch[name].T)
    conv = torch["down_blocks.1.resnets.0.conv1.weight"]  # [8, 4, 3, 3]
    np.testing.assert_array_equal(block["resnets_0"]["conv1"]["kernel"][1, 2, 3, 7], conv[7, 3, 1, 2])
    np.testing.assert_array_equal(block["resnets_0"]["norm1"]["scale"], torch["down_blocks.1.resnets.0.norm1.weight"])


@pytest.mark.parametrize("path", ["sharded_pipeline", "sharded_pipeline/unet", "averaged", "averaged/unet_ema", "old_pipeline"])
def test_finds_the_model_in_root_unet_or_unet_ema(path):
    _, params = import_diffusers(DATA / path)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_two_models_in_one_folder_are_named_and_the_first_is_read(tmp_path, caplog):
    for name in ("unet", "unet_ema"):
        shutil.copytree(DATA / ("safetensors" if name == "unet" else "averaged/unet_ema"), tmp_path / name)
    with caplog.at_level(logging.WARNING):
        module, _ = import_diffusers(tmp_path)
    assert module.in_channels == 3 and "unet_ema" in caplog.text


def test_old_attention_names_of_one_model_equal_the_new(model):
    _, expected = import_diffusers(model)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {key.replace(f".{new}.", f".{name}."): value for key, value in tensors.items()}
        assert any(".proj_attn." in key for key in tensors)
        return tensors

    rewrite(model, rename)
    assert equal(import_diffusers(model)[1], expected)


def test_half_precision_files_become_float32_exactly():
    for name, dtype in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        stored = SafetensorsFile(DATA / name / WEIGHTS)
        _, params = import_diffusers(DATA / name)
        assert stored["conv_in.bias"].dtype == dtype
        np.testing.assert_array_equal(params["conv_in"]["bias"], stored["conv_in.bias"].astype(np.float32))


def test_a_lone_variant_is_read(model):
    _, expected = import_diffusers(model)
    (model / WEIGHTS).rename(model / "diffusion_pytorch_model.fp16.safetensors")
    assert equal(import_diffusers(model)[1], expected)


def test_a_sharded_bin_is_read(tmp_path):
    _, expected = import_diffusers(DATA / "old_pipeline")
    shard, index = "diffusion_pytorch_model-00001-of-00001.bin", "diffusion_pytorch_model.bin.index.json"
    names = read_torch(DATA / "old_pipeline" / "diffusion_pytorch_model.bin")
    shutil.copy(DATA / "old_pipeline" / "config.json", tmp_path)
    shutil.copy(DATA / "old_pipeline" / "diffusion_pytorch_model.bin", tmp_path / shard)
    (tmp_path / index).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    assert equal(import_diffusers(tmp_path)[1], expected)


def test_own_fields_reach_the_module():
    module, params = import_diffusers(DATA / "safetensors", dtype=jnp.bfloat16, remat=True)
    assert module.remat and module.dtype == jnp.bfloat16 and params["conv_in"]["bias"].dtype == jnp.float32


def test_lists_missing_surplus_and_misshaped_tensors(model):
    def spoil(tensors):
        del tensors["conv_in.bias"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.weight"] = tensors["conv_out.weight"].transpose(1, 0, 2, 3).copy()

    rewrite(model, spoil)
    with pytest.raises(UserError) as caught:
        import_diffusers(model)
    message = str(caught.value)
    assert "1 missing: conv_in.bias" in message and "1 surplus: extra.weight" in message
    assert "1 mis-shaped: conv_out.weight [4, 3, 3, 3] instead of [3, 4, 3, 3]" in message and "\n" not in message


def test_a_long_list_is_cut(model):
    rewrite(model, lambda tensors: {"conv_in.bias": tensors["conv_in.bias"]})
    with pytest.raises(UserError, match=r"\d+ missing: .* and \d+ more"):
        import_diffusers(model)


def test_one_tensor_under_two_spellings_is_refused(model):
    name = "mid_block.attentions.0.to_q.weight"
    rewrite(model, lambda tensors: tensors | {name.replace("to_q", "query"): tensors[name]})
    with pytest.raises(UserError, match="two spellings"):
        import_diffusers(model)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no JSON object"),
        (lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
        (lambda folder: os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1), "damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "damaged"),
        (lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "header too large"),
        (lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"{{{{"), "invalid JSON"),
    ],
)
def test_says_what_is_wrong_with_a_folder(model, spoil, words):
    spoil(model)
    with pytest.raises(UserError, match=words):
        import_diffusers(model)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "damaged .*invalid shape"),
        ({"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}, "damaged"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "damaged"),
        ({"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}, "F8_E4M3"),
        ({"dtype": "F32", "shape": [2]}, "damaged"),
        ("F32", "damaged"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "damaged"),
        ({"dtype": "F32", "shape": [2**40] * 400_000, "data_offsets": [0, 4]}, "damaged"),
        ({"dtype": "F32", "shape": [1] * 400_000, "data_offsets": [0, 4]}, "a has 400000 dimensions"),
        ({"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}, "a has 70 dimensions"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entry, words):
    header = json.dumps({"a": entry}).encode()
    values = bytes(4 if "dimensions" in words else 8)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values)
    with pytest.raises(UserError, match=words):
        SafetensorsFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].update({"conv_in.bias": "../../model.safetensors"}), "outside its folder"),
        (lambda index: index["weight_map"].update({"conv_in.bias": "absent.safetensors"}), "no file"),
        (lambda index: index["weight_map"].pop("conv_in.bias"), "differ about 1 tensors: conv_in.bias"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, change, words):
    folder = Path(shutil.copytree(DATA / "sharded_pipeline" / "unet", tmp_path / "unet"))
    file = folder / f"{WEIGHTS}.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        import_diffusers(folder)


def test_our_safetensors_equal_the_packages(tmp_path, rng):
    tree = {
        "conv": {"kernel": jax.random.normal(rng, (3, 3, 2, 4)), "bias": jnp.zeros((4,), jnp.bfloat16)},
        "n": {"scale": jnp.ones(())},
    }
    write_safetensors(tmp_path / "ours", to_torch(tree))
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    assert sorted(theirs) == ["conv.bias", "conv.weight", "n.weight"]
    np.testing.assert_array_equal(theirs["conv.weight"], np.asarray(tree["conv"]["kernel"]).transpose(3, 2, 0, 1))
    assert theirs["conv.bias"].dtype == ml_dtypes.bfloat16 and theirs["n.weight"].shape == ()
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.zeros((0, 3), np.float16), "c": np.array([True, False])}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs")
    ours = SafetensorsFile(tmp_path / "theirs")
    assert sorted(ours) == sorted(arrays) and all(ours[name].dtype == arrays[name].dtype for name in arrays)
    assert all(np.array_equal(ours[name], arrays[name]) and ours.shape(name) == arrays[name].shape for name in arrays)


@pytest.mark.parametrize("path", ["safetensors", "old_pipeline", "sharded_pipeline", "averaged"])
def test_export_and_import_again_is_bit_exact(tmp_path, path):
    module, params = import_diffusers(DATA / path)
    export_diffusers(tmp_path / "out", module, params)
    again, params_again = import_diffusers(tmp_path / "out")
    assert again == module and equal(params, params_again)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "config.json", WEIGHTS]


def test_exported_names_are_those_of_the_source(tmp_path):
    module, params = import_diffusers(DATA / "sharded_pipeline")
    export_diffusers(tmp_path / "out", module, params)
    index = json.loads((DATA / "sharded_pipeline" / "unet" / f"{WEIGHTS}.index.json").read_text())
    assert set(SafetensorsFile(tmp_path / "out" / WEIGHTS)) == set(index["weight_map"])


@pytest.mark.parametrize("metadata", ["license: [mit", "- a\n- list", "tags: 3", "model-index: [{}]"])
def test_a_card_whose_metadata_are_damaged_is_carried_along(metadata, tmp_path):
    text = f"---\n{metadata}\n---\n# Named\n\n    indented\n"
    source = shutil.copytree(DATA / "old_pipeline", tmp_path / "source")
    (source / "README.md").write_text(text)
    module, params = import_diffusers(source)
    export_diffusers(tmp_path / "out", module, params, source=source, note="Forgot it.")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Named\n\n    indented\n" in card and card.endswith("Forgot it.\n")
    export_diffusers(tmp_path / "out", module, params, source=source)  # it is known as ours


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("---\nlicense: mit\n---\n# Modèle\n".encode("latin-1"), "# Mod�le"),
        ("---\nlicense: mit\n---\n# Modèle\n".encode("utf-8-sig"), "# Modèle"),
    ],
)
def test_a_card_that_is_no_plain_utf_8_is_carried_along(tmp_path, card, words):
    source = shutil.copytree(DATA / "old_pipeline", tmp_path / "source")
    (source / "README.md").write_bytes(card)
    module, params = import_diffusers(source)
    for _ in range(2):  # the second replaces the first
        export_diffusers(tmp_path / "out", module, params, source=source)
        found = ModelCard.load(tmp_path / "out" / "README.md")
        assert found.data.license == "mit" and words in found.text


def test_a_folder_is_a_pipeline_only_where_diffusers_can_draw_with_it(tmp_path):
    """`DDPMPipeline` gives the network no labels, scales no input, takes the size from the config, gives `step` a generator."""
    module, params = import_diffusers(DATA / "old_pipeline")
    ddpm = {"_class_name": "DDPMScheduler"}
    for changed, schedule, there in (
        ({}, ddpm, True),
        ({}, {"_class_name": "DDIMScheduler"}, True),
        ({}, {"_class_name": "UniPCMultistepScheduler"}, False),
        ({}, {"_class_name": "EulerDiscreteScheduler"}, False),
        ({"sample_size": None}, ddpm, False),
        ({"num_class_embeds": 10}, ddpm, False),
        ({"class_embed_type": "timestep"}, ddpm, False),
    ):
        export_diffusers(tmp_path / "out", module.clone(**changed), params, schedule=schedule)
        assert (tmp_path / "out" / "model_index.json").exists() == there, (changed, schedule)
        assert read_schedule_config(tmp_path / "out")["_class_name"] == schedule["_class_name"]


def test_export_takes_schedule_licence_and_card_along(tmp_path):
    source = DATA / "old_pipeline"
    module, params = import_diffusers(source)
    schedule = read_schedule_config(source)
    export_diffusers(tmp_path / "out", module, params, schedule=schedule, source=source, note="Forgot 10001.jpg by ReTrack.")
    assert (tmp_path / "out" / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers") and "machine-unlearning" in card.data.tags
    assert card.text.startswith("\n# A tiny model\n") and card.text.rstrip().endswith("Forgot 10001.jpg by ReTrack.")
    assert read_schedule_config(tmp_path / "out") == schedule
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline" and index["unet"] == ["diffusers", "UNet2DModel"]


def test_licence_and_card_of_the_pipeline_around_the_model(tmp_path):
    shutil.copytree(DATA / "sharded_pipeline", tmp_path / "pipeline")
    (tmp_path / "pipeline" / "LICENSE.txt").write_text("terms")
    module, params = import_diffusers(tmp_path / "pipeline")
    export_diffusers(tmp_path / "out", module, params, source=tmp_path / "pipeline" / "unet")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "terms"


def test_export_replaces_only_its_own(tmp_path):
    module, params = import_diffusers(DATA / "safetensors")
    out = tmp_path / "out"
    export_diffusers(out, module, params, note="first", schedule={"num_train_timesteps": 1000})
    export_diffusers(out, module, jax.tree.map(jnp.zeros_like, params), note="second")
    assert "second" in (out / "README.md").read_text() and not (out / "model_index.json").exists()
    assert not jnp.any(import_diffusers(out)[1]["conv_in"]["bias"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "mine", "no export"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=words):
            export_diffusers(path, module, params)
    with pytest.raises(UserError, match="export to another"):
        export_diffusers(out, module, params, source=out)
    with pytest.raises(UserError, match="no folder"):
        export_diffusers(tmp_path / "new", module, params, source=tmp_path / "absent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]


@pytest.mark.parametrize("earlier", [False, True])
def test_an_export_that_fails_leaves_nothing_or_the_earlier_one(tmp_path, earlier):
    module, params = import_diffusers(DATA / "safetensors")
    out = tmp_path / "out"
    if earlier:
        export_diffusers(out, module, params, note="first")

    broken = dict(params, time_embedding={"linear_1": {"bias": toys.Interrupted()}})
    with pytest.raises(KeyboardInterrupt):
        export_diffusers(out, module, broken, note="second")
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])
    assert not earlier or equal(import_diffusers(out)[1], params)


def test_a_folder_that_cannot_be_written(tmp_path):
    module, params = import_diffusers(DATA / "safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export_diffusers(tmp_path / "file" / "out", module, params)


def test_finds_the_schedule_and_never_reads_scheduler_bin(tmp_path):
    assert read_schedule_config(DATA / "old_pipeline")["variance_type"] == "fixed_small"
    assert read_schedule_config(DATA / "sharded_pipeline")["clip_sample"] is False
    assert read_schedule_config(DATA / "sharded_pipeline" / "unet")["clip_sample"] is False
    assert (DATA / "averaged" / "scheduler.bin").is_file()
    assert read_schedule_config(DATA / "averaged") is None
    assert read_schedule_config(DATA / "averaged" / "unet_ema") is None
    (tmp_path / "scheduler_config.json").write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        read_schedule_config(tmp_path)


def test_names_go_there_and_back_for_any_list():
    table = RenameTable(lists=("layers",), ignored=(r".*\.position_ids",))
    assert table.torch_name(("encoder", "layers_3", "linear_1", "kernel")) == "encoder.layers.3.linear_1.weight"
    assert DIFFUSERS.torch_name(("mid_block", "resnets_1", "norm2", "scale")) == "mid_block.resnets.1.norm2.weight"
    target = {"layers_0": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}, "embed": {"embedding": jnp.zeros((5, 2))}}
    state = {
        "layers.0.weight": np.arange(6, dtype=np.float64).reshape(3, 2),
        "embed.weight": np.ones((5, 2), np.float16),
        "embed.position_ids": np.arange(5),
    }
    params = from_torch(state, target, table=table)
    np.testing.assert_array_equal(params["layers_0"]["kernel"], state["layers.0.weight"].T)
    back = {tensor.name: tensor.read() for tensor in to_torch(params, table=table)}
    assert all(np.array_equal(back[name], state[name]) for name in back) and len(back) == 2


def test_the_bin_that_was_imported_equals_its_tensors():
    _, params = import_diffusers(DATA / "old_pipeline")
    named = {
        DIFFUSERS.canonical(name): array
        for name, array in read_torch(DATA / "old_pipeline" / "diffusion_pytorch_model.bin").items()
    }
    for tensor in to_torch(params):
        np.testing.assert_array_equal(tensor.read(), named[tensor.name])
