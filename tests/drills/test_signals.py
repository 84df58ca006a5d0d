"""Whenever a signal comes, the command ends with a status of its own and without a traceback; what was saved is whole."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.drills import cli
from tests.drills.test_kills import wait_for_saves

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and /dev/full are Linux's")
HOURS = 3600


def start(workdir, cache, **changes):
    return subprocess.Popen(
        cli.command(cli.flags(workdir, **changes)), cwd=cli.ROOT, env=cli.environment(cache),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in a script's background the tests may not hear it
    )  # fmt: skip


def wait_until_ready(process) -> None:
    """Waits until SIGTERM is held back or handled, within some 30 ms of the start: before that, the interpreter itself starts."""
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigBlk", "SigCgt"))]
        if sum(masks) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_the_command_starts(number, cache, tmp_path):
    """While it restarts itself, reads the flags, imports jax and sets it up."""
    for index, delay in enumerate((0.0, 0.02, 0.1, 0.3, 1.0)):
        process = start(tmp_path / f"work{index}", cache)
        wait_until_ready(process)
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=cli.patience(60))
        assert process.returncode == 75, (delay, errors[-3000:])
        assert errors.splitlines()[-1].startswith("preempted: ") and "Traceback" not in errors


def test_one_ctrl_c_saves_and_clocks_that_jump_change_nothing(finished, cache, tmp_path):
    """The same command continues with the same bits, although all that was saved is from a later time than now."""
    work = tmp_path / "work"
    process = start(work, cache)
    cli.wait_for_log(work / "pretrained" / "log.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=cli.patience(60))
    assert process.returncode == 75 and errors.splitlines()[-1].startswith("preempted: pretrain stopped at step"), errors[-3000:]
    assert "Ctrl-C again" in errors and "Traceback" not in errors
    future = time.time() + 24 * HOURS
    for path in work.rglob("*"):
        os.utime(path, (future, future))
    cli.succeed(cli.flags(work), cache)
    cli.assert_same(cli.outcome(finished), cli.outcome(work))


def test_ctrl_c_again_and_again_during_a_save(finished, cache, tmp_path):
    work = tmp_path / "work"
    process = start(work, cache)
    assert wait_for_saves(work, process, 2), process.communicate()
    began = time.monotonic()
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert time.monotonic() - began < cli.patience(2)
    _, errors = process.communicate()
    assert process.returncode == 1 and errors.splitlines()[-1].startswith("stopped at once; "), errors[-3000:]
    assert "Traceback" not in errors
    cli.succeed(cli.flags(work), cache)
    cli.assert_same(cli.outcome(finished), cli.outcome(work))


def test_ctrl_c_at_the_very_end(copy_of, finished, cache):
    """After the last line: the run is done, whatever moment of the interpreter's end the signal meets."""
    work = copy_of(finished)
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2):
        process = start(work, cache)
        while not (line := process.stdout.readline()).startswith("report:"):
            assert line, process.communicate()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=cli.patience(60))
        assert process.returncode == 0 and "Traceback" not in errors, (delay, process.returncode, errors[-3000:])


@pytest.mark.parametrize("streams", [">&- 2>&-", "<&- >/dev/full 2>&1"])
def test_a_whole_run_that_can_print_nothing(streams, finished, cache, tmp_path):
    """Nor can it write to TMPDIR."""
    work = tmp_path / "work"
    shutil.copytree(finished / "pretrained" / "checkpoints", work / "pretrained" / "checkpoints")
    shutil.copy(finished / "pretrained" / "log.jsonl", work / "pretrained")
    line = ["sh", "-c", f'exec "$@" {streams}', "sh", *cli.command(cli.flags(work))]
    environment = cli.environment(cache, TMPDIR="/dev/full")
    assert subprocess.run(line, cwd=cli.ROOT, env=environment, timeout=cli.patience(120)).returncode == 0
    cli.assert_same(cli.outcome(finished), cli.outcome(work))
