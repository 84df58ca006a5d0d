"""What runs of one workdir have to do with each other: whose recipe counts, whose images, whose retrained model, who writes."""

import fcntl
import json
import os
import subprocess
import sys
from functools import partial

import pytest

from retrack_jax.checks import Diverged, UserError
from retrack_jax.cli import flags as command_line
from retrack_jax.config import build
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.main import main
from retrack_jax.run.one_run import Runner, _check_same_networks
from retrack_jax.run.summary import _finished_runs, finish
from retrack_jax.run.sweep import sweep
from retrack_jax.run.workdir import Workdir
from tests.tiny import flags

CONFIG = "--config=configs/digits_tshirt.py"


def parsed(method, *more):
    return command_line.parse(["retrack_jax", f"{CONFIG}:{method}", *more])[0]


def test_what_the_command_line_gives_wins_over_every_recipe():
    given = ("--config.unlearn.lam=0.25", "--config.unlearn.learning_rate=3e-4")
    for method in ("erasediff", "retrack"):
        under_all = build.effective_config(parsed("all", *given), method).unlearn
        assert (under_all.lam, under_all.learning_rate) == (0.25, 3e-4)
        assert under_all == build.effective_config(parsed(method, *given), method).unlearn


def test_under_all_retracks_lambda_is_not_sisss():
    """One is a weight, the other a mixture; each can be given all the same."""
    given = ("--config.unlearn.lam=0.25", "--config.unlearn.learning_rate=3e-4")
    found = build.effective_config(parsed("all", *given), "siss").unlearn
    assert (found.lam, found.learning_rate) == (0.5, 3e-4)
    assert build.effective_config(parsed("all", "--config.recipes.siss.lam=0.4"), "siss").unlearn.lam == 0.4
    assert parsed("siss", *given).unlearn.lam == 0.25


def test_what_was_read_is_part_of_the_claim(tmp_path):
    workdir = Workdir(tmp_path)
    folder, config = workdir.run("retrack", 0, "a"), {"data": {"source": "folder"}}
    workdir.claim(folder, config, {"images": "some", "weights": "some"})
    workdir.check_claim(folder, config)  # before they are read
    workdir.check_claim(folder, config, {"images": "some", "weights": "some"})
    workdir.check_claim(folder, config, {"images": "some", "newer than the claim": "some"})
    with pytest.raises(UserError, match="holds a run with other weights than the config names now; choose another --workdir"):
        workdir.check_claim(folder, config, {"images": "some", "weights": "others"})


def test_numbers_of_two_networks_never_stand_side_by_side():
    ours = {"fid": {"features_digest": "a" * 64}, "frequency": {}, "sscd": {"features_digest": "b" * 64}}
    _check_same_networks(ours, {"pretrained": ours, "retrained": {"fid": {"features_digest": "a" * 64}, "kid": {}}}, "runs/x")
    other = {"sscd": {"features_digest": "c" * 64}}
    with pytest.raises(UserError, match="sscd of pretrained is by the network cccc.*, that of runs/x by bbbb.*weights_dir"):
        _check_same_networks(ours, {"pretrained": other}, "runs/x")


def test_a_second_recipe_of_a_method_is_refused_for_other_seeds_too(tmp_path, capsys):
    """The summary takes means over a method's runs. A stage that reads no recipe leaves it open."""
    command = ["retrack_jax", CONFIG]
    assert main([*command, *flags(tmp_path, mode="pretrain")]) == 0
    assert main([*command, *flags(tmp_path, unlearn__lam=0.02)]) == 0
    assert main([*command, *flags(tmp_path, unlearn__lam=0.3, seeds=1)]) == 2
    assert "retrack holds another config's run: config.unlearn.lam (0.02 there, 0.3 now)" in capsys.readouterr().err


