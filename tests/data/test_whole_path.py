"""The paper's configs and custom.py from the command line at toy size: real formats in, a report and a model out."""

import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.checks import UserError
from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import complete
from retrack_jax.diffusion import Schedule
from retrack_jax.main import main
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.problem.problem import Problem, build_problem

TOY = {
    "unlearn.num_steps": 2,
    "unlearn.batch_size": 8,
    "unlearn.accumulation": 1,
    "unlearn.num_neighbors": 3,
    "unlearn.retrack.lam": 0.02,  # in all of them the same step, so that it is compiled once
    "sampling.num_images": 8,
    "sampling.num_steps": 2,
    "sampling.batch_size": 8,
    "eval.metrics": "frequency",
    "eval.frequency_threshold": 1.0,
    "checkpoint_every": 2,
}
NETWORK = {
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@pytest.fixture
def command(tmp_path):
    """Runs a config in a fresh workdir; returns (exit status, workdir)."""

    def run(name, **fields):
        workdir = tmp_path / "run"
        fields = TOY | {"data.cache_dir": tmp_path / "cache"} | {key.replace("__", "."): value for key, value in fields.items()}
        flags = [f"--config.{key}={value}" for key, value in fields.items()]
        return main(["retrack_jax", f"--config=configs/{name}.py", f"--workdir={workdir}", *flags]), workdir

    return run


def write_checkpoint(folder, size, subfolder="", prediction_type="epsilon"):
    """A toy model in diffusers' layout, with a licence: at the root with its scheduler, or in `unet/` beside `scheduler/`."""
    module = UNet2D.from_config({"sample_size": size, "in_channels": 3, "out_channels": 3, **NETWORK})
    shapes = jax.eval_shape(module.init, jax.random.key(1), jnp.zeros((1, size, size, 3)), jnp.zeros((1,), jnp.int32))["params"]
    numbers = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.1 * numbers.standard_normal(leaf.shape, dtype=np.float32), shapes)
    schedule = Schedule.from_config(
        {"num_train_timesteps": 1000, "variance_type": "fixed_large", "prediction_type": prediction_type}
    )
    export_diffusers(folder, module, params, schedule=schedule)
    if subfolder and not (folder / subfolder).exists():
        (folder / subfolder).mkdir()
        (folder / "scheduler").mkdir(exist_ok=True)
        for path in [path for path in folder.iterdir() if path.is_file()]:
            path.rename(folder / ("scheduler" if "scheduler" in path.name else subfolder) / path.name)
    (folder / "LICENSE").write_text("the terms of the toy")
    return folder


def problem_of(config: ConfigDict) -> Problem:
    return build_problem(complete(read_config(config)))


def toy_custom(tmp_path, folder, **model) -> ConfigDict:
    """Returns configs/custom.py on the images of `folder` and a toy checkpoint."""
    config = importlib.import_module("configs.custom").get_config()
    config.data.dir, config.data.cache_dir, config.targets = str(folder), str(tmp_path / "cache"), ("00001.jpg",)
    config.checkpoint = str(write_checkpoint(tmp_path / "model", 16, **model))
    return config


def check_run(workdir, slug, num_forget, num_remain, forgotten=None):
    run = workdir / "retrack" / f"seed0-{slug}"
    metrics = json.loads((run / "metrics.json").read_text())
    data = metrics["provenance"]["data"]
    card = (run / "diffusers" / "README.md").read_text()
    assert f"Unlearned by retrack in 2 steps; forgotten: {forgotten or metrics['target']}." in card
    if metrics["config"]["checkpoint"]:
        assert (run / "diffusers" / "LICENSE").read_text() == "the terms of the toy"
    assert (data["num_forget"], data["num_remain"]) == (num_forget, num_remain)
    assert (run / "report.html").exists() and (workdir / "summary.json").exists()
    before, after = import_diffusers(run / "diffusers"), np.load(run / "samples.npz")["samples"]
    assert after.shape[0] == 8 and before[0].sample_size == after.shape[1]
    return metrics


def test_mnist_tshirt(command, tfds_dir):
    status, workdir = command(
        "mnist_tshirt",
        seeds="0",
        data__dir=tfds_dir,
        data__copies=6,
        data__resolution=16,
        model__sample_size=16,
        **{f"model__{name}": value for name, value in NETWORK.items()},
        pretrain__num_steps=2,
        pretrain__batch_size=8,
        pretrain__warmup_steps=1,
    )
    assert status == 0
    metrics = check_run(workdir, "label_10", 6, 40)
    assert metrics["config"]["unlearn"]["learning_rate"] == 5e-5


