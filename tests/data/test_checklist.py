"""config.mode=check: what is found, what is missing, and what gets it."""

import hashlib

import pytest

from retrack_jax.checks import UserError
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.data.checklist import requirements
from retrack_jax.main import main
from tests.data.checking import CONFIGS, config_of, printed


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The configs' paths are relative to where the command runs: here, an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("celebahq", ["hf download google/ddpm-ema-celebahq-256 --local-dir checkpoints/celeba_hq", "-datasets && "]),
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
    config.eval.metrics = ("label_share",)
    assert "missing  classifier MNIST ResNet-18" in printed(config)

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
    (again,) = [item for item in requirements(config.to_dict()) if item.description == "images"]
    assert again.digest != found["images"].digest
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
    config = config_of("cifar10")
    config.data.format, config.data.dir, config.data.split = "tfds", str(tfds_dir), "validation"
    assert "missing  TFDS cifar10, validation" in printed(config)
    config.data.split = "test"
    assert "found    TFDS cifar10, test" in printed(config)
    config.data.source, config.data.format = "tfds", ""
    assert "missing  setting: config.data.tfds_name" in printed(config)


def test_parquet_files_are_those_that_are_read(parquet_file):
    config = config_of("cifar10")
    folder, _ = parquet_file(range(3), name="test-00000-of-00001.parquet")
    config.data.dir = str(folder)
    assert "missing  training images (parquet)" in printed(config)
    config.data.split = "test"
    assert "found    test images (parquet)" in printed(config)


@pytest.mark.parametrize("name", ["cifar10", "celebahq"])
def test_configs_without_a_pretraining_recipe_need_a_checkpoint(name):
    config = config_of(name)
    config.checkpoint = ""
    with pytest.raises(UserError, match=f"config.checkpoint is empty; {name} has no pretraining recipe"):
        complete(read_config(config))
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
        (tmp_path / "model" / "scheduler_config.json").write_text("{}")
        return self.check(**({"checkpoint": tmp_path / "model", "data__dir": folder, "targets": "00001.jpg"} | fields))

    @pytest.mark.parametrize("name", ["custom", "celebahq", "cifar10", "mnist_tshirt", "digits_tshirt"])
    def test_nothing_set_and_nothing_there_is_a_list_and_status_2(self, name, capsys):
        assert self.check(name) == (0 if name == "digits_tshirt" else 2)
        out, err = capsys.readouterr()
        assert ("is missing: " in err) == (name != "digits_tshirt") and err.count("error: ") <= 1
        assert out.splitlines()[-1].endswith(("missing", "are made here"))

    def test_what_one_command_gets_stands_above_it(self, capsys):
        """Each command once, and of the many files behind it the first few."""
        assert self.check("stable_diffusion") == 2
        lines = capsys.readouterr().out.splitlines()
        commands = [line for line in lines if "get it: " in line]
        assert len(commands) == len(set(commands)) and len(lines) <= 8 * len(commands) + 8
        assert any(line.startswith("missing  and ") for line in lines)

    def test_custom_names_the_three_flags(self, capsys):
        assert self.check() == 2
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
        assert self.custom(tmp_path, jpeg_folder, targets=target) == 2
        out = capsys.readouterr().out
        assert shown in out and out.splitlines()[-1].endswith("3 missing")

    @pytest.mark.parametrize(
        ("exclude", "shown"),
        [
            ("00001.jpg", "names 00001.jpg, which config.data.exclude leaves out"),
            ("00009.jpg", "config.data.exclude is '00009.jpg', read as a target is: no image of folder is named '00009.jpg'"),
        ],
    )
    def test_a_target_that_is_excluded_is_missing(self, tmp_path, jpeg_folder, capsys, exclude, shown):
        assert self.custom(tmp_path, jpeg_folder, targets="00001.jpg", data__exclude=exclude) == 2
        assert shown in capsys.readouterr().out

    def test_a_list_is_found_with_its_digest(self, tmp_path, jpeg_folder, capsys):
        (tmp_path / "a+b.txt").write_text("00001.jpg\n00003.jpg\n")
        assert self.custom(tmp_path, jpeg_folder, targets="@a+b.txt") == 0
        assert "found    list of targets: a+b.txt (20 B, sha256" in capsys.readouterr().out

    def test_values_are_checked_too(self, tmp_path, jpeg_folder, capsys):
        assert self.custom(tmp_path, jpeg_folder, unlearn__retrack__lam="1.5") == 2
        assert "error: config.unlearn.retrack.lam" in capsys.readouterr().err
        assert self.check("celebahq", unlearn__retrack__lam="1.5") == 2
        assert "error: config.unlearn.retrack.lam" in capsys.readouterr().err
