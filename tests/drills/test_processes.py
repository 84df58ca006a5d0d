"""Devices and processes: how the work is laid out changes nothing but the rounding, and nothing hangs.

The norms are method.md's: float32 sums in another order move AdamW, so trees are compared by norm, not element by element.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.drills import cli

STEPS = 5


def tree_norm(tree):
    return np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in tree.values()))


def distances(one, other, start):
    """Returns (‖a - b‖/‖a‖, ‖a - b‖/‖a - start‖) over whole trees."""
    assert one.keys() == other.keys() == start.keys() and one
    difference = tree_norm({name: one[name].astype(np.float64) - other[name] for name in one})
    moved = tree_norm({name: one[name].astype(np.float64) - start[name] for name in one})
    return difference / tree_norm(one), difference / moved


def largest(one, other, count=3):
    """Returns the leaves that differ most, with their share of the squared distance: where to look when a bound is missed."""
    squares = {name: np.square(one[name].astype(np.float64) - other[name]).sum() for name in one}
    total = sum(squares.values()) or 1.0
    return [f"{name} {squares[name] / total:.0%}" for name in sorted(squares, key=squares.get, reverse=True)[:count]]


def params(folder, part="params"):
    return {name: leaf for name, leaf in cli.last_state(folder).items() if name.startswith(f"['{part}']")}


@pytest.fixture(scope="module")
def attentive(cache, tmp_path_factory):
    """The workdir of a pretrained model with attention."""
    workdir = tmp_path_factory.mktemp("attentive") / "work"
    cli.succeed(cli.flags(workdir, mode="pretrain", **cli.ATTENTION), cache)
    return workdir


@pytest.mark.parametrize("method", ["retrack", "siss"])
def test_one_by_four_equals_two_by_two_equals_accumulation(method, attentive, cache, tmp_path):
    """From one pretrained model: 1 process x 4 devices, 2 x 2, 1 x 1 with 4 microbatches, 5 steps each."""
    layouts = {
        "one_by_four": lambda arguments: cli.run_processes(1, 4, arguments, cache, tmp_path / "logs14"),
        "two_by_two": lambda arguments: cli.run_processes(2, 2, arguments, cache, tmp_path / "logs22"),
        "accumulated": lambda arguments: cli.run([*arguments, "--config.unlearn.accumulation=4"], cache),
    }
    runs = {}
    for name, launch in layouts.items():
        workdir = tmp_path / name
        workdir.mkdir()
        shutil.copytree(attentive / "pretrained", workdir / "pretrained")
        done = launch(cli.flags(workdir, method, mode="unlearn", unlearn__num_steps=STEPS, **cli.ATTENTION))
        logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("logs22/*"))
        assert done.returncode == 0, f"{name}: {done.stderr[-4000:]}\n{logs}"
        assert cli.checkpoint_steps(workdir / method / "seed0-label_10")[-1] == STEPS
        runs[name] = params(workdir / method / "seed0-label_10")
    start = params(attentive / "pretrained")
    for name in ("two_by_two", "accumulated"):
        whole, relative = distances(runs["one_by_four"], runs[name], start)
        where = largest(runs["one_by_four"], runs[name])
        print(f"{method}, one_by_four and {name}: {whole:.1e} of the weights, {relative:.1e} of the way, most in {where}")
        assert whole <= 1e-6 and relative <= 1e-3, (name, whole, relative, where)


def test_two_processes_do_all_stages_and_process_0_writes(cache, tmp_path):
    """Pretraining to the report on 2 x 2 devices; images and metrics equal those of one process up to rounding."""
    metrics = {"eval__metrics": "('frequency','fid','forget_loss')"}  # FID's images are shared between the processes
    done = cli.run_processes(2, 2, cli.flags(tmp_path / "two", **metrics), cache, tmp_path / "logs")
    assert done.returncode == 0, done.stderr[-4000:] + (tmp_path / "logs" / "process1.log").read_text()[-4000:]
    run = tmp_path / "two" / "retrack" / "seed0-label_10"
    assert {"metrics.json", "samples.npz", "samples.png", "report.html", "log.jsonl", "config.json"} <= {
        p.name for p in run.iterdir()
    }
    assert not cli.leftovers(tmp_path / "two")
    assert "report:" in done.stdout and "report:" not in (tmp_path / "logs" / "process1.log").read_text()
    shutil.copytree(tmp_path / "two" / "features", tmp_path / "one" / "features")  # the classifier behind FID, trained once
    cli.succeed(cli.flags(tmp_path / "one", **metrics), cache)
    runs = tmp_path / "one" / "retrack" / "seed0-label_10", run
    values = [json.loads((folder / "metrics.json").read_text()) for folder in runs]
    for model in ("pretrained", "unlearned"):
        one, two = (value[model] for value in values)
        assert set(one) == {"frequency", "fid", "forget_loss"} and one == pytest.approx(two, rel=1e-3)
    with (
        np.load(tmp_path / "one" / "pretrained" / "samples.npz") as one,
        np.load(tmp_path / "two" / "pretrained" / "samples.npz") as two,
    ):
        gap = np.abs(one["samples"].astype(int) - two["samples"].astype(int))
    assert (gap <= 1).all() and (gap == 0).mean() > 0.98


def test_a_failure_of_one_process_ends_both_in_seconds(finished, cache, tmp_path):
    """Process 0 alone cannot write the summary, for a folder lies in its place; nobody waits for it."""
    shutil.copytree(finished / "pretrained" / "checkpoints", tmp_path / "work" / "pretrained" / "checkpoints")
    (tmp_path / "work" / "summary.json").mkdir()
    began = time.monotonic()
    arguments = cli.flags(tmp_path / "work", "pretrained")
    done = cli.run_processes(2, 1, arguments, cache, tmp_path / "logs")
    other = (tmp_path / "logs" / "process1.log").read_text()
    assert done.returncode == 2 and "summary.json" in done.stderr, (done.returncode, done.stderr[-3000:])
    assert done.stderr.count("error: ") == 1 and "error: another process" in other
    assert "Traceback" not in done.stderr + other and time.monotonic() - began < cli.patience(150)


def test_another_device_count_restores_the_checkpoint(finished, cache, tmp_path):
    """A run saved on one device goes on on 2 x 2."""
    workdir = tmp_path / "work"
    shutil.copytree(finished / "pretrained", workdir / "pretrained")
    cli.succeed(cli.flags(workdir, mode="unlearn"), cache)
    steps = cli.checkpoint_steps(workdir / "retrack" / "seed0-label_10")
    shutil.rmtree(workdir / "retrack" / "seed0-label_10" / "checkpoints" / str(steps[-1]))
    done = cli.run_processes(2, 2, cli.flags(workdir, mode="unlearn"), cache, tmp_path / "logs")
    assert done.returncode == 0, done.stderr[-4000:] + (tmp_path / "logs" / "process1.log").read_text()[-4000:]
    whole, _ = distances(
        params(finished / "retrack" / "seed0-label_10"),
        params(workdir / "retrack" / "seed0-label_10"),
        params(finished / "pretrained"),
    )
    assert cli.checkpoint_steps(workdir / "retrack" / "seed0-label_10")[-1] == steps[-1] and whole <= 1e-6


def test_sigterm_on_two_processes_saves_once(cache, tmp_path):
    """Both get the signal, at slightly different steps of theirs; they save the same step and both exit with 75."""
    script = ["bash", str(cli.ROOT / "launch" / "cpu_processes.sh"), "--logs", str(tmp_path / "logs"), "2"]
    arguments = cli.flags(tmp_path / "work", pretrain__num_steps=2000, checkpoint_every=0)
    env = cli.environment(cache, PYTHON=sys.executable, GRACE_SECONDS=15)
    process = subprocess.Popen([*script, *arguments], cwd=cli.ROOT, env=env, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "work" / "pretrained" / "log.jsonl"
    cli.wait_for_log(log, process)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=cli.patience(60))
    assert process.returncode == 75, errors[-3000:]
    other = (tmp_path / "logs" / "process1.log").read_text()
    assert "preempted: " in errors and "preempted: " in other and "Traceback" not in errors + other
    assert len(cli.checkpoint_steps(tmp_path / "work" / "pretrained")) == 1


def test_a_workdir_that_is_not_shared_is_refused(cache, tmp_path):
    """Each process is given a folder of its own under the same name, as two hosts with local disks would."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/bash\nmkdir -p {tmp_path}/host$RETRACK_PROCESS\n"
        f'exec {cli.command([])[0]} "${{@//WORKDIR/{tmp_path}/host$RETRACK_PROCESS}}"\n'
    )
    stand_in.chmod(0o755)
    script = ["bash", str(cli.ROOT / "launch" / "cpu_processes.sh"), "--logs", str(tmp_path / "logs"), "2"]
    env = cli.environment(cache, PYTHON=stand_in, GRACE_SECONDS=10)
    done = subprocess.run(
        [*script, *cli.flags("WORKDIR")], cwd=cli.ROOT, env=env, capture_output=True, text=True, timeout=cli.patience(120)
    )
    both = done.stderr + (tmp_path / "logs" / "process1.log").read_text()
    assert done.returncode == 2 and both.count("error: ") == 2 and "not shared" in both and "Traceback" not in both


def test_four_devices_on_two_cores_never_deadlock(finished, cache, tmp_path):
    """200 steps of each method that takes steps, four forced devices."""
    shutil.copytree(finished / "pretrained", tmp_path / "work" / "pretrained")
    began = time.monotonic()
    arguments = cli.flags(
        tmp_path / "work", "all", mode="unlearn", unlearn__num_steps=200, checkpoint_every=0, log_every=50
    )
    done = cli.run_processes(1, 4, arguments, cache, tmp_path / "logs", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for method in ("vanilla", "neggrad", "erasediff", "siss", "siss_no_is", "retrack"):
        assert cli.checkpoint_steps(tmp_path / "work" / method / "seed0-label_10")[-1] == 200
    print(f"200 steps of each method on four devices: {time.monotonic() - began:.0f} s")