def test_one_command_at_a_time(tmp_path):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    command = [sys.executable, "-m", "retrack_jax.main", CONFIG, *flags(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and f"another command is at work in --workdir {tmp_path}" in refused.stderr
    assert not list(tmp_path.iterdir())
    os.close(holder)
    with Workdir(tmp_path).alone(), pytest.raises(UserError, match="another command"), Workdir(tmp_path).alone():
        pass
    with Workdir(tmp_path).alone():  # given back
        pass


class Stub(Runner):
    """Runs that are recorded only; those of `neggrad` diverge."""

    ran: list

    def run_one(self, method, spec, seed):
        self.ran.append((method, spec, seed))
        if method == "neggrad":
            raise Diverged("the loss is nan at step 3")

    def finish(self):
        return {"finished": True}


def test_one_that_diverges_stops_no_other(tmp_path):
    config = parsed("all", "--config.seeds=0,1")
    runner = Stub(config, Workdir(tmp_path), lambda: False)
    runner.ran = []
    with pytest.raises(UserError) as error:
        sweep(runner)
    assert len(runner.ran) == 14 and runner.ran[-1][0] == "vanilla"
    assert str(error.value).count("neggrad, target label:10, seed") == 2
    runner.config, runner.ran = parsed("siss"), []
    assert sweep(runner) == {"finished": True}


def test_pretraining_that_diverges_ends_the_sweep(tmp_path, capsys):
    more = {"pretrain.learning_rate": 1e30, "pretrain.warmup_steps": 0, "seeds": (0, 1)}
    assert main(["retrack_jax", CONFIG, *flags(tmp_path, **more)]) == 2
    told = capsys.readouterr().err
    assert told.count("error: pretrain: ") == 1 and "config.pretrain.learning_rate" in told
    assert not list(tmp_path.glob("retrack/seed1*"))


def write_run(workdir, method, target, seed, *, frequency=0.0):
    folder = workdir.run(method, seed, target)
    folder.mkdir(parents=True)
    values = {"frequency": frequency}
    metrics = {"method": method, "seed": seed, "target": target, "steps": 4, "unlearn_seconds": 1.0, "provenance": {}}
    metrics |= {"pretrained": {"frequency": 0.5}, "unlearned": values, "retrained": None}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_the_retrained_model_is_of_the_same_target(tmp_path):
    workdir = Workdir(tmp_path)
    runner = Runner(parsed("retrack"), workdir, lambda: False)
    write_run(workdir, "retrain", "img-1.jpg", 0, frequency=0.25)
    assert runner._retrained_run("1.jpg", 0) is None
    write_run(workdir, "retrain", "1.jpg", 10, frequency=0.125)
    write_run(workdir, "retrain", "1.jpg", 2, frequency=0.0625)
    assert runner._retrained_run("1.jpg", 10)["unlearned"] == {"frequency": 0.125}
    assert runner._retrained_run("1.jpg", 3)["unlearned"] == {"frequency": 0.0625}


def test_a_command_shows_its_own_runs(tmp_path, capsys):
    workdir = Workdir(tmp_path)
    write_run(workdir, "retrack", "a.jpg", 0)

    def pictured(spec):
        raise AssertionError("there is nothing to compare")

    finish(workdir, [("retrack", "b.jpg", 0)], pictured)
    assert capsys.readouterr().out == ""
    finish(workdir, [("retrack", "a.jpg", 0)], pictured)
    shown = capsys.readouterr().out
    assert "Frequency" in shown and "seed0-a.jpg/report.html" in shown
    (tmp_path / "summary.json").write_text("{")  # damaged: it is written again
    assert finish(workdir, [("retrack", "a.jpg", 0)], pictured) == json.loads((tmp_path / "summary.json").read_text())
    write_run(workdir, "siss", "a.jpg", 0)
    before, asked = (tmp_path / "summary.json").read_text(), []
    with pytest.raises(UserError, match="samples.npz is not there"):  # here are no samples; it got as far as to want them
        finish(workdir, [("siss", "a.jpg", 0)], lambda spec: asked.append(spec) or (Folders(), None))
    assert asked == ["a.jpg"]
    # Nothing says yet that the comparison is made, so the next command makes it, whatever page is there of before.
    assert (tmp_path / "summary.json").read_text() == before


def test_a_comparison_that_stands_is_made_again_where_the_report_is_asked_for(tmp_path):
    workdir, asked = Workdir(tmp_path), []
    for method in ("retrack", "siss"):
        write_run(workdir, method, "a.jpg", 0)
    again = partial(finish, workdir, [("siss", "a.jpg", 0)], lambda spec: asked.append(spec) or (Folders(), None))
    (tmp_path / "report.html").write_text("of the numbers that summary.json holds")
    (tmp_path / "summary.json").write_text(json.dumps(summarize(_finished_runs(workdir))))
    again()
    assert not asked
    with pytest.raises(UserError, match="samples.npz is not there"):
        again(redraw=True)
    assert asked == ["a.jpg"]


class Folders:
    """As much of an experiment as says where its samples would lie."""

    def pretrained_folder(self, workdir, target):
        return workdir.pretrained
