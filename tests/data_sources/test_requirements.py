"""config.mode=check: what is found, what is missing, and what gets it; and the recipe of custom data."""

import hashlib
import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest

from retrack_jax import recipe
from retrack_jax.checks import UserError
from retrack_jax.data.requirements import print_requirements, requirements
from retrack_jax.main import main

CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def printed(config) -> str:
    file = io.StringIO()
    print_requirements(config.to_dict(), recipe.unset(config), file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The configs' paths are relative to where the command runs: here, an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("celebahq", ["hf download google/ddpm-ema-celebahq-256 --local-dir checkpoints/celeba_hq", "-datasets'"]),
        ("cifar10", ["ddpm_ema_cifar10.zip", "hf download uoft-cs/cifar10 --repo-type=dataset --local-dir datasets/cifar10"]),
        ("mnist_tshirt", ["tfds build mnist ", "tfds build fashion_mnist "]),
    ],
)
def test_missing_files_come_with_their_commands(name, commands):
    text = printed(config_of(name))
    for command in commands:
        assert any(line.strip().startswith("get it: ") and command in line for line in text.splitlines()), text
    assert not any(line.startswith("found") and "weights-" not in line for line in text.splitlines())


def test_mnist_needs_two_networks_and_files_of_the_same_weights_do_as_well(tmp_path):
    config = config_of("mnist_tshirt")
    config.eval.weights_dir = str(tmp_path / "weights")
    lines = printed(config).splitlines()
    (row,) = [row for row, line in enumerate(lines) if line.startswith("missing  classifier MNIST ResNet-18")]
    assert "data-unlearning-in-diffusion-models-checkpoints" in lines[row + 1] and "classifiers/mnist.pt" in lines[row + 1]
    assert any("feature network inception" in line for line in lines)
    config.eval.score_network = "features"
    assert "mnist.pt" not in printed(config)
    config.eval.metrics, config.eval.score_network = ("inception_score",), "mnist_resnet"
    assert "feature network inception" not in printed(config)

    (tmp_path / "weights").mkdir()
    for name in ("mnist.pt", "sscd_disc_mixup.classy.pt"):
        (tmp_path / "weights" / name).write_bytes(b"weights")
    config.eval.metrics = ("inception_score", "sscd")
    text = printed(config)
    assert "found    classifier MNIST ResNet-18" in text and "found    feature network sscd" in text


def test_digits_need_nothing():
    assert printed(config_of("digits_tshirt")) == "nothing is needed: data and model are made here\n"


def test_found_files_have_size_and_digest(tmp_path):
    config = config_of("celebahq")
    folder = tmp_path / config.checkpoint
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"weights")
    images = tmp_path / config.data.dir
    images.mkdir(parents=True)
    for row in range(3):
        (images / f"{row:05d}.jpg").write_bytes(b"x" * (row + 1))
    found = {item.description: item for item in requirements(config.to_dict())}
    weights = found["model weights"]
    assert weights.found and weights.size == 7 and weights.digest == hashlib.sha256(b"weights").hexdigest()
    assert found["images"].files == 3 and found["images"].size == 6
    (images / "00000.jpg").write_bytes(b"xx")
    assert requirements(config.to_dict())[2].digest != found["images"].digest
    assert "found    images: " in printed(config)


def test_hidden_files_do_not_count_and_links_do(tmp_path):
    config = config_of("celebahq")
    images, elsewhere = tmp_path / config.data.dir, tmp_path / "elsewhere"
    for folder in (images, elsewhere):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(b"x")
        (folder / ".b.jpg").write_bytes(b"x")
    (images / "link").symlink_to(elsewhere)
    (found,) = [item for item in requirements(config.to_dict()) if item.description == "images"]
    assert found.files == 2


def test_prepared_tfds_is_found(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    text = printed(config_of("mnist_tshirt"))
    assert "found    TFDS mnist" in text and "found    TFDS fashion_mnist" in text


def test_rules_meet_the_official_recipes():
    cifar, celeba = config_of("cifar10").unlearn, config_of("celebahq").unlearn
    for official, chosen in ((cifar, recipe.rules(50_000, 32)), (celeba, recipe.rules(30_000, 256))):
        assert {name: official[name] for name in chosen} == chosen
    assert recipe.rules(5, 64)["num_neighbors"] == 5


def test_custom_recipe_fills_only_what_is_not_given(tmp_path, jpeg_folder):
    folder, _ = jpeg_folder(6)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"sample_size": 64}')
    config = config_of("custom")
    for field, value in (("checkpoint", str(tmp_path / "model")), ("targets", ("00001.jpg",))):
        config[field] = value
    config.data.dir = str(folder)
    config.unlearn.lam = 0.3
    chosen = recipe.complete(config)
    assert chosen.data.resolution == 64 and chosen.unlearn.num_neighbors == 5 and chosen.unlearn.lam == 0.3
    assert chosen.unlearn.learning_rate == pytest.approx(1.26e-5)
    assert recipe.complete(chosen) is chosen and recipe.complete(config_of("cifar10")).unlearn.lam == 0.02