def test_cifar10(command, tmp_path, parquet_file):
    folder, pixels = parquet_file(np.arange(40) % 10, size=16)
    checkpoint = write_checkpoint(tmp_path / "model", 16, "unet")
    status, workdir = command("cifar10", data__dir=folder, checkpoint=checkpoint, targets="hf:3")
    assert status == 0
    metrics = check_run(workdir, "hf_3", 1, 39)
    assert metrics["config"]["unlearn"]["learning_rate"] == 2e-5


def test_cifar10_as_tfds_keeps_it(command, tmp_path, tfds_dir):
    """By the official name of the target, which TFDS has under another; one stage, for the others do not see the format."""
    checkpoint = write_checkpoint(tmp_path / "model", 16, "unet")
    fields = {"data__format": "tfds", "data__dir": tfds_dir, "data__resolution": 16, "checkpoint": checkpoint}
    status, workdir = command("cifar10", targets="hf:30003", mode="unlearn", **fields)  # tfds:train_10003 is not among the 50
    assert status == 2
    status, workdir = command("cifar10", targets="hf:40003", mode="unlearn", **fields)
    assert status == 0 and (workdir / "retrack" / "seed0-hf_40003" / "diffusers").is_dir()


@pytest.mark.parametrize("name", ["celebahq", "mnist_tshirt"])
def test_other_formats_of_the_papers_sets(tmp_path, tfds_dir, parquet_file, name):
    """The config's own target, read from the format that is not its default."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.data.cache_dir, config.data.dir = str(tmp_path / "cache"), str(tmp_path / "data")
    if name == "celebahq":
        shutil.copytree(tfds_dir / "celeb_a_hq" / "32", tmp_path / "data" / "celeb_a_hq" / "256")
        config.data.format, config.data.resolution, config.targets = "tfds", 16, ("10001.png",)
        config.checkpoint = str(write_checkpoint(tmp_path / "model", 16))
    else:
        parquet_file(range(10), size=28, channels=1, column="image", folder="data/mnist")
        parquet_file([9, 0, 3], size=28, channels=1, column="image", folder="data/fashion_mnist")
        config.data.format, config.data.copies = "parquet", 6
    config.unlearn.num_neighbors = 3
    problem = problem_of(config)
    target = problem.target(config.targets[0])
    data = problem.codec.forget_data(target, 3, "exact")
    assert (len(target.forget), len(target.unique)) == ((1, 1) if name == "celebahq" else (6, 1))
    assert data.distances.shape == (1, 3) and (data.distances > 0).all()


def test_celebahq(command, tmp_path, jpeg_folder):
    folder, _ = jpeg_folder(12, size=16)
    checkpoint = write_checkpoint(tmp_path / "model", 16)
    status, workdir = command(
        "celebahq", data__dir=folder, data__resolution=16, checkpoint=checkpoint, targets="00003.jpg,00004.jpg"
    )
    assert status == 0
    check_run(workdir, "00003.jpg", 1, 11)
    check_run(workdir, "00004.jpg", 1, 11)


def test_methods_without_neighbors_set_no_bound_on_k(tmp_path, jpeg_folder):
    """The report, at the end of all work, shows as many neighbors as there are."""
    config = importlib.import_module("configs.celebahq").get_config("vanilla")
    config.data.dir, config.data.cache_dir, config.data.resolution = str(jpeg_folder(4)[0]), str(tmp_path / "cache"), 16
    config.checkpoint, config.unlearn.num_neighbors = str(write_checkpoint(tmp_path / "model", 16)), 10
    problem = problem_of(config)
    target, samples = problem.target("00001.jpg"), {"samples": np.zeros((8, 16, 16, 3), np.uint8)}
    shown = problem.evaluation.pictures(target, samples, samples)
    assert shown["neighbors"].shape == (1, 3, 16, 16, 3) and shown["distances"].shape == (1, 3)
    compared = problem.evaluation.comparison_pictures(target, {"vanilla": samples})
    assert compared["neighbors"].shape == (1, 3, 16, 16, 3)


def test_custom(command, tmp_path, jpeg_folder):
    folder, _ = jpeg_folder(8, size=20)
    Image.new("RGB", (50, 30), (9, 99, 200)).save(folder / "wide.png")
    (tmp_path / "forget.txt").write_text("00001.jpg\nwide.png\n")
    checkpoint = write_checkpoint(tmp_path / "model", 16, prediction_type="v_prediction")
    status, workdir = command("custom", data__dir=folder, checkpoint=checkpoint, targets=f"@{tmp_path / 'forget.txt'}")
    assert status == 0
    (run,) = (workdir / "retrack").glob("seed0-forget.txt-*")
    forgotten = "forget.txt (00001.jpg, wide.png)"
    metrics = check_run(workdir, run.name.removeprefix("seed0-"), 2, 7, forgotten)
    assert metrics["config"]["data"]["resolution"] == 16 and metrics["config"]["unlearn"]["learning_rate"] == 2e-5
    assert read_schedule_config(run / "diffusers")["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_what_losses_see_of_a_checkpoint_is_eps(tmp_path, jpeg_folder, prediction_type):
    """Training, sampling and evaluation take the network from `denoiser.eps_fn`; the formulas are those of diffusers' `step`."""
    folder, _ = jpeg_folder(4, size=16)
    config = toy_custom(tmp_path, folder, prediction_type=prediction_type)
    denoiser = problem_of(config).denoiser
    params, t = denoiser.params, jnp.array([3, 700], jnp.int32)
    x_t = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    output = np.float64(jax.jit(denoiser.module.apply)({"params": params}, x_t, t))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[3, 700], None, None, None]
    gamma, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    expected = {
        "epsilon": output,
        "v_prediction": gamma * output + sigma * x_t,
        "sample": (x_t - gamma * output) / sigma,
    }[prediction_type]
    found = np.float64(jax.jit(denoiser.eps_fn)(params, x_t, t))
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_timesteps_are_those_of_the_checkpoints_schedule(tmp_path, jpeg_folder):
    """Unlearning covers all 4000, and 4000 sampling steps are not too many; the config's own schedule has 1000."""
    config = toy_custom(tmp_path, jpeg_folder(4)[0])
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 4000}))
    config.sampling.num_steps = 4000
    problem = problem_of(config)
    how = problem.options.recipe("retrack").step_options(problem.denoiser.schedule.num_train_timesteps, dropout=False)
    assert (how.t_min, how.t_max) == (0, 4000)
    config.unlearn.t_max = 4001
    with pytest.raises(UserError, match="config.unlearn.t_max is 4001; .* at most 4000"):
        problem_of(config)


