"""What runs of one workdir have to do with each other: whose recipe counts, whose images, whose retrained model, who writes."""

import fcntl
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from retrack_jax.checks import Diverged, UserError
from retrack_jax.cli import flags as command_line
from retrack_jax.config.reading import read_config
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.main import main
from retrack_jax.run import sweep as sweep_module
from retrack_jax.run.context import RunContext
from retrack_jax.run.one_run import Run, _check_same_networks, _retrained_run
from retrack_jax.run.reads import evaluation_reads, model_reads, sample_reads
from retrack_jax.run.summary import _finished_runs, summarize_workdir
from retrack_jax.run.workdir import Workdir
from tests.tiny import flags

CONFIG = "--config=configs/digits_tshirt.py"


def parsed(method, *more):
    return read_config(command_line.parse(["retrack_jax", f"{CONFIG}:{method}", *more])[0])


def test_the_more_specific_field_wins_on_the_command_line_too(capsys):
    given = ("--config.unlearn.learning_rate=3e-4", "--config.unlearn.siss.learning_rate=7e-4")
    for method in ("all", "siss"):
        options = parsed(method, *given)
        assert options.recipe("retrack").learning_rate == 3e-4 and options.recipe("siss").learning_rate == 7e-4
    assert options.recipe("erasediff").learning_rate == 5e-5  # the config's own for that method
    capsys.readouterr()
    parsed("erasediff", given[0])
    note = "note: config.unlearn.erasediff.learning_rate=5e-05 wins over --config.unlearn.learning_rate"
    assert note in capsys.readouterr().err
    parsed("retrack", given[0])
    assert capsys.readouterr().err == ""


def test_an_option_of_unlearning_is_no_option_of_retraining(capsys):
    parsed("retrain", "--config.unlearn.num_steps=10", "--config.seeds=0")
    assert "note: retrain reads config.pretrain, and not --config.unlearn.num_steps\n" in capsys.readouterr().err


def test_what_was_read_is_compared_section_by_section(tmp_path):
    workdir = Workdir(tmp_path)
    folder, model = workdir.run("retrack", 0, "a"), {"data": {"source": "folder"}}
    workdir.record(folder, {"model": model, "inputs": {"images": "some", "weights": "some"}})
    workdir.check(folder, {"model": model})
    workdir.check(folder, {"model": model, "inputs": {"images": "some", "weights": "some"}, "samples": {"anything": 1}})
    with pytest.raises(UserError, match="holds a run with other weights than the config names now .*; choose another --workdir"):
        workdir.check(folder, {"model": model, "inputs": {"images": "some", "weights": "others"}})
    workdir.record(folder, {"samples": {"sampling": {"num_steps": 4}}})
    with pytest.raises(UserError, match=r"holds samples of another config: config.sampling.num_steps \(4 there, 5 now\)"):
        workdir.check(folder, {"model": model, "samples": {"sampling": {"num_steps": 5}}})


def test_what_an_earlier_version_did_not_record_had_its_default(tmp_path):
    workdir, options = Workdir(tmp_path), parsed("all", "--config.checkpoint=model")
    now = evaluation_reads(options)
    workdir.record(tmp_path, {"evaluation": {name: value for name, value in now.items() if name != "pretrain"}})
    workdir.check(tmp_path, {"evaluation": now})
    other = evaluation_reads(parsed("all", "--config.checkpoint=model", "--config.pretrain.b1=0.5"))
    with pytest.raises(UserError, match=r"holds evaluation of another config: config.pretrain.b1 \(None there, 0.5 now\)"):
        workdir.check(tmp_path, {"evaluation": other})


def test_a_run_is_compared_on_what_it_reads():
    """Another method's option binds nothing, nor do fields that only samples or metrics read, nor what only costs memory."""
    plain = parsed("all")
    for flag in ("unlearn.siss.mixture=0.25", "sampling.num_steps=7", "unlearn.accumulation=2", "eval.nll_probes=3", "seeds=4"):
        assert model_reads(parsed("all", f"--config.{flag}"), "retrack") == model_reads(plain, "retrack"), flag
    for flag in ("unlearn.retrack.lam=0.25", "unlearn.num_steps=7", "unlearn.retrack.b1=0.5", "data.copies=3", "pretrain.seed=3"):
        assert model_reads(parsed("all", f"--config.{flag}"), "retrack") != model_reads(plain, "retrack"), flag
    assert model_reads(parsed("all", "--config.unlearn.retrack.lam=0.25"), "retrain") == model_reads(plain, "retrain")
    assert sample_reads(parsed("all", "--config.sampling.batch_size=8")) == sample_reads(plain)
    assert sample_reads(parsed("all", "--config.sampling.num_steps=8")) != sample_reads(plain)
    assert evaluation_reads(parsed("all", "--config.eval.metrics=fid")) == evaluation_reads(plain)
    assert evaluation_reads(parsed("all", "--config.eval.nll_probes=2")) != evaluation_reads(plain)
    # Relearning trains by the pretraining recipe, which is not part of the model if that is a checkpoint.
    moment, checkpoint = "--config.pretrain.b1=0.5", "--config.checkpoint=model"
    assert evaluation_reads(parsed("all", moment)) == evaluation_reads(plain)
    assert evaluation_reads(parsed("all", checkpoint, moment)) != evaluation_reads(parsed("all", checkpoint))


