"""How the work is laid out over devices and processes changes nothing but the rounding.

float32 sums in another order move AdamW, so trees are compared by norm, not element by element.
"""

import json
import shutil

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


def unlearned(launch, arguments, workdir, pretrained, method, logs):
    """Unlearns in a copy of `pretrained` by one layout and returns the parameters."""
    workdir.mkdir()
    shutil.copytree(pretrained / "pretrained", workdir / "pretrained")
    done = launch(cli.flags(workdir, method, mode="unlearn", unlearn__num_steps=STEPS, **cli.ATTENTION) + arguments)
    told = "".join(path.read_text()[-3000:] for path in logs.glob("*"))
    assert done.returncode == 0, f"{workdir.name}: {done.stderr[-4000:]}\n{told}"
    assert cli.checkpoint_steps(workdir / method / "seed0-label_10")[-1] == STEPS
    return params(workdir / method / "seed0-label_10")


@pytest.mark.parametrize("method", ["retrack", "siss"])
def test_one_by_four_equals_two_by_two_equals_accumulation(method, attentive, cache, tmp_path):
    """Five steps from one model: 1 process x 4 devices, 2 x 2, 1 x 1 with 4 microbatches; and 2 x 2 again, to the bit."""
    logs = tmp_path / "logs"

    def two_by_two(arguments):
        return cli.run_processes(2, 2, arguments, cache, logs)

    layouts = {
        "one_by_four": (lambda arguments: cli.run_processes(1, 4, arguments, cache, logs), []),
        "two_by_two": (two_by_two, []),
        "accumulated": (lambda arguments: cli.run(arguments, cache), ["--config.unlearn.accumulation=4"]),
    }
    runs = {name: unlearned(*how, tmp_path / name, attentive, method, logs) for name, how in layouts.items()}
    start = params(attentive / "pretrained")
    for name in ("two_by_two", "accumulated"):
        whole, relative = distances(runs["one_by_four"], runs[name], start)
        where = largest(runs["one_by_four"], runs[name])
        print(f"{method}, one_by_four and {name}: {whole:.1e} of the weights, {relative:.1e} of the way, most in {where}")
        assert whole <= 1e-6 and relative <= 1e-3, (name, whole, relative, where)
    if method == "retrack":
        cli.assert_same(runs["two_by_two"], unlearned(two_by_two, [], tmp_path / "again", attentive, method, logs))


@pytest.mark.parametrize("first,second", [((1, 1), (2, 2)), ((2, 2), (1, 1))])
def test_another_device_count_restores_the_checkpoint(first, second, finished, cache, tmp_path):
    """A run saved on one device goes on on 2 x 2, and the other way round."""
    workdir = tmp_path / "work"
    run = workdir / "retrack" / "seed0-label_10"
    shutil.copytree(finished / "pretrained", workdir / "pretrained")

    def unlearn(processes, devices):
        done = cli.run_processes(processes, devices, cli.flags(workdir, mode="unlearn"), cache, tmp_path / "logs")
        assert done.returncode == 0, done.stderr[-4000:] + "".join(path.read_text() for path in tmp_path.glob("logs/*"))[-4000:]

    unlearn(*first)
    steps = cli.checkpoint_steps(run)
    shutil.rmtree(run / "checkpoints" / str(steps[-1]))
    unlearn(*second)
    whole, _ = distances(params(finished / "retrack" / "seed0-label_10"), params(run), params(finished / "pretrained"))
    assert len(steps) == 2 and cli.checkpoint_steps(run)[-1] == steps[-1] and whole <= 1e-6


def test_calibration_on_two_processes_goes_as_far_as_on_one(finished, cache, tmp_path):
    """The line runs from parameters that were restored to parameters that were just trained."""
    asked = {"eval__metrics": "()", "unlearn__neggrad__learning_rate": 3e-3, "unlearn__calibrate": 120, "mode": "unlearn"}
    launches = {
        "one": lambda arguments: cli.run(arguments, cache),
        "two": lambda arguments: cli.run_processes(2, 1, arguments, cache, tmp_path / "logs"),
    }
    alphas = []
    for name, launch in launches.items():
        shutil.copytree(finished / "pretrained", tmp_path / name / "pretrained")
        done = launch(cli.flags(tmp_path / name, "neggrad", **asked))
        assert done.returncode == 0, done.stderr[-4000:] + "".join(path.read_text() for path in tmp_path.glob("logs/*"))[-4000:]
        alphas.append(json.loads((tmp_path / name / "neggrad" / "seed0-label_10" / "calibration.json").read_text())["alpha"])
    assert 0 < alphas[0] < 2 and alphas[0] == pytest.approx(alphas[1], rel=0.02)
