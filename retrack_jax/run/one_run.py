"""The stages of one (method, target, seed), as far as they are not done: train, sample, evaluate, report."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable, Mapping
from functools import partial

from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checkpoints.diffusers_export import is_whole
from retrack_jax.checks import Diverged, UserError
from retrack_jax.evaluate.results import Results, worth_another_try
from retrack_jax.log import say
from retrack_jax.problem.evaluation import EvaluatedModel
from retrack_jax.report.verdict import in_words
from retrack_jax.run import calibrate, samples
from retrack_jax.run.context import Run, RunContext
from retrack_jax.run.export import export, export_pretrained, needs_export
from retrack_jax.run.provenance import environment
from retrack_jax.run.reads import evaluation_reads, model_reads, sample_reads
from retrack_jax.run.tensorboard import show_results
from retrack_jax.run.training import Model, load, pretrained, record, train, unlearning
from retrack_jax.run.verdict import announce, judge
from retrack_jax.unlearn.methods import PRETRAINED, RETRAIN

# What is read again of the metrics.json of a finished run.
_METRICS = {
    "config": {"eval": {"classifier": str}, "export": str, "sampling": {"num_images": int}},
    "method": str, "seed": int, "target": str, "steps": int, "unlearn_seconds": (int, float),
    PRETRAINED: files.NUMBERS, "unlearned": files.NUMBERS, "retrained": (dict, type(None)),
    "provenance": {"metrics": dict, "absent": dict, "final": list, "num_samples": int},
}  # fmt: skip


def read_metrics(path) -> dict:
    """Returns the `metrics.json` of a finished run. Raises `UserError` if it is damaged or of another shape."""
    return files.read_shaped(path, _METRICS)


def run_one(context: RunContext, method: str, spec: str, seed: int) -> None:
    """Runs the stages that `config.mode` asks for."""
    run, mode = Run(context, method, context.targets[spec], seed), context.options.mode
    stop_before = partial(parallel.stop_together, context.should_stop)
    parallel.together(lambda: _check_reads(run))
    if mode == "run" and parallel.from_main(lambda: _is_done(run)):
        return
    say(f"{method}, target {spec}, seed {seed}: {run.folder}", is_main=parallel.is_main_process())
    stop_before("pretraining")
    _record_pretrained(run)
    if mode in ("run", "pretrain"):
        try:
            export_pretrained(context, pretrained(context, train))
        except Diverged as error:  # no run of the sweep has anything to start from
            raise UserError(str(error)) from error
    stop_before("unlearning")
    if mode in ("run", "unlearn") and method != PRETRAINED:
        _unlearn(run, stop_before)
    stop_before("sampling")
    if mode in ("run", "sample"):
        _sample(run)
    stop_before("evaluation")
    if mode in ("run", "eval"):
        _evaluate(run)
    stop_before("the report")
    if mode in ("run", "report"):
        _report(run)
        if context.options.tensorboard:
            show_results(context.options, run.folder, read_metrics(run.folder / "metrics.json"))
    if mode == "run" and is_whole(exported := run.folder / "diffusers") and "://" not in str(exported):
        upload = f"hf upload ORGANIZATION/NAME {shlex.quote(str(exported))}"
        say(f"to publish the model: {upload}", is_main=parallel.is_main_process())


def _unlearn(run: Run, stop_before: Callable[[str], None]) -> None:
    """Trains, judges and exports. Keeps no reference to the model: sampling loads it anew, and two would not fit every device."""
    _record(run, "model", "inputs")
    if not parallel.from_main((run.folder / "losses.npz").exists):
        announce(run)
    calibrate.check_reference(run)
    model = calibrate.calibrated(run, train(unlearning(run), run.context))
    stop_before("the verdict")
    verdict = judge(run, lambda: model.params)
    say(f"verdict: {in_words(verdict)}", is_main=parallel.is_main_process())
    stop_before("the export")
    export(run, model, verdict)


def _reads(run: Run, method: str, digests: Mapping[str, str]) -> dict[str, dict]:
    """What each kind of result of `method` is made from."""
    options = run.context.options
    return {
        "model": model_reads(options, method),
        "samples": sample_reads(options),
        "evaluation": evaluation_reads(options),
        "inputs": dict(digests),
    }


def _check_reads(run: Run) -> None:
    """Raises `UserError` if a folder that this run uses holds results of something else."""
    problem, workdir = run.context.problem, run.context.workdir
    shared, own = (_reads(run, method, problem.digests(run.target)) for method in (PRETRAINED, run.method))
    workdir.check(workdir.pretrained, {**shared, "inputs": problem.digests()})
    workdir.check(run.before, {**shared, "inputs": problem.digests(run.target if run.before != workdir.pretrained else None)})
    if run.method != PRETRAINED:
        # All runs of a method have one recipe, because the summary takes their means.
        workdir.check(run.folder.parent, {name: own[name] for name in own if name != "inputs"})
    workdir.check(run.folder, own)


def _record_pretrained(run: Run) -> None:
    problem, workdir = run.context.problem, run.context.workdir
    model = {"model": model_reads(run.context.options, PRETRAINED)}
    workdir.record(workdir.pretrained, {**model, "inputs": problem.digests()})
    if run.before != workdir.pretrained:
        workdir.record(run.before, {**model, "inputs": problem.digests(run.target)})


def _record(run: Run, *sections: str) -> None:
    """Records what the results of `sections` are made from: of this run, and of all runs of its method."""
    workdir, reads = run.context.workdir, _reads(run, run.method, run.context.problem.digests(run.target))
    workdir.record(run.folder, {name: reads[name] for name in sections})
    if run.method != PRETRAINED:
        workdir.record(run.folder.parent, {name: reads[name] for name in sections if name != "inputs"})


def _is_done(run: Run) -> bool:
    folder, options = run.folder, run.context.options
    if not (folder / "report.html").exists() or not (folder / "metrics.json").exists():
        return False
    metrics = read_metrics(folder / "metrics.json")
    if "verdict" not in metrics:  # it was finished by an earlier version
        return False
    # A metric may be asked for later, with another classifier, and a model may have been retrained since.
    if worth_another_try(metrics, options.eval.metrics) or metrics["config"]["eval"]["classifier"] != options.eval.classifier:
        return False
    if metrics["config"]["sampling"]["num_images"] != options.sampling.num_images:
        return False
    gold = _retrained_run(run)
    current = run.method == RETRAIN or metrics["retrained"] == (gold and gold["unlearned"])
    return current and metrics["config"]["export"] == options.export and not needs_export(options, run.method, folder)


def _model(run: Run) -> Model:
    """Returns the run's finished model. Raises `UserError` if it is not there."""
    if run.method == PRETRAINED:
        return pretrained(run.context, load)
    return calibrate.calibrated(run, load(unlearning(run), run.context))


