"""Generators of commands that a user could mistype: each is wrong, in a way that the user can mend.

A case is (what is wrong, flags). The base is the toy run, so a mistake that is not found in time costs seconds, not hours.
"""

import importlib.util
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from tests.drills import cli

WORK = "WORKDIR"  # stands for a fresh workdir in the flags
DEVICES = 4  # of the test process: batch sizes must divide by it


def _config():
    spec = importlib.util.spec_from_file_location("digits_config", cli.ROOT / "configs" / "digits_tshirt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _leaves(config, prefix=""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


FIELDS = dict(_leaves(_config()))
words = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12)
below_one = st.integers(-(10**6), 0)
negative = st.floats(-1e6, -1e-9) | st.sampled_from([float("nan"), float("inf"), -float("inf")])
undivided = st.integers(0, 40).map(lambda n: DEVICES * n + 1 + n % (DEVICES - 1))

COUNTS = """pretrain.num_steps unlearn.num_steps pretrain.batch_size unlearn.batch_size pretrain.accumulation unlearn.accumulation
    unlearn.num_neighbors sampling.num_steps sampling.num_images sampling.batch_size log_every schedule.num_train_timesteps
    eval.nll_probes eval.grid_images model.layers_per_block model.norm_num_groups""".split()
AMOUNTS = """pretrain.eps unlearn.eps pretrain.weight_decay unlearn.weight_decay pretrain.clip_norm unlearn.clip_norm
    unlearn.siss.scale unlearn.siss.share unlearn.erasediff.eta pretrain.learning_rate unlearn.learning_rate
    eval.frequency_threshold""".split()
CHOICES = """
    method mode pretrain.learning_rate_schedule unlearn.learning_rate_schedule unlearn.retrack.lam_schedule
    unlearn.neighbor_backend unlearn.retain_loss sampling.sampler eval.features eval.fid_resize
    eval.fid_reference compute.dtype data.source data.crop schedule.beta_schedule schedule.prediction_type
    schedule.variance_type schedule.timestep_spacing
""".split()
RANGES = {
    "checkpoint_every": below_one.filter(lambda n: n < 0),
    "pretrain.warmup_steps": below_one.filter(lambda n: n < 0),
    "unlearn.forget_batch_size": below_one.filter(lambda n: n < 0) | undivided,
    "pretrain.batch_size": undivided,
    "unlearn.batch_size": undivided,
    "unlearn.retrack.lam": st.floats(1.0001, 1e6) | negative,
    "unlearn.siss.mixture": st.floats(1.0001, 1e6) | negative,
    "pretrain.b1": st.floats(1.0001, 10) | negative,
    "unlearn.b2": st.floats(1.0001, 10) | negative,
    "pretrain.ema_max_decay": st.floats(1.0001, 10) | negative,
    "unlearn.num_neighbors": st.integers(1798, 10**9),
    "unlearn.t_min": st.integers(1000, 10**6) | below_one.filter(lambda n: n < 0),
    "unlearn.t_max": below_one | st.integers(1001, 10**6),
    "sampling.num_steps": st.integers(1001, 10**6),
    "data.copies": below_one,
    "data.resolution": below_one.filter(lambda n: n < 0),
    "schedule.beta_start": negative | st.floats(1.0, 100.0),
    "schedule.beta_end": negative | st.floats(1.0, 100.0),
    "seeds": st.sampled_from(["()", "(-1,)", "('a',)", "(2147483648,)", "(0.5,)"]),
    "targets": st.sampled_from(
        ["()", "label:99", "label:seven", "label:", "@no-such-list.txt", "*zebra*", "+", "digit-9999", "a,,b", "*"]
    ),
    "eval.metrics": words.map(lambda word: f"('{word}_x',)"),
    "model.block_out_channels": st.sampled_from(["8", "(8,)", "(8,0)", "(8,-16)", "(8,15)", "(8,16,32)", "('a','b')"]),
    "model.down_block_types": words.map(lambda word: f"('{word}','DownBlock2D')"),
    "model.norm_num_groups": st.sampled_from([3, 5, 7, 64]),
    "model.in_channels": st.sampled_from([0, 3, -1]),
    "checkpoint": words.map(lambda word: f"no-such-folder-{word}"),
    "save_float": words,
    "compute.remat": words,
}  # fmt: skip


def _with(workdir, **changes):
    return cli.flags(workdir, **{**cli.ATTENTION, **{name.replace(".", "__"): value for name, value in changes.items()}})


def _set(workdir, field, value):
    return f"{field}={value}", [flag for flag in _with(workdir, **{field: value})]


def _typo(name, position, letter):
    position %= len(name)
    return name[:position] + letter + name[position + 1 :]


def field_values(workdir):
    """A field that exists with a value that does not fit."""
    kinds = [
        (name, value)
        for name, value in FIELDS.items()
        if isinstance(value, (int, float)) and name in {*COUNTS, *AMOUNTS, *RANGES}
    ]
    return st.one_of(
        st.tuples(st.sampled_from(COUNTS), below_one),
        st.tuples(st.sampled_from(AMOUNTS), negative),
        st.tuples(st.sampled_from(CHOICES), words.map(lambda word: f"{word}_x")),
        st.sampled_from(sorted(RANGES)).flatmap(lambda name: st.tuples(st.just(name), RANGES[name])),
        st.tuples(st.sampled_from([name for name, _ in kinds]), words | st.just("") | st.just("1.2.3") | st.just("(1,2)")),
    ).map(lambda pair: _set(workdir, *pair))


