"""Unconditional latent pipelines: the whole command on a VQModel's and on an AutoencoderKL's, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from retrack_jax.api import run
from retrack_jax.checkpoints import import_diffusers
from retrack_jax.checkpoints.latent_diffusion import load_autoencoder
from retrack_jax.checks import UserError
from retrack_jax.cli.flags import parse
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.main import main
from retrack_jax.problem.codec import LatentCodec
from retrack_jax.problem.problem import build_problem
from retrack_jax.train.loop import Preempted
from tests.messages import error_of
from tests.metrics.feature_weights import random_state, sscd_shapes
from tests.tiny_checkpoint import write_model
from tests.tiny_latent import flags, write_dit_pipeline, write_pictures, write_pipeline
from tests.tiny_sd import hasty_compiler
from tests.torch_files import save_state


@pytest.fixture(scope="module", autouse=True)
def compiled_in_haste():
    with hasty_compiler():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline with a VQModel, pictures, and a finished run of ReTrack."""
    root = tmp_path_factory.mktemp("ldm")
    write_pipeline(root / "model")
    (root / "model" / "LICENSE").write_text("The license of the source.\n")
    write_pictures(root / "pictures")
    (root / "weights").mkdir()
    save_state(root / "weights" / "sscd_disc_mixup.torchvision.pt", random_state(sscd_shapes()))
    metrics = ("frequency", "nll_bits_per_dim", "forget_loss", "sscd", "relearning_steps")
    assert main(flags(root, eval__metrics=metrics, eval__relearning__steps=(1, 2), eval__relearning__batch_size=4)) == 0
    return root


def folder_of(root, method="retrack"):
    return next((root / "work" / method).glob("seed0-*"))


def problem_of(root, **fields):
    return build_problem(complete(read_config(parse(flags(root, **fields))[0])))


def test_the_run_is_as_one_on_pixels(root):
    metrics = json.loads((folder_of(root) / "metrics.json").read_text())
    assert metrics["verdict"]["kept"] and metrics["steps"] == 4
    assert set(metrics["unlearned"]) == {"frequency", "forget_loss", "sscd", "relearning_steps"}
    assert metrics["provenance"]["absent"] == {
        "nll_bits_per_dim": "it is the likelihood of pixels, and this model's network denoises latents"
    }
    assert "denoises latents" in (folder_of(root) / "report.html").read_text()
    assert metrics["config"]["sampling"]["num_images"] == 6
    assert metrics["unlearned"]["forget_loss"] != metrics["pretrained"]["forget_loss"]


def test_pictures_are_decoded(root):
    samples = np.load(folder_of(root) / "samples.npz")["samples"]
    assert samples.shape == (6, 16, 16, 3) and samples.dtype == np.uint8 and samples.std() > 5
    with np.load(next((root / "work" / "retrack").rglob("sscd-*.npz"))) as kept:
        assert kept["restored"].shape == kept["forgotten"].shape == (1, 16, 16, 3)
        picture = np.asarray(Image.open(root / "pictures" / "3.png"))
        np.testing.assert_array_equal(kept["forgotten"][0], picture)


def test_the_export_is_the_source_with_another_unet(root):
    source, folder = root / "model", folder_of(root) / "diffusers"
    assert json.loads((folder / "model_index.json").read_text()) == json.loads((source / "model_index.json").read_text())
    for path in source.rglob("*"):
        if path.is_file() and path.relative_to(source).parts[0] not in ("unet", "model_index.json"):
            assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes(), path
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()} | {"README.md"}
    assert "forgotten: 3.png" in (folder / "README.md").read_text()
    before, after = (import_diffusers(place)[1] for place in (source, folder))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after))
    assert 0 < max(moved) < 0.1
    # and it is a checkpoint for the next command
    assert isinstance(problem_of(root, checkpoint=folder).codec, LatentCodec)