def test_a_copy_that_remains_is_warned_of(tmp_path, jpeg_folder, caplog):
    folder, _ = jpeg_folder(6, size=16)
    shutil.copy(folder / "00001.jpg", folder / "twin.jpg")
    config = toy_custom(tmp_path, folder)
    config.unlearn.num_neighbors = 3
    problem = problem_of(config)
    with caplog.at_level("WARNING"):
        problem.target("00001.jpg+twin.jpg")
    assert "have a copy" not in caplog.text
    with caplog.at_level("WARNING"):
        problem.target("00001.jpg")
    assert "1 of 1 forgotten images have a copy among the remaining ones (00001.jpg and twin.jpg)" in caplog.text


def test_held_out_images_that_a_checkpoint_may_know_are_warned_of(tmp_path, jpeg_folder, caplog):
    config = toy_custom(tmp_path, jpeg_folder(20)[0])
    config.data.held_out = 0.1
    with caplog.at_level("WARNING"):
        problem = problem_of(config)
    assert caplog.text.count(f"{config.checkpoint} may have been trained on them") == 1 and len(problem.data.held_out) == 2


def test_a_checkpoint_without_a_schedule_is_warned_of(tmp_path, jpeg_folder, caplog):
    config = toy_custom(tmp_path, jpeg_folder(4)[0])
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").unlink()
    with caplog.at_level("WARNING"):
        problem_of(config)
    assert f"no scheduler_config.json in {config.checkpoint}; config.schedule is taken" in caplog.text


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("celebahq", {}, "no config.json in checkpoints/celeba_hq/pretrained/ddpm_ema_celebahq_256"),
        ("celebahq", {"targets": "00099.jpg"}, "no image of celebahq is named '00099.jpg'; did you mean 00009.jpg"),
        ("celebahq", {"targets": "*.jpg"}, "is the whole set of 12 images"),
        ("celebahq", {"unlearn__num_neighbors": 12}, "only 11 images remain"),
        ("celebahq", {"data__dir": "nowhere"}, "no folder nowhere"),
        ("cifar10", {"data__dir": "nowhere"}, "no train-*.parquet in nowhere"),
        ("mnist_tshirt", {"data__dir": "nowhere"}, "tfds build mnist --data_dir=nowhere --file_format=array_record"),
        ("custom", {}, "config.checkpoint is empty"),
    ],
)
def test_a_mistake_that_the_user_can_fix_is_one_line(command, tmp_path, jpeg_folder, capsys, name, fields, message):
    folder, _ = jpeg_folder(12, size=16)
    defaults = {"data__dir": folder, "targets": "00003.jpg"}
    if name == "celebahq":
        defaults["data__resolution"] = 16
    if fields:
        defaults["checkpoint"] = write_checkpoint(tmp_path / "model", 16)
    status, _ = command(name, **(defaults | fields))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and message in errors[0]