def test_a_workdir_of_another_version_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "config.json").write_text('{"data": {"source": "digits_tshirt"}, "inputs": {}}')
    assert main(["retrack_jax", CONFIG, *flags(tmp_path)]) == 2
    assert "pretrained/config.json is damaged or was written by another version of retrack_jax" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a[x]", "a\\x", "a*", "a?"])
def test_a_workdir_that_checkpoints_cannot_be_read_from_is_refused_before_training(tmp_path, name):
    with pytest.raises(UserError, match="in its path, which no path here can; choose another"):
        Workdir(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_numbers_of_two_networks_are_never_compared():
    mine = {"fid": {"features_digest": "a" * 64}, "frequency": {}, "sscd": {"features_digest": "b" * 64}}
    _check_same_networks(mine, {"pretrained": mine, "retrained": {"fid": {"features_digest": "a" * 64}, "kid": {}}}, "runs/x")
    other = {"sscd": {"features_digest": "c" * 64}}
    with pytest.raises(UserError, match="sscd of pretrained is by the network cccc.*, that of runs/x by bbbb.*weights_dir"):
        _check_same_networks(mine, {"pretrained": other}, "runs/x")


def test_a_second_recipe_of_a_method_is_refused_for_other_seeds_too(tmp_path, capsys):
    """The summary takes means over a method's runs. A stage that reads no recipe leaves it open."""
    command = ["retrack_jax", CONFIG]
    assert main([*command, *flags(tmp_path, mode="pretrain")]) == 0
    assert main([*command, *flags(tmp_path, unlearn__retrack__lam=0.02)]) == 0
    assert main([*command, *flags(tmp_path, unlearn__retrack__lam=0.3, seeds=1)]) == 2
    told = "retrack holds another config's run: config.unlearn.retrack.lam (0.02 there, 0.3 now)"
    assert told in capsys.readouterr().err


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


def test_a_run_that_diverges_does_not_end_the_others(tmp_path, monkeypatch):
    ran = []

    def run_one(context, method, spec, seed):
        ran.append((method, spec, seed))
        if method == "neggrad":
            raise Diverged("the loss is nan at step 3")

    monkeypatch.setattr(sweep_module, "run_one", run_one)
    monkeypatch.setattr(sweep_module, "summarize_workdir", lambda context, sweep: {"finished": True})
    with pytest.raises(UserError) as error:
        sweep_module._sweep(context(tmp_path, parsed("all", "--config.seeds=0,1")))
    assert len(ran) == 14 and ran[-1][0] == "vanilla"
    assert str(error.value).count("neggrad, target label:10, seed") == 2
    assert sweep_module._sweep(context(tmp_path, parsed("siss"))) == {"finished": True}


def test_pretraining_that_diverges_ends_the_sweep(tmp_path, capsys):
    more = {"pretrain.learning_rate": 1e30, "pretrain.warmup_steps": 0, "seeds": (0, 1)}
    assert main(["retrack_jax", CONFIG, *flags(tmp_path, **more)]) == 2
    told = capsys.readouterr().err
    assert told.count("error: pretrain: ") == 1 and "config.pretrain.learning_rate" in told
    assert not list(tmp_path.glob("retrack/seed1*"))


def context(folder, options, *specs, slug=None):
    """A context without data or network: as much as the order of runs and their files need."""
    problem = SimpleNamespace(options=options, conditioning=SimpleNamespace(of_target=False))
    targets = {spec: SimpleNamespace(spec=spec, slug=slug or spec) for spec in specs}
    return RunContext(problem, targets, Workdir(folder), lambda: False)


def write_run(workdir, method, target, seed, *, slug=None, classifier="joblib", num_images=4, **values):
    folder = workdir.run(method, seed, slug or target)
    folder.mkdir(parents=True)
    values = {"frequency": 0.0} | values
    metrics = {"method": method, "seed": seed, "target": target, "steps": 4, "unlearn_seconds": 1.0}
    notes = {"success_rate_original": {"classifier": classifier}}
    metrics["provenance"] = {"metrics": notes, "absent": {}, "final": [], "num_samples": 4 * (seed + 1)}
    metrics["config"] = {"eval": {"classifier": "joblib"}, "export": "unet", "sampling": {"num_images": num_images}}
    metrics |= {"pretrained": {"frequency": 0.5}, "unlearned": values, "retrained": None}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_the_retrained_model_is_of_the_same_target(tmp_path):
    here = context(tmp_path, parsed("retrack"), "1.jpg")

    def retrained(seed):
        return _retrained_run(Run(here, "retrack", here.targets["1.jpg"], seed))

    write_run(here.workdir, "retrain", "img-1.jpg", 0, frequency=0.25)
    assert retrained(0) is None
    write_run(here.workdir, "retrain", "1.jpg", 10, frequency=0.125)
    write_run(here.workdir, "retrain", "1.jpg", 2, frequency=0.0625)
    assert retrained(10)["unlearned"] == {"frequency": 0.125}
    assert retrained(3)["unlearned"] == {"frequency": 0.0625}


def test_runs_that_do_not_compare_are_named(tmp_path, caplog):
    here = context(tmp_path, parsed("all"), "a.jpg")
    write_run(here.workdir, "retrack", "a.jpg", 0)
    write_run(here.workdir, "retrack", "a.jpg", 1)  # of more captions, so it has more samples of as many images each
    summarize_workdir(here, [])
    assert caplog.text == ""
    write_run(here.workdir, "siss", "a.jpg", 0, classifier="labels", num_images=2)
    summarize_workdir(here, [])
    assert "config.sampling.num_images from 2 to 4" in caplog.text
    assert "by different classifiers (joblib; labels)" in caplog.text


def test_a_command_shows_its_own_runs(tmp_path, capsys):
    here = context(tmp_path, parsed("all"), "a.jpg", "b.jpg")
    write_run(here.workdir, "retrack", "a.jpg", 0)
    summarize_workdir(here, [("retrack", "b.jpg", 0)])
    assert capsys.readouterr().out == ""
    summarize_workdir(here, [("retrack", "a.jpg", 0)])
    shown = capsys.readouterr().out
    assert "Frequency" in shown and "seed0-a.jpg/report.html" in shown
    (tmp_path / "summary.json").write_text("{")  # damaged: it is written again
    assert summarize_workdir(here, [("retrack", "a.jpg", 0)]) == json.loads((tmp_path / "summary.json").read_text())
    write_run(here.workdir, "siss", "a.jpg", 0)
    before = (tmp_path / "summary.json").read_text()
    with pytest.raises(UserError, match="samples.npz is not there"):  # the comparison was wanted, and there are no samples
        summarize_workdir(here, [("siss", "a.jpg", 0)])
    # Nothing says yet that the comparison is made, so the next command makes it, whatever earlier page is there.
    assert (tmp_path / "summary.json").read_text() == before


def test_a_list_that_changed_between_two_commands_is_two_targets(tmp_path, capsys):
    """`@list.txt` is the same text of both; a comparison of the second must not look for pictures of the first."""
    for name in ("a", "b"):
        here = context(tmp_path, parsed("all"), "@list.txt", slug=f"list.txt-{name}")
        write_run(here.workdir, "retrain", "@list.txt", 0, slug=f"list.txt-{name}", forget_loss=float(ord(name)))
        write_run(here.workdir, "retrain", "@list.txt", 1, slug=f"list.txt-{name}", forget_loss=float(ord(name)))
    runs = _finished_runs(here.workdir)
    assert {run["target"] for run in runs} == {"list.txt-a", "list.txt-b"}
    write_run(here.workdir, "siss", "@list.txt", 0, slug="list.txt-b", forget_loss=98.0)
    found = summarize(_finished_runs(here.workdir))["methods"]
    assert found["pretrained"]["runs"] == 2
    assert list(found["siss"]["forgotten"]["intervals"]) == ["list.txt-b"]
    low, high = found["siss"]["forgotten"]["intervals"]["list.txt-b"]
    assert low == high == 98.0
    with pytest.raises(UserError, match="list.txt-b/samples.npz is not there|pretrained.*samples.npz is not there"):
        summarize_workdir(here, [("siss", "@list.txt", 0)])


def test_a_comparison_that_is_current_is_made_again_only_if_the_report_is_asked_for(tmp_path):
    here = context(tmp_path, parsed("all"), "a.jpg")
    for method in ("retrack", "siss"):
        write_run(here.workdir, method, "a.jpg", 0)
    (tmp_path / "report.html").write_text("of the numbers that summary.json holds")
    (tmp_path / "summary.json").write_text(json.dumps(summarize(_finished_runs(here.workdir))))
    summarize_workdir(here, [("siss", "a.jpg", 0)])
    again = context(tmp_path, parsed("all", "--config.mode=report"), "a.jpg")
    with pytest.raises(UserError, match="samples.npz is not there"):
        summarize_workdir(again, [("siss", "a.jpg", 0)])


def test_an_option_that_is_newer_than_the_workdir_had_its_default_there(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.record(tmp_path, {"samples": {"sampling": {"sampler": "ddpm"}}, "model": {"unlearn": {"retrack": {}}}})
    workdir.check(tmp_path, {"samples": {"sampling": {"sampler": "ddpm", "num_captions": 8}}})
    workdir.check(tmp_path, {"model": {"unlearn": {"retrack": {"snr_cap": None}}}})
    with pytest.raises(UserError, match="config.sampling.num_captions .None there, 4 now"):
        workdir.check(tmp_path, {"samples": {"sampling": {"sampler": "ddpm", "num_captions": 4}}})
    with pytest.raises(UserError, match="config.unlearn.retrack.snr_cap .None there, 5 now"):
        workdir.check(tmp_path, {"model": {"unlearn": {"retrack": {"snr_cap": 5}}}})
