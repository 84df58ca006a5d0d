"""Stopped at any moment and started again, a run ends with the same bits as one that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.drills import cli

KILLS, CHAINS, SAVE_KILLS = 20, 2, 8
ALL_KILLS = int(os.environ.get("ALL_KILLS", 8))  # 50 take about twelve minutes


def start(workdir, cache, **changes):
    return start_command(cli.flags(workdir, **changes), cache)


def start_command(arguments, cache):
    return subprocess.Popen(
        cli.command(arguments), cwd=cli.ROOT, env=cli.environment(cache),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def half_written(workdir) -> set[str]:
    """Returns the files and checkpoints that lie there under the name that they have while they are written."""
    return {path for path in cli.leftovers(workdir) if path.endswith(".tmp") or "orbax-checkpoint-tmp" in os.path.basename(path)}


def wait_for_saves(workdir, process, count: int) -> bool:
    """Waits until `count` files or checkpoints were seen half written, and returns at once; False: the run ended before."""
    before, seen = half_written(workdir), set()
    while process.poll() is None:
        seen |= half_written(workdir) - before
        if len(seen) >= count:
            return True
        time.sleep(0.003)
    return False


def test_kill_9_during_saves(finished, cache, tmp_path):
    """Each kill falls as soon as a checkpoint, the samples or a report is seen half written; at most of them it still is."""
    expected, moments, workdir, ends, hits = cli.outcome(finished), random.Random(7), tmp_path / "work", 0, 0
    for _ in range(SAVE_KILLS):
        process = start(workdir, cache)
        if wait_for_saves(workdir, process, moments.randint(1, 6)):
            process.kill()
            process.communicate()
            hits += bool(half_written(workdir))
        else:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
            cli.assert_same(expected, cli.outcome(workdir))
            shutil.rmtree(workdir)
            ends += 1
    cli.succeed(cli.flags(workdir), cache)
    cli.assert_same(expected, cli.outcome(workdir))
    assert not cli.leftovers(workdir)
    print(f"{hits} of {SAVE_KILLS - ends} kills left something half written, {ends} runs ended before theirs")
    assert hits >= SAVE_KILLS // 2


def test_kill_9_at_random_moments(finished, cache, tmp_path):
    """Uniform over the length of a whole run; a run that ends before its kill is checked and started afresh."""
    expected = cli.outcome(finished)
    began = time.monotonic()
    cli.succeed(cli.flags(tmp_path / "timed"), cache)
    length = time.monotonic() - began

    def chain(index):
        moments, workdir, kills, ends = random.Random(index), tmp_path / f"chain{index}", 0, 0
        while kills < KILLS // CHAINS:
            process = start(workdir, cache)
            try:
                _, errors = process.communicate(timeout=moments.uniform(0.2, 1.1) * length)
                assert process.returncode == 0, errors[-3000:]
                cli.assert_same(expected, cli.outcome(workdir))
                assert not cli.leftovers(workdir)
                shutil.rmtree(workdir)
                ends += 1
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
        cli.succeed(cli.flags(workdir), cache)
        cli.assert_same(expected, cli.outcome(workdir))
        assert not cli.leftovers(workdir)
        return kills, ends

    print(
        f"a run takes {length:.1f} s; (kills, runs that ended before theirs):",
        cli.in_parallel(*(lambda i=i: chain(i) for i in range(CHAINS))),
    )


@pytest.mark.timeout(3600)
def test_kills_over_every_stage_of_all_methods(cache, tmp_path):
    """A sweep of every method with metrics of features: killed again and again as it writes, each time where it has come to."""
    whole, workdir, moments, kills, stages = tmp_path / "undisturbed", tmp_path / "work", random.Random(11), 0, set()

    def sweep(folder):
        return cli.flags(folder, "all", eval__metrics="fid,forget_loss", eval__features="digits", unlearn__num_steps=4)

    cli.succeed(sweep(whole), cache)
    while kills < ALL_KILLS:
        process = start_command(sweep(workdir), cache)
        if wait_for_saves(workdir, process, moments.randint(1, 2 + 120 // ALL_KILLS)):
            process.kill()
            process.communicate()
            kills += 1
            stages.add(len(list(workdir.glob("*/*/metrics.json"))))
        else:
            _, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
            break
    cli.succeed(sweep(workdir), cache)
    runs = sorted(str(path.parent.relative_to(whole)) for path in whole.glob("*/*/metrics.json"))
    assert len(runs) >= 7 and not cli.leftovers(workdir)
    for run in runs:
        metrics = (json.loads((folder / run / "metrics.json").read_text()) for folder in (whole, workdir))
        one, other = (found | {"unlearn_seconds": 0} for found in metrics)
        cli.assert_same(one, other, run)
        if (whole / run / "checkpoints").exists():  # those of retrained models lie elsewhere
            cli.assert_same(cli.outcome(whole, run), cli.outcome(workdir, run), run)
    print(f"{kills} kills, after {sorted(stages)} finished runs")
    assert len(stages) >= min(4, ALL_KILLS // 3)


@pytest.mark.parametrize("when", ["pretrained", "retrack/seed0-label_10"])
def test_sigterm_saves_and_exits_with_75(when, cache, tmp_path):
    """The signal comes once the stage has logged a step; the rest of a long run is then still to do."""
    long = (
        dict(pretrain__num_steps=300, checkpoint_every=0)
        if when == "pretrained"
        else dict(unlearn__num_steps=300, checkpoint_every=0)
    )
    process = start(tmp_path / "work", cache, **long)
    log = tmp_path / "work" / when / "log.jsonl"
    cli.wait_for_log(log, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=cli.patience(60))
    assert process.returncode == 75, errors[-3000:]
    last = errors.strip().splitlines()[-1]
    assert last.startswith("preempted: ") and "Traceback" not in errors
    (step,) = cli.checkpoint_steps(tmp_path / "work" / when)
    assert 0 < step < 300 and f"step {step} of 300" in last
    assert not cli.leftovers(tmp_path / "work")


def test_a_sweep_restarts_at_the_run_that_was_cut(finished, cache, tmp_path):
    """Two seeds; killed once the second one's first step is logged, the first one is not touched again."""
    sweep = dict(seeds="0,1", unlearn__num_steps=40)
    process = start(tmp_path / "work", cache, **sweep)
    log = tmp_path / "work" / "retrack" / "seed1-label_10" / "log.jsonl"
    cli.wait_for_log(log, process)
    process.kill()
    process.communicate()
    first = tmp_path / "work" / "retrack" / "seed0-label_10"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert (first / "report.html") in before
    cli.succeed(cli.flags(tmp_path / "work", **sweep), cache)
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
    assert (log.parent / "report.html").exists()