def flag_mistakes(workdir):
    """Flags, fields, files and methods that do not exist."""
    base = cli.flags(workdir, **cli.ATTENTION)
    letters = st.sampled_from("qxz7")
    typos = st.builds(_typo, st.sampled_from(sorted(FIELDS)), st.integers(0, 99), letters).filter(lambda name: name not in FIELDS)
    config = base[0].removeprefix("--config=").partition(":")[0]
    return st.one_of(
        typos.map(lambda name: (f"field {name}", [*base, f"--config.{name}=1"])),
        words.map(lambda word: (f"flag {word}", [*base, f"--{word}x=1"])),
        words.map(lambda word: (f"stray {word}", [*base, word])),
        words.map(lambda word: (f"method {word}", [f"--config={config}:{word}_x", *base[1:]])),
        st.builds(_typo, st.just(config), st.integers(len(config) - 12, len(config) - 4), letters).map(
            lambda path: (f"file {path}", [f"--config={path}", *base[1:]])
        ),
        st.sampled_from([[], base[1:], [base[0], *base], ["--config="], ["--config"], [*base, "--workdir"]]).map(
            lambda f: (f"flags {f[:2]}", f)
        ),
        st.sampled_from(["unlearn", "unlearn.siss", "model", "unlearn.lam", "unlearn.retrack.lam.x", "", "."]).map(
            lambda n: (f"field {n!r}", [*base, f"--config.{n}=1"])
        ),
    )


def _npz(arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _zip(name, text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


def data_files(workdir, folder: Path):
    """Files and folders of data that are missing, empty, cut, of another format, shape or kind; written below `folder`."""
    images = np.zeros((8, 8, 8, 1), np.uint8)
    whole = _npz({"images": images})
    contents = st.one_of(
        st.binary(max_size=200),
        st.integers(1, len(whole) - 1).map(lambda n: whole[:n]),
        st.sampled_from(
            [
                _npz({"images": images.astype(np.float32)}), _npz({"images": images[:0]}), _npz({"images": images[..., 0, 0]}),
                _npz({"images": np.zeros((4, 8, 8, 5), np.uint8)}), _npz({"pictures": images}), _zip("a.npy", "text"), _npz({}),
                _npz({"images": np.zeros((4, 7, 9, 1), np.uint8)}), b"PAR1", b"PAR1PAR1", b"\x89PNG\r\n\x1a\n",
            ]
        ),
    )  # fmt: skip
    names = st.sampled_from(["a.npz", "a.parquet", "a.png", "a.jpg", "a.txt", "train-images-idx3-ubyte.gz"])
    sources = st.sampled_from(["npz", "parquet", "folder", "cifar10", "mnist_tshirt", "celebahq", "tfds", "idx"])

    def write(source, name, data, point_at_file, number=[0]):  # noqa: B006, the counter is meant to live on
        number[0] += 1
        place = folder / f"data{number[0]}"
        place.mkdir(parents=True)
        (place / name).write_bytes(data)
        at = place / name if point_at_file else place
        return f"{source} from {name}, {len(data)} bytes", given(source, at)

    def given(source, at):
        fields = {"data.source": source, "data.dir": at, "data.cache_dir": folder / "cache"}
        return _with(workdir, **fields | {"data.copies": 0})  # the config's are of a T-shirt, which few sources add

    missing = sources.map(lambda s: (f"{s} from nowhere", given(s, folder / "no" / "such")))
    nothing = sources.filter(lambda s: s not in ("tfds", "mnist_tshirt")).map(lambda s: (f"{s} without a folder", given(s, "")))
    return st.one_of(st.builds(write, sources, names, contents, st.booleans()), missing, nothing)


def checkpoint_folders(workdir, folder: Path):
    """Folders of pretrained models that are empty, cut, or of another kind."""
    good = {"_class_name": "UNet2DModel", "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16]}
    configs = st.one_of(
        st.binary(max_size=60),
        st.sampled_from(
            [
                json.dumps(value).encode()
                for value in (
                    good,
                    {},
                    [],
                    {**good, "class_embed_type": "timestep"},
                    {**good, "no_such_field": 1},
                    {**good, "block_out_channels": "x"},
                )
            ]
        ),
    )
    weights = st.one_of(st.none(), st.binary(max_size=100), st.just((2).to_bytes(8, "little") + b"{}"))

    def write(config, data, suffix, number=[0]):  # noqa: B006, the counter is meant to live on
        number[0] += 1
        place = folder / f"checkpoint{number[0]}"
        place.mkdir(parents=True)
        (place / "config.json").write_bytes(config)
        if data is not None:
            (place / f"diffusion_pytorch_model.{suffix}").write_bytes(data)
        return f"checkpoint {config[:40]}", _with(workdir, checkpoint=place)

    return st.builds(write, configs, weights, st.sampled_from(["bin", "safetensors"]))


def cases(folder: Path):
    """Any of the above; generated files lie below `folder`."""
    fields = field_values(WORK)
    return st.one_of(fields, fields, flag_mistakes(WORK), data_files(WORK, folder), checkpoint_folders(WORK, folder))