def custom_config(tmp_path, source, path, targets, model='{"sample_size": 16}'):
    """configs/custom.py with a model folder that holds its config alone."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(model)
    config = config_of("custom")
    config.checkpoint, config.targets = str(tmp_path / "model"), targets
    config.data.source, config.data.dir, config.data.cache_dir = source, str(path), str(tmp_path / "cache")
    return config


def test_custom_k_is_at_most_what_remains_of_the_largest_target(tmp_path, jpeg_folder):
    folder, _ = jpeg_folder(12)
    (tmp_path / "forget.txt").write_text("".join(f"{row:05d}.jpg\n" for row in range(5)))
    config = custom_config(tmp_path, "folder", folder, ("00001.jpg", f"@{tmp_path / 'forget.txt'}"))
    assert recipe.complete(config).unlearn.num_neighbors == 7
    config.data.held_out = 0.25
    config.targets = ("*[02].jpg",)
    assert recipe.complete(config).unlearn.num_neighbors < 9  # three are held out, and some of the others forgotten
    config.targets = ("nobody.jpg",)
    with pytest.raises(UserError, match="no image of folder, training part is named 'nobody.jpg'"):
        recipe.complete(config)


@pytest.mark.parametrize("source", ["npz", "parquet"])
def test_custom_takes_arrays_and_tables_too(tmp_path, parquet_file, source):
    path, pixels = parquet_file(np.arange(8) % 4, size=16)
    if source == "npz":
        path = tmp_path / "images.npz"
        np.savez(path, images=pixels, labels=np.arange(8) % 4)
    chosen = recipe.complete(custom_config(tmp_path, source, path, ("label:1",)))
    assert chosen.unlearn.num_neighbors == 6 and chosen.data.resolution == (0 if source == "npz" else 16)


def test_a_model_config_that_is_no_object_is_one_line(tmp_path, jpeg_folder):
    config = custom_config(tmp_path, "folder", jpeg_folder(3)[0], ("00001.jpg",), model="[16]")
    with pytest.raises(UserError, match="config.json holds no JSON object"):
        recipe.complete(config)


@pytest.mark.parametrize(
    ("field", "message"), [("checkpoint", "checkpoint is empty"), ("targets", "targets is empty"), ("dir", "dir is empty")]
)
def test_custom_says_which_flag_is_missing(tmp_path, jpeg_folder, field, message):
    config = config_of("custom")
    config.checkpoint, config.targets, config.data.dir = "model", ("a",), str(jpeg_folder(2)[0])
    if field == "dir":
        config.data.dir = ""
    else:
        config[field] = type(config[field])()
    with pytest.raises(UserError, match=message):
        recipe.complete(config)


@pytest.mark.parametrize("name", ["cifar10", "celebahq"])
def test_configs_without_a_pretraining_recipe_need_a_checkpoint(name):
    config = config_of(name)
    config.checkpoint = ""
    with pytest.raises(UserError, match=f"config.checkpoint is empty; {name} has no pretraining recipe"):
        recipe.complete(config)
    assert "missing  setting: config.checkpoint\n" in printed(config)


class TestCommand:
    """config.mode=check as a newcomer types it."""

    def check(self, name="custom", **fields):
        flags = [f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()]
        return main(["retrack_jax", f"--config={CONFIGS / name}.py", "--config.mode=check", *flags])

    def custom(self, tmp_path, jpeg_folder, **fields):
        folder, _ = jpeg_folder(4)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text('{"sample_size": 16}')
        (tmp_path / "model" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
        return self.check(**({"checkpoint": tmp_path / "model", "data__dir": folder, "targets": "00001.jpg"} | fields))

    @pytest.mark.parametrize("name", ["custom", "celebahq", "cifar10", "mnist_tshirt", "digits_tshirt"])
    def test_nothing_set_and_nothing_there_is_a_list_and_no_error(self, name, capsys):
        assert self.check(name) == 0
        out, err = capsys.readouterr()
        assert "error" not in err and out.splitlines()[-1].endswith(("missing", "are made here"))

    def test_custom_names_the_three_flags(self, capsys):
        assert self.check() == 0
        lines = capsys.readouterr().out.splitlines()
        for field in ("config.checkpoint", "config.data.dir", "config.targets"):
            assert lines[lines.index(f"missing  setting: {field}") + 1].startswith("         ")

    def test_all_there(self, tmp_path, jpeg_folder, capsys):
        assert self.custom(tmp_path, jpeg_folder) == 0
        missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
        assert len(missing) == 2 and all("feature network" in line and "left out" in line for line in missing)

    @pytest.mark.parametrize(
        ("target", "shown"),
        [
            ("00001.jpeg", "did you mean 00001.jpg"),
            ("00001.jpg+00009.jpg", "no image of folder is named '00009.jpg'"),
            ("q*", "matches 'q*'"),
            ("label:3", "has no labels"),
            ("*", "is the whole set of 4 images"),
            ("@forget.txt", "missing  list of targets: forget.txt"),
        ],
    )
    def test_a_mistyped_target_is_missing(self, tmp_path, jpeg_folder, capsys, target, shown):
        assert self.custom(tmp_path, jpeg_folder, targets=target) == 0
        out = capsys.readouterr().out
        assert shown in out and out.splitlines()[-1].endswith("3 missing")

    def test_a_list_is_found_with_its_digest(self, tmp_path, jpeg_folder, capsys):
        (tmp_path / "a+b.txt").write_text("00001.jpg\n00003.jpg\n")
        assert self.custom(tmp_path, jpeg_folder, targets="@a+b.txt") == 0
        assert "found    list of targets: a+b.txt (20 B, sha256" in capsys.readouterr().out

    def test_values_are_checked_too(self, tmp_path, jpeg_folder, capsys):
        assert self.custom(tmp_path, jpeg_folder, unlearn__lam="1.5") == 2
        assert "error: config.unlearn.lam" in capsys.readouterr().err
        assert self.check("celebahq", unlearn__lam="1.5") == 2
        assert "error: config.unlearn.lam" in capsys.readouterr().err