def test_neighbors_are_the_nearest_latents_and_the_loss_is_on_them(root):
    problem = problem_of(root)
    target = problem.target("3.png")
    module, params, _ = load_autoencoder(root / "model" / "vqvae")
    pixels = pixels_to_model(np.asarray(problem.data.images.images))
    (latents,) = module.apply({"params": params}, pixels, method="encode")
    data = problem.forget_data(target, problem.options.recipe("retrack"), 3)
    row = int(target.unique[0])
    latents = np.asarray(latents)
    distances = np.linalg.norm((latents - latents[row]).reshape(12, -1), axis=1)
    np.testing.assert_array_equal(data.neighbor_positions[0], np.argsort(distances)[1:4])
    np.testing.assert_allclose(data.distances[0], np.sort(distances)[1:4], rtol=1e-4)
    np.testing.assert_allclose(data.forget["x_0"], latents[row : row + 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data.neighbors["x_0"][data.neighbor_rows[0]], latents[data.neighbor_positions[0]], atol=1e-5)
    streamed = problem.gather(target.images, target.remain)(np.array([2, 0]))
    np.testing.assert_allclose(streamed["x_0"], latents[target.remain[[2, 0]]], rtol=1e-4, atol=1e-5)
    assert len(list((root / "cache" / "latents").iterdir())) == 1  # encoded once, by the run before


def test_a_run_that_was_stopped_continues_to_the_same_bits(root, tmp_path):
    argv = [one for one in flags(root, checkpoint_every=1) if not one.startswith("--workdir")]
    config = parse([*argv, f"--workdir={tmp_path / 'work'}"])[0]
    log = folder_of(root).relative_to(root / "work") / "log.jsonl"
    with pytest.raises(Preempted):
        run(config, tmp_path / "work", should_stop=(tmp_path / "work" / log).exists)
    run(config, tmp_path / "work")
    for name in ("samples.npz", "losses.npz", "diffusers/unet/diffusion_pytorch_model.safetensors"):
        assert (folder_of(tmp_path) / name).read_bytes() == (folder_of(root) / name).read_bytes(), name


def test_another_method_unlearns_in_the_latents_of_a_posterior(tmp_path):
    """Of an AutoencoderKL in a folder `vae`; the pictures are a random part, and held-out ones tell membership."""
    write_pipeline(tmp_path / "model", "vae")
    write_pictures(tmp_path / "pictures", 16)
    fields = {"targets": "random:0.2", "data__held_out": 0.2, "unlearn__num_steps": 1}
    argv = flags(tmp_path, eval__metrics=("membership_auc",), **fields)
    argv[1] = "--config=configs/custom.py:neggrad"
    assert main(argv) == 0
    before, after = (import_diffusers(folder)[1] for folder in (tmp_path / "model", folder_of(tmp_path, "neggrad") / "diffusers"))
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after))
    assert 0 < max(moved) < 0.1
    metrics = json.loads((folder_of(tmp_path, "neggrad") / "metrics.json").read_text())
    assert 0 <= metrics["unlearned"]["membership_auc"] <= 1


@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_a_network_that_takes_labels_has_neighbors_with_the_label(tmp_path, network):
    if network == "unet":
        write_pipeline(tmp_path / "model", num_class_embeds=3)
    else:
        write_dit_pipeline(tmp_path / "model")
    for i in range(2):
        write_pictures(tmp_path / "pictures" / f"kind{i}", 8)
        for path in (tmp_path / "pictures" / f"kind{i}").iterdir():
            picture = np.asarray(Image.open(path)) // (i + 1)
            Image.fromarray(picture).save(path)
    fields = {"targets": "kind1/3.png", "data__labels": "folders", "unlearn__num_steps": 1}
    fields["data__null_label"] = 2 if network == "unet" else 3
    argv = flags(tmp_path, eval__metrics=("forget_loss", "label_frequency"), sampling__label_guidance=1.5, **fields)
    assert main(argv) == 0
    problem = problem_of(tmp_path, **fields)
    data = problem.forget_data(problem.target("kind1/3.png"), problem.options.recipe("retrack"), 3)
    names = [problem.data.images.ids[row] for row in data.neighbor_positions[0]]
    assert all(name.startswith("kind1/") for name in names) and data.null_neighbor_rows.shape == (1, 3)
    with np.load(folder_of(tmp_path) / "samples.npz") as archive:
        assert archive["samples"].shape == (6, 16, 16, 3) and set(archive["labels"]) <= {0, 1}
    # The export is the whole pipeline, and a checkpoint for the next command.
    source, folder = tmp_path / "model", folder_of(tmp_path) / "diffusers"
    assert json.loads((folder / "model_index.json").read_text()) == json.loads((source / "model_index.json").read_text())
    assert {path.name for path in folder.iterdir()} == {path.name for path in source.iterdir()} | {"README.md"}
    before, after = (import_diffusers(place)[1] for place in (source, folder))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1
    argv = flags(tmp_path, checkpoint=folder, mode="check", **fields)
    assert main(argv) == 0


def test_a_dit_whose_null_label_is_not_named_is_told_so(tmp_path, caplog):
    write_dit_pipeline(tmp_path / "model")
    write_pictures(tmp_path / "pictures" / "kind0", 8)
    problem_of(tmp_path, targets="kind0/3.png", data__labels="folders")
    assert "config.data.null_label is not set: label 3, for guidance, is neither trained nor unlearned" in caplog.text


