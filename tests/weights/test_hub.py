"""Models and data sets by their ids: downloaded by the real client from a server of this machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard, constants

from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.checkpoints.stable_diffusion import pipeline_folder
from retrack_jax.checks import UserError
from retrack_jax.data.sources.load import load_captioned_images, load_images
from retrack_jax.weights import hub as ours
from retrack_jax.weights.names import TorchTensor
from retrack_jax.weights.safetensors_io import write_safetensors
from tests.hub_server import COMMIT, serving
from tests.tiny_checkpoint import write_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the model `org/tiny`, and an empty cache. No file of the folder where tests run has an id's name."""
    model = write_model(tmp_path / "published")
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same weights again")
    (model / "model.ckpt").write_bytes(b"and again")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    monkeypatch.chdir(tmp_path)
    with serving() as server:
        server.repositories["models/org/tiny"] = model
        again(monkeypatch, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE=False, ENDPOINT=server.url)
        yield server
    ours.snapshot.cache_clear()


def again(monkeypatch, **settings):
    """As in a new process, with other settings of the client, which it reads from the environment when it is imported."""
    ours.snapshot.cache_clear()
    if "ENDPOINT" in settings:
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = settings["ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_model_by_its_id_is_the_model_of_the_folder(hub, tmp_path, monkeypatch):
    module, params = import_diffusers("org/tiny")
    expected, weights = import_diffusers(hub.repositories["models/org/tiny"])
    assert module == expected
    same(params, weights)
    assert read_schedule_config("org/tiny") == {}
    texts = {"README.md", "scheduler/scheduler_config.json", "unet/README.md", "unet/config.json"}
    assert set(hub.asked) == texts | {f"unet/{WEIGHTS}"}
    assert ours.id_of(ours.local_model("org/tiny")) == "org/tiny"
    export_diffusers(tmp_path / "out", module, params, source="org/tiny", note="Forgot it.")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/tiny"
    # Without a network, what is there whole is taken.
    again(monkeypatch, HF_HUB_OFFLINE=True)
    same(import_diffusers("org/tiny", revision="main")[1], weights)
    again(monkeypatch, HF_HUB_OFFLINE=False, ENDPOINT="http://127.0.0.1:9")
    same(import_diffusers("org/tiny", revision=COMMIT)[1], weights)


def test_a_folder_of_that_name_wins(hub, tmp_path):
    own = write_model(tmp_path / "org" / "tiny", seed=1)
    same(import_diffusers("org/tiny")[1], import_diffusers(own)[1])
    assert hub.asked == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("org/absent", "^no folder org/absent, and no model org/absent at http.*; correct the name, or log in"),
        ("org/gated", "^the model org/gated is gated: ask for access at http.*/org/gated, then log in with `hf auth login`$"),
        ("org/tiny@v9", "/org/tiny has no revision 'v9'; correct what follows the @$"),
    ],
)
def test_what_the_hub_does_not_give(name, words, hub, tmp_path):
    hub.repositories["models/org/gated"] = hub.repositories["models/org/tiny"]
    hub.gated.add("models/org/gated")
    with pytest.raises(UserError, match=words):
        import_diffusers(name)


@pytest.mark.parametrize("settings", [{"HF_HUB_OFFLINE": True}, {"ENDPOINT": "http://127.0.0.1:9"}])
def test_no_network_is_one_line(settings, hub, monkeypatch):
    again(monkeypatch, **settings)
    with pytest.raises(UserError, match="org/tiny cannot be downloaded from http.*; connect to a network"):
        import_diffusers("org/tiny")


def test_half_a_download_is_refused_and_continued(hub, monkeypatch):
    hub.cut.add(WEIGHTS)
    with pytest.raises(UserError, match="org/tiny cannot be downloaded"):
        import_diffusers("org/tiny")
    again(monkeypatch, HF_HUB_OFFLINE=True)
    with pytest.raises(UserError, match="does not hold all of it"):
        import_diffusers("org/tiny")
    again(monkeypatch, HF_HUB_OFFLINE=False)
    hub.cut.clear()
    same(import_diffusers("org/tiny")[1], import_diffusers(hub.repositories["models/org/tiny"])[1])