def _sample(run: Run) -> None:
    context, target, options = run.context, run.target, run.context.options
    context.workdir.record(run.before, {"samples": sample_reads(options)})
    samples.draw(context, run.before, lambda: pretrained(context, load), target, PRETRAINED)
    if run.method != PRETRAINED:
        _record(run, "samples")
        samples.draw(context, run.folder, lambda: _model(run), target, run.method)


def _evaluate(run: Run) -> None:
    context, target, method = run.context, run.target, run.method
    context.workdir.record(run.before, {"evaluation": evaluation_reads(context.options)})
    before = _results(dataclasses.replace(run, method=PRETRAINED), run.before, f"metrics-{target.slug}.json")
    after, steps, seconds = before, 0, 0.0
    if method != PRETRAINED:
        _record(run, "evaluation")
        after = _results(run, run.folder, "evaluation.json")
        steps, seconds = record(unlearning(run), context)
    gold = None if method == RETRAIN else _retrained_run(run)
    others = {run.before: before.notes}
    if gold is not None:
        others[f"{RETRAIN}, seed {gold['seed']}"] = gold["provenance"]["metrics"]
    _check_same_networks(after.notes, others, run.folder)
    metrics = {
        "config": json.loads(json.dumps(dataclasses.asdict(context.options))),
        "method": method,
        "seed": run.seed,
        "target": target.spec,
        "steps": steps,
        "unlearn_seconds": round(seconds, 3),
        PRETRAINED: before.values,
        "unlearned": after.values,
        "retrained": after.values if method == RETRAIN else gold and gold["unlearned"],
        "verdict": judge(run, lambda: _model(run).params),
        **({"calibration": found} if (found := parallel.from_main(lambda: calibrate.read(run.folder))) else {}),
        "provenance": {
            **environment(),
            **({"note": about} if (about := context.problem.note(method, target)) else {}),
            "data": context.problem.describe(target),
            "sampler": dataclasses.asdict(context.options.sampling),
            "num_samples": context.problem.sampler.total(target),
            "metrics": after.notes,
            PRETRAINED: _others(before.notes, after.notes),  # where the same metric was computed from something else
            **({} if gold is None else {"retrained_seed": gold["seed"]}),
            **({} if gold is None else {"retrained": _others(gold["provenance"]["metrics"], after.notes)}),
            "absent": after.absent,
            "final": after.final,
        },
    }
    parallel.on_main(lambda: files.write_json(run.folder / "metrics.json", metrics))


def _others(notes: Mapping, mine: Mapping) -> dict:
    return {name: note for name, note in notes.items() if note != mine.get(name)}


def _results(run: Run, folder: epath.Path, name: str) -> Results:
    """The metrics of one model, computed as far as the file `name` in its folder does not hold them."""
    context = run.context
    model = EvaluatedModel(
        params=lambda: _model(run).params,
        pretrained=lambda: pretrained(context, load).params,
        arrays=samples.read(folder, context.options.sampling.num_images),
        path=folder / name,
        workdir=context.workdir.root,
        seed=None if run.method == PRETRAINED else run.seed,
        should_stop=context.should_stop,
    )
    return context.problem.evaluation.evaluate(run.target, model)


def _retrained_run(run: Run) -> dict | None:
    """The metrics.json of the retrained model of the same seed, else of the least seed that has one, else None."""
    paths, slug = {}, run.target.slug
    for path in (run.context.workdir.root / RETRAIN).glob("*/metrics.json"):
        if folder := re.fullmatch(rf"seed(\d+)-{re.escape(slug)}", path.parent.name):
            paths[int(folder[1])] = path
    return read_metrics(paths.get(run.seed, paths[min(paths)])) if paths else None


def _report(run: Run) -> None:
    from retrack_jax.report.html import run_report

    def write() -> None:
        before = samples.read(run.before)
        after = before if run.method == PRETRAINED else samples.read(run.folder)
        pictures = run.context.problem.evaluation.pictures(run.target, before, after)
        run_report(run.folder, **pictures, count=run.context.options.eval.grid_images)

    parallel.on_main(write)


def _check_same_networks(notes: Mapping, others: Mapping[object, Mapping], folder) -> None:
    """Raises `UserError` if a metric of this run and the same metric of a run that it is shown with use different networks."""
    for place, theirs in others.items():
        for name in sorted({*notes, *theirs}):
            mine, other = (each.get(name, {}).get("features_digest") for each in (notes, theirs))
            if mine and other and mine != other:
                raise UserError(
                    f"{name} of {place} is by the network {other[:16]}, that of {folder} by {mine[:16]}: they do not compare; "
                    "set config.eval.weights_dir to one of the two, and delete the other's evaluation.json or metrics-*.json"
                )
