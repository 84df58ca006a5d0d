"""Several processes: all stages, a failure of one, a signal, a workdir that is not shared; and nothing hangs."""

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


def test_two_processes_do_all_stages_and_process_0_writes(cache, tmp_path):
    """Pretraining to the report on 2 x 2 devices; equal to one process up to rounding."""
    metrics = {"eval__metrics": "('frequency','fid','forget_loss')"}  # FID's images are shared between the processes
    arguments = cli.flags(tmp_path / "two", **metrics)
    done = cli.run_processes(2, 2, arguments, cache, tmp_path / "logs")
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


def terminate_two(arguments, sign, cache, logs):
    """Sends SIGTERM to two processes once the file `sign` is there; asserts that both say so and that the status is 75."""
    script = ["bash", str(cli.ROOT / "launch" / "cpu_processes.sh"), "--logs", str(logs), "2"]
    env = cli.environment(cache, PYTHON=sys.executable, GRACE_SECONDS=15)
    process = subprocess.Popen([*script, *arguments], cwd=cli.ROOT, env=env, stderr=subprocess.PIPE, text=True)
    cli.wait_for_log(sign, process)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=cli.patience(60))
    assert process.returncode == 75, errors[-3000:]
    other = (logs / "process1.log").read_text()
    assert "preempted: " in errors and "preempted: " in other and "Traceback" not in errors + other


def test_sigterm_on_two_processes_saves_once(cache, tmp_path):
    """Both get the signal, at slightly different steps of theirs; they save the same step, long before a log is due."""
    work = tmp_path / "work"
    arguments = cli.flags(work, pretrain__num_steps=2000, checkpoint_every=7, log_every=2000)
    terminate_two(arguments, work / "pretrained" / "checkpoints" / "7", cache, tmp_path / "logs")
    last = cli.checkpoint_steps(work / "pretrained")[-1]
    assert last % 10 == 0 and last < 2000


def test_sigterm_on_two_processes_while_they_sample(cache, tmp_path):
    """They stop after the same batch, and what was drawn until then is kept: no image is missing before the last one."""
    work, batch = tmp_path / "work", 16
    arguments = cli.flags(work, "pretrained", sampling__num_images=500 * batch, sampling__batch_size=batch)
    parts = work / "pretrained" / "samples-parts" / "samples"
    terminate_two(arguments, parts, cache, tmp_path / "logs")
    found = sorted(tuple(map(int, path.stem.removeprefix("part-").split("-"))) for path in parts.glob("part-*.npz"))
    assert found == [(first, batch // 2) for first in range(0, batch * (len(found) // 2), batch // 2)]
    assert 0 < len(found) < 2 * 500 and not (work / "pretrained" / "samples.npz").exists()


def on_two_hosts(arguments, cache, tmp_path):
    """Runs two processes, HOST in the arguments of each a folder of its own, as local disks are; returns status and errors."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/bash\nmkdir -p {tmp_path}/host$RETRACK_PROCESS\n"
        f'exec {cli.command([])[0]} "${{@//HOST/{tmp_path}/host$RETRACK_PROCESS}}"\n'
    )
    stand_in.chmod(0o755)
    script = ["bash", str(cli.ROOT / "launch" / "cpu_processes.sh"), "--logs", str(tmp_path / "logs"), "2"]
    env = cli.environment(cache, PYTHON=stand_in, GRACE_SECONDS=10)
    done = subprocess.run([*script, *arguments], cwd=cli.ROOT, env=env, capture_output=True, text=True, timeout=cli.patience(120))
    return done.returncode, done.stderr + (tmp_path / "logs" / "process1.log").read_text()


def test_a_workdir_that_is_not_shared_is_refused(cache, tmp_path):
    status, both = on_two_hosts(cli.flags("HOST"), cache, tmp_path)
    assert status == 2 and both.count("error: ") == 2 and "not shared" in both and "Traceback" not in both


def test_hosts_with_other_images_do_not_train_together(cache, tmp_path):
    for host, count in enumerate((64, 56)):
        (tmp_path / f"host{host}").mkdir()
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
        np.savez(tmp_path / f"host{host}" / "images.npz", images=images)
    changes = {"data__source": "npz", "data__dir": "HOST/images.npz", "data__copies": 0, "targets": "0"}
    arguments = cli.flags(tmp_path / "work", "vanilla", **changes)
    status, both = on_two_hosts(arguments, cache, tmp_path)
    assert status == 2 and both.count("error: the processes differ in the files: images (") == 2, both[-3000:]
    assert "Traceback" not in both and not list((tmp_path / "work").glob("pretrained/*"))


def test_four_devices_on_two_cores_never_deadlock(finished, cache, tmp_path):
    """200 steps of each method that takes steps, four forced devices."""
    shutil.copytree(finished / "pretrained", tmp_path / "work" / "pretrained")
    began = time.monotonic()
    arguments = cli.flags(tmp_path / "work", "all", mode="unlearn", unlearn__num_steps=200, checkpoint_every=0, log_every=50)
    done = cli.run_processes(1, 4, arguments, cache, tmp_path / "logs", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for method in ("vanilla", "neggrad", "erasediff", "siss", "siss_no_is", "retrack"):
        assert cli.checkpoint_steps(tmp_path / "work" / method / "seed0-label_10")[-1] == 200
    print(f"200 steps of each method on four devices: {time.monotonic() - began:.0f} s")