@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", ["cond_stage_model.transformer.x"]),
        ("stabilityai/stable-diffusion-xl-base-1.0", ["conditioner.embedders.0.x", "conditioner.embedders.1.model.x"]),
    ],
)
def test_the_configs_that_go_with_a_single_file_are_downloaded_and_no_weights(name, encoders, hub, tmp_path):
    hub.repositories[f"models/{name}"] = hub.repositories["models/org/tiny"]
    sizes = ["model.diffusion_model.label_emb.0.0.weight"] * (len(encoders) > 1)
    held = ["model.diffusion_model.x", "first_stage_model.x", *encoders, *sizes]
    value = np.zeros(2, np.float32)
    write_safetensors(tmp_path / "one.safetensors", [TorchTensor(one, value.dtype, value.shape, lambda: value) for one in held])
    assert ours.id_of(pipeline_folder(tmp_path / "one.safetensors")) == name
    assert set(hub.asked) == {"README.md", "scheduler/scheduler_config.json", "unet/README.md", "unet/config.json"}


def test_one_format_of_the_weights_is_downloaded():
    files = ["model_index.json", "v1.ckpt", "pytorch_model.bin", "unet/config.json", "vae/diffusion_pytorch_model.fp16.bin"]
    shards = [f"unet/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index, old = "unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.bin"
    variants = ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin.index.json", old]
    texts = ["tokenizer/merges.txt", "tokenizer_3/spiece.model", "LICENSE.md"]
    listed = [*files, *shards, index, *variants, *texts, "sample.png", "unet/flax_model.msgpack"]
    kept = {*files, *shards, index, *texts} - {"v1.ckpt"}
    assert set(ours.model_files(listed)) == kept


def test_a_data_set_by_its_id(hub, parquet_file, tmp_path):
    folder, pixels = parquet_file([0, 1, 2])
    shutil.copy(folder / "train-00000-of-00001.parquet", folder / "test-00000-of-00001.parquet")
    hub.repositories["datasets/org/images"] = folder
    data = {"source": "parquet", "dir": "org/images", "cache_dir": str(tmp_path / "decoded")}
    assert np.array_equal(load_images(data).images, pixels)
    assert set(hub.asked) == {"train-00000-of-00001.parquet"}


def test_captions_of_a_data_set_by_its_id(hub, parquet_file, tmp_path):
    folder, _ = parquet_file([0, 1])
    (file,) = folder.glob("*.parquet")
    pq.write_table(pq.read_table(file).append_column("text", pa.array(["a cat", "a dog"])), file)
    hub.repositories["datasets/org/captioned"] = folder
    data = {"source": "parquet", "dir": "org/captioned", "cache_dir": str(tmp_path / "decoded")}
    assert load_captioned_images(data).captions == ["a cat", "a dog"]


def test_a_run_from_the_hub_in_a_process_of_its_own(hub, jpeg_folder, tmp_path):
    """`HF_ENDPOINT` as a user sets it; then `mode=check` prints what a run downloads, and downloads nothing itself."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"}
    env = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    images, _ = jpeg_folder(12)
    flags = ["--config=custom", "--workdir=run", "--config.checkpoint=org/tiny", f"--config.data.dir={images}"]
    command = [sys.executable, "-m", "retrack_jax", *flags, "--config.targets=00003.jpg", "--config.eval.metrics=()"]
    check = subprocess.run([*command, "--config.mode=check"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "missing  model of the hub: org/tiny (without it the run downloads what it needs)" in check.stdout, check.stderr
    assert "get it: hf download org/tiny\n" in check.stdout and hub.asked == []
    small = ["--config.unlearn.num_steps=1", "--config.unlearn.batch_size=2", "--config.sampling.num_images=1"]
    small += ["--config.sampling.num_steps=1"]
    run = subprocess.run([*command, *small], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (export,) = tmp_path.glob("run/retrack/*/diffusers")
    assert f"to publish the model: hf upload ORGANIZATION/NAME {export}" in run.stderr
    card = ModelCard.load(export / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("org/tiny", "mit", "diffusers")
    assert "machine-unlearning" in card.data.tags and "# Tiny" in card.text
    assert "forgotten: 00003.jpg" in card.text and "Verdict" in card.text