def test_what_the_rules_leave_open(root):
    """S is the side of the latents; the pictures have the VAE's factor times the UNet's sample_size; all is exported."""
    options = complete(read_config(parse(flags(root))[0]))
    assert options.data.resolution == 16 and options.export == "pipeline"
    assert options.recipe("retrack").learning_rate == 2e-5
    given = [flag for flag in flags(root) if "accumulation" not in flag]
    assert complete(read_config(parse(given)[0])).recipe("retrack").accumulation == 16 and options.compute.remat
    assert complete(read_config(parse(flags(root, export="unet"))[0])).export == "unet"
    write_model(root / "pixels")
    assert complete(read_config(parse(flags(root, checkpoint=root / "pixels"))[0])).export == "unet"


def test_the_unet_alone_is_exported_without_a_pipeline_of_pixels(root, tmp_path):
    problem = problem_of(root, export="unet")
    problem.denoiser.export(tmp_path / "out", problem.denoiser.params, "note")
    assert (tmp_path / "out" / "config.json").is_file() and not (tmp_path / "out" / "model_index.json").exists()


# ---- What is refused, each in one line


@pytest.fixture
def spoiled(root, tmp_path):
    """A copy of the pipeline that a test may spoil, and the pictures."""
    shutil.copytree(root / "model", tmp_path / "model")
    (tmp_path / "pictures").symlink_to(root / "pictures")
    return tmp_path


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "part, fields, words",
    [
        ("vqvae", {"norm_type": "spatial"}, "the VQModel config's norm_type is 'spatial'; only \"group\" is supported"),
        ("vqvae", {"double_z": True}, "the VQModel config has an option 'double_z' that VQModel does not know"),
        ("vqvae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "an entry of down_block_types is 'AttnDownEnc"),
        ("vqvae", {"scaling_factor": 0.0}, "scaling_factor is 0.0; it must be a number in (0, inf]"),
        ("vqvae", {"num_vq_embeddings": 0}, "num_vq_embeddings is 0; it must be a whole number from 1"),
        ("vqvae", {"_class_name": "AutoencoderTiny"}, "is 'AutoencoderTiny'; choose one of VQModel, AutoencoderKL"),
        ("vqvae", {"vq_embed_dim": 4}, "quantize.embedding.weight [32, 3] instead of [32, 4]"),
        ("unet", {"time_embedding_type": "fourier"}, "takes log(t) and divides by t"),
    ],
)
def test_configs_that_are_not_supported(spoiled, capsys, part, fields, words):
    change(spoiled / "model" / part / "config.json", **fields)
    assert words in error_of(capsys, flags(spoiled))


@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize(
    "lost, words",
    [
        ("vqvae", "has no vqvae/config.json; download the whole pipeline"),
        ("vqvae/config.json", "has no vqvae/config.json; download the whole pipeline"),
        ("vqvae/diffusion_pytorch_model.safetensors", {"run": "no weights in", "check": "is missing: vqvae weights"}),
    ],
)
def test_half_a_pipeline(spoiled, capsys, lost, words, mode):
    path = spoiled / "model" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (words if isinstance(words, str) else words[mode]) in error_of(capsys, flags(spoiled, mode=mode))


def test_a_pipeline_without_its_schedule(spoiled, capsys):
    shutil.rmtree(spoiled / "model" / "scheduler")
    assert "no scheduler/scheduler_config.json next to" in error_of(capsys, flags(spoiled))


def test_latents_that_do_not_fit_the_unet(tmp_path, root, capsys):
    (tmp_path / "pictures").symlink_to(root / "pictures")
    write_pipeline(tmp_path / "model", in_channels=4, out_channels=4)
    error = error_of(capsys, flags(tmp_path))
    assert "the latents of" in error and "have 3 channels and the network takes 4; choose the data and the checkpoint" in error


@pytest.mark.parametrize(
    "side, words",
    [(15, "are 15x15; the VAE needs sides that 2 divides"), (18, "are 9x9; the network needs sides that 2 divides")],
)
def test_pictures_of_the_wrong_size(root, capsys, side, words):
    error = error_of(capsys, flags(root, data__resolution=side, data__cache_dir=root / f"cache{side}"))
    assert words in error and "set config.data.resolution" in error


def test_gray_pictures_say_how_to_color_them(root, tmp_path, capsys):
    error = error_of(capsys, flags(root, data__channels=1, data__cache_dir=tmp_path))
    assert "have 1 channels, the VAE takes 3; set config.data.channels=3" in error


def test_a_single_file_is_no_export_of_it(root, tmp_path):
    with pytest.raises(UserError, match="config.export is single_file, which only Stable Diffusion has"):
        problem_of(root, export="single_file")
