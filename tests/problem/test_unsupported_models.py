"""Checkpoints of kinds that are not supported are refused by their configs, before images and weights are read."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.main import main
from retrack_jax.problem.denoiser import check_image_model
from tests.tiny_checkpoint import write_model
from tests.tiny_latent import write_pipeline


def folder_of(root, **configs):
    for part, config in configs.items():
        (root / part).mkdir(parents=True, exist_ok=True)
        (root / part / "config.json").write_text(json.dumps(config))
    return root


PIXELS = {"_class_name": "UNet2DModel", "sample_size": 8}


@pytest.mark.parametrize(
    "configs, words",
    [
        ({"unet": PIXELS, "movq": {"_class_name": "VQModel", "norm_type": "spatial"}}, "norm_type is 'spatial'; only .group"),
        ({"unet": PIXELS, "vae": {"_class_name": "AutoencoderTiny"}}, "is 'AutoencoderTiny'; choose one of VQModel, Autoenc"),
        ({"unet": PIXELS | {"time_embedding_type": "fourier"}}, "takes log.t. and divides by t, so t = 0 gives NaN"),
    ],
)
def test_each_kind_is_named(configs, words, tmp_path):
    folder = folder_of(tmp_path / "model", **configs)
    with pytest.raises(UserError, match=words):
        check_image_model(str(folder))
    with pytest.raises(UserError, match=words):
        check_image_model(str(folder / "unet"))


def test_models_that_are_supported_and_folders_without_a_model_pass(tmp_path):
    check_image_model(str(folder_of(tmp_path / "a", unet=PIXELS, scheduler={})))
    check_image_model(str(folder_of(tmp_path / "b", **{".": PIXELS})))
    check_image_model(str(folder_of(tmp_path / "c", unet=PIXELS | {"num_class_embeds": 10, "class_embed_type": "timestep"})))
    check_image_model(str(tmp_path / "nowhere"))


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def command(tmp_path, checkpoint, images, *more):
    fields = ["unlearn.num_steps=1", "unlearn.batch_size=4", "unlearn.accumulation=1", "sampling.num_images=4"]
    fields += ["sampling.batch_size=4", "sampling.num_steps=2", "eval.metrics=('frequency',)", "targets=3.png"]
    fields += [f"checkpoint={checkpoint}", f"data.dir={images}", f"data.cache_dir={tmp_path / 'cache'}", *more]
    flags = [f"--config.{field}" for field in fields]
    return main(["retrack_jax", "--config=configs/custom.py", f"--workdir={tmp_path / 'run'}", *flags])


@pytest.mark.parametrize("mode", ["check", "run"])
def test_an_autoencoder_that_is_not_supported_ends_the_command_with_one_line(mode, tmp_path, images, capsys):
    config = write_pipeline(tmp_path / "model") / "vqvae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_type": "spatial"}))
    assert command(tmp_path, tmp_path / "model", images, f"mode={mode}") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "norm_type" in errors[0]
    assert not list((tmp_path / "run").rglob("model_index.json"))


def test_a_model_that_is_not_square_takes_images_of_its_size_alone(tmp_path, images, capsys):
    checkpoint = write_model(tmp_path / "model", sample_size=[8, 16])
    assert command(tmp_path, checkpoint, images) == 0
    samples = next((tmp_path / "run/retrack").rglob("samples.npz"))
    assert np.load(samples)["samples"].shape == (4, 8, 16, 3)
    shutil.rmtree(tmp_path / "run")
    write_model(checkpoint, sample_size=[16, 8])
    assert command(tmp_path, checkpoint, images) == 2
    assert "are 8x16 and the network's sample_size is (16, 8)" in capsys.readouterr().err
