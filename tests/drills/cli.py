"""The real command line with a toy model, for drills: seconds a run, all stages, embedded data."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PRETRAIN_STEPS, UNLEARN_STEPS = 8, 6
TINY = {
    "model.block_out_channels": "(8,)",
    "model.down_block_types": "('DownBlock2D',)",
    "model.up_block_types": "('UpBlock2D',)",
    "model.add_attention": "False",
    "model.norm_num_groups": "4",
    "pretrain.num_steps": PRETRAIN_STEPS,
    "pretrain.batch_size": 16,
    "unlearn.num_steps": UNLEARN_STEPS,
    "unlearn.batch_size": 16,
    "unlearn.num_neighbors": 5,
    "unlearn.neighbor_backend": "exact",
    "sampling.num_steps": 4,
    "sampling.num_images": 48,
    "sampling.batch_size": 16,
    "eval.metrics": "('frequency',)",
    "checkpoint_every": 2,
    "log_every": 1,
}
# What makes it two blocks wide with attention in the inner one; as changes to `flags`.
ATTENTION = {
    "model__block_out_channels": "8,16",
    "model__down_block_types": "('DownBlock2D','AttnDownBlock2D')",
    "model__up_block_types": "('AttnUpBlock2D','UpBlock2D')",
    "model__add_attention": "True",
}


def flags(workdir, method="retrack", **changes) -> list[str]:
    """Returns the command's flags: the toy run in `workdir`, with `changes` to config fields (`unlearn__num_steps=3`)."""
    fields = {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}
    config = f"--config={ROOT}/configs/digits_tshirt.py:{method}"
    return [config, f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in fields.items())]


def environment(cache, **more) -> dict[str, str]:
    """Returns the environment of a command, with nothing of this process's devices.

    All commands share compiled programs and matplotlib's list of fonts, in `cache`. Each has a new home folder, and so its own
    caches of images and samples. XLA does not optimize here, because compiling takes most of the drills' time.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "RETRACK_", "SLURM_"))}
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return {
        **clean, "HOME": tempfile.mkdtemp(prefix="home-", dir=cache), "JAX_COMPILATION_CACHE_DIR": str(Path(cache) / "xla"),
        "MPLCONFIGDIR": str(Path(cache) / "matplotlib"), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": quick,
        "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **{name: str(value) for name, value in more.items()},
    }  # fmt: skip


def patience(seconds: float) -> float:
    """Returns how long to wait for what should take `seconds`: longer where other work crowds this machine's cores."""
    return seconds * max(1.0, 2.0 * os.getloadavg()[0] / os.cpu_count())


def wait_for_log(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Waits until the log at `path` has a record, or the folder is there; asserts that the process still runs then."""
    deadline = time.monotonic() + patience(seconds)
    while not (path.exists() and path.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, f"it ended with status {process.returncode} before the moment to stop it"
    assert path.exists() and path.stat().st_size, f"no record in {path} after {patience(seconds):.0f} s"


def command(arguments) -> list[str]:
    """Returns the command line that runs this interpreter on `arguments`."""
    return [sys.executable, "-m", "retrack_jax.main", *map(str, arguments)]


def run(arguments, cache, *, timeout=400, **more) -> subprocess.CompletedProcess:
    """Runs the command to its end."""
    return subprocess.run(
        command(arguments),
        cwd=ROOT,
        env=environment(cache, **more),
        capture_output=True,
        text=True,
        timeout=patience(timeout),
    )


def succeed(arguments, cache, **more) -> subprocess.CompletedProcess:
    """Runs the command and asserts status 0."""
    done = run(arguments, cache, **more)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def run_processes(count, devices, arguments, cache, logs, *, timeout=400, **more) -> subprocess.CompletedProcess:
    """Runs the command as `count` processes of `devices` CPU devices each, by the launch script that users have."""
    script = [
        "bash",
        str(ROOT / "launch" / "cpu_processes.sh"),
        "--devices",
        str(devices),
        "--logs",
        str(logs),
        str(count),
    ]
    env = environment(cache, PYTHON=sys.executable, GRACE_SECONDS=10, **more)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*script, *map(str, arguments)], cwd=ROOT, env=env, start_new_session=True, **pipes)
    try:
        out, errors = process.communicate(timeout=patience(timeout))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the script alone would leave its processes behind
        raise
    return subprocess.CompletedProcess(script, process.returncode, out, errors)


def in_parallel(*calls):
    """Runs functions in threads and returns their results in order; the first exception is raised."""
    results, errors = [None] * len(calls), []

    def keep(index, call):
        try:
            results[index] = call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=keep, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def checkpoint_steps(folder) -> list[int]:
    """Returns the steps of the whole checkpoints below `folder/checkpoints`, in order."""
    return sorted(int(path.name) for path in (Path(folder) / "checkpoints").iterdir() if path.name.isdigit())


def last_state(folder) -> dict[str, np.ndarray]:
    """Returns the newest checkpoint's arrays by path, as they lie on the disk."""
    import jax
    import orbax.checkpoint as ocp

    path = Path(folder) / "checkpoints" / str(checkpoint_steps(folder)[-1]) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), checkpointer.metadata(path).item_metadata.tree)
        tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def outcome(workdir, run="retrack/seed0-label_10") -> dict:
    """Returns all that a run computed, for comparing two runs bit by bit; times are left out."""
    workdir = Path(workdir)
    metrics = json.loads((workdir / run / "metrics.json").read_text())
    metrics.pop("unlearn_seconds")
    found = {"metrics": metrics}
    for folder in ("pretrained", run):
        found[folder] = last_state(workdir / folder)
        with np.load(workdir / folder / "samples.npz") as archive:
            found[f"{folder}/samples"] = {name: archive[name] for name in archive.files}
        log = [json.loads(line) for line in (workdir / folder / "log.jsonl").read_text().splitlines()]
        found[f"{folder}/log"] = [{name: value for name, value in record.items() if name != "time"} for record in log]
    return found


def assert_same(one, other, where="") -> None:
    """Asserts that two outcomes are the same, arrays bit by bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, err_msg=where)
        assert one.dtype == other.dtype, where
    else:
        assert one == other, where


def leftovers(workdir) -> list[str]:
    """Returns what looks temporary below `workdir`, also while a run makes and removes files there."""
    signs = (".tmp", "orbax-checkpoint-tmp", ".probe", ".shared-token", "samples-parts")
    found = (os.path.join(root, name) for root, folders, files in os.walk(workdir) for name in (*folders, *files))
    return [path for path in found if any(sign in os.path.basename(path) for sign in signs)]
