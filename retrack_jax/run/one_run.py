"""The stages of one (method, target, seed), as far as they are not done. No mathematics and no files of its own."""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property

from ml_collections import ConfigDict

from retrack_jax import files, parallel
from retrack_jax.checks import Diverged, UserError
from retrack_jax.config import build
from retrack_jax.data.target_names import described, slug
from retrack_jax.evaluate.results import Results, worth_another_try
from retrack_jax.log import say
from retrack_jax.problem.kinds import build_experiment
from retrack_jax.problem.target import Target
from retrack_jax.run.provenance import environment
from retrack_jax.run.summary import finish
from retrack_jax.run.training import Model, Stages, read_samples_or_explain
from retrack_jax.run.workdir import Workdir, comparable
from retrack_jax.unlearn.methods import ALL, METHODS, PRETRAINED, RETRAIN


def methods_of(config: ConfigDict) -> list[str]:
    """Returns the methods to run: under `all`, those that make sense for the config, the retrained model first."""
    if config.method != ALL:
        return [config.method]
    # Retraining needs the pretraining recipe; a config whose model comes from a checkpoint has none.
    methods = [name for name, method in METHODS.items() if not (method.from_scratch and config.checkpoint)]
    return sorted(methods, key=lambda name: not METHODS[name].from_scratch)


class Runner:
    """Runs one (method, target, seed) after the other, building the experiment only when there is something left to do."""

    def __init__(self, config: ConfigDict, workdir: Workdir, should_stop: Callable[[], bool]):
        self.config, self.workdir, self.should_stop = config, workdir, should_stop
        self._experiment = None
        self._prepared = False
        self._steps = {}

    @property
    def experiment(self):
        """The experiment, built at first use."""
        if self._experiment is None:
            self._experiment = build_experiment(self.config)
        return self._experiment

    @cached_property
    def _targets(self) -> dict[str, Target]:
        """Every target of the sweep: one that cannot be found is told before the first run, not after the ones before it."""
        return {spec: self.experiment.target(spec) for spec in build.target_specs(self.config)}

    def run_one(self, method: str, spec: str, seed: int) -> None:
        """Runs the stages that `config.mode` asks for."""
        config = build.effective_config(self.config, method)
        folder = self.workdir.run(method, seed, slug(spec))
        plain = json.loads(config.to_json_best_effort())
        shared, own = comparable(plain, model_only=True), comparable(plain)
        ours = {folder.parent: (own, None), folder: (own, None)} if method != PRETRAINED else {folder: (own, None)}
        parallel.together(lambda: self._check_claims({self.workdir.pretrained: (shared, None), **ours}))
        mode = config.mode
        if mode == "run" and parallel.from_main(lambda: self._is_done(folder, config, slug(spec), seed)):
            return
        say(f"{method}, target {spec}, seed {seed}: {folder}", is_main=parallel.is_main_process())
        stages = Stages(
            config=config,
            experiment=self.experiment,
            workdir=self.workdir,
            should_stop=self.should_stop,
            steps=self._steps,
        )
        target = self._targets[spec]
        inputs = self.experiment.inputs(target)
        _check_same_everywhere(inputs)
        before = self.experiment.pretrained_folder(self.workdir, target)
        models = {before: (shared, inputs), self.workdir.pretrained: (shared, self.experiment.inputs())}
        # All runs of a method are of one recipe, for the summary takes their means.
        runs = {place: (own, inputs if place == folder else {}) for place in ours}
        parallel.together(lambda: self._check_claims({**models, **runs}))
        for place, claimed in models.items():
            self.workdir.claim(place, *claimed)
        if mode in ("run", "unlearn"):
            self._prepare_sweep()
        self._stop_if_asked("pretraining")
        if mode in ("run", "pretrain"):
            self._pretrain(stages)
        self._stop_if_asked("unlearning")
        if mode != "pretrain":  # which leaves the recipe open
            for place, claimed in runs.items():
                self.workdir.claim(place, *claimed)
        if mode in ("run", "unlearn") and method != PRETRAINED:
            model = stages.unlearn(method, target, seed)
            self._stop_if_asked("the export")
            self._export(folder, model, method, spec)
        self._stop_if_asked("sampling")
        if mode in ("run", "sample"):
            self._sample(stages, folder, method, target, seed)
        self._stop_if_asked("evaluation")
        if mode in ("run", "eval"):
            self._evaluate(stages, folder, method, target, seed)
        self._stop_if_asked("the report")
        if mode in ("run", "report"):
            self._report(folder, method, target)

    def _check_claims(self, claims: Mapping) -> None:
        for place, claimed in claims.items():
            self.workdir.check_claim(place, *claimed)

    def _pretrain(self, stages: Stages) -> None:
        try:
            stages.pretrain()
        except Diverged as error:  # which leaves no run of the sweep anything to begin with
            raise UserError(str(error)) from error

    def _stop_if_asked(self, before: str) -> None:
        parallel.stop_together(self.should_stop, before)

    def _prepare_sweep(self) -> None:
        specs, unlearn = build.target_specs(self.config), self.config.unlearn
        methods = [METHODS[name] for name in methods_of(self.config) if name in METHODS]
        if self._prepared or len(specs) == 1 or not any("neighbors" in method.streams for method in methods):
            return
        targets = list(self._targets.values())
        parallel.on_main(lambda: self.experiment.prepare_targets(targets, unlearn.num_neighbors, unlearn.neighbor_backend))
        self._prepared = True

    def finish(self) -> dict:
        """Writes summary.json and the comparison over every finished run in the workdir, and returns the summary."""
        sweep = itertools.product(methods_of(self.config), build.target_specs(self.config), self.config.seeds)
        return finish(
            self.workdir,
            list(sweep),
            lambda spec: (self.experiment, self._targets[spec]),
            redraw=self.config.mode == "report",
        )

    def _is_done(self, folder, config: ConfigDict, slug: str, seed: int) -> bool:
        if not (folder / "report.html").exists() or not (folder / "metrics.json").exists():
            return False
        # A metric may be asked for later, with another classifier, or an export of another kind.
        metrics = files.read_json(folder / "metrics.json")
        complete = not worth_another_try(metrics, config.eval.metrics)
        then = metrics["config"]
        same = then["eval"].get("classifier") == config.eval.get("classifier") and then.get("export") == config.get("export")
        # Images from elsewhere may be others, which their digest says once they are read. A model may have been retrained since.
        same = same and then["data"]["dir"] == config.data.dir
        retrained = self._retrained_run(slug, seed)
        same = same and (metrics["method"] == RETRAIN or metrics["retrained"] == (retrained and retrained["unlearned"]))
        return complete and same and not _is_other_export(folder / "diffusers", config.get("export"))

    def _export(self, folder, model: Model, method: str, spec: str) -> None:
        from retrack_jax.checkpoints.diffusers_export import is_whole

        path = folder / "diffusers"
        note = f"Unlearned by {method} in {model.steps} steps; forgotten: {described(spec)}."

        def export() -> None:
            if not is_whole(path) or _is_other_export(path, self.config.get("export")):
                self.experiment.export(path, model.params, note)

        parallel.on_main(export)

    def _existing(self, stages: Stages, method: str, target, seed: int) -> Callable[[], Model]:
        if method == PRETRAINED:
            return lambda: stages.pretrain(only_existing=True)
        return lambda: stages.unlearn(method, target, seed, only_existing=True)

    def _sample(self, stages: Stages, folder, method: str, target, seed: int) -> None:
        before = self.experiment.pretrained_folder(self.workdir, target)
        stages.sample(before, self._existing(stages, PRETRAINED, target, seed), target, PRETRAINED)
        if method != PRETRAINED:
            stages.sample(folder, self._existing(stages, method, target, seed), target, method)

    def _evaluate(self, stages: Stages, folder, method: str, target, seed: int) -> None:
        before_folder = self.experiment.pretrained_folder(self.workdir, target)
        before = self._results(stages, before_folder, PRETRAINED, target, seed, f"metrics-{target.slug}.json")
        after = before if method == PRETRAINED else self._results(stages, folder, method, target, seed, "evaluation.json")
        steps, seconds = (0, 0.0) if method == PRETRAINED else stages.record(method, target, seed)
        retrained = None if method == RETRAIN else self._retrained_run(target.slug, seed)
        _check_same_networks(after.notes, {before_folder: before.notes, **_noted(retrained)}, folder)
        metrics = {
            "config": json.loads(stages.config.to_json_best_effort()),
            "method": method,
            "seed": seed,
            "target": target.spec,
            "steps": steps,
            "unlearn_seconds": round(seconds, 3),
            PRETRAINED: before.values,
            "unlearned": after.values,
            "retrained": after.values if method == RETRAIN else retrained and retrained["unlearned"],
            "provenance": {
                **environment(),
                "data": self.experiment.describe_data(target),
                "sampler": self.experiment.describe_sampler(),
                "num_samples": self.experiment.num_samples(target),
                "metrics": {name: note for name, note in after.notes.items() if name in after.values},
                "absent": after.absent,
                "final": after.final,
            },
        }
        parallel.on_main(lambda: files.write_json(folder / "metrics.json", metrics))

    def _results(self, stages: Stages, folder, method: str, target, seed: int, name: str) -> Results:
        """The metrics of one model, computed as far as the file `name` in its folder does not hold them."""
        arrays = read_samples_or_explain(folder)
        return self.experiment.evaluate(
            target,
            self._existing(stages, method, target, seed),
            self._existing(stages, PRETRAINED, target, seed),
            arrays,
            folder / name,
            self.workdir,
            self.should_stop,
        )

    def _retrained_run(self, slug: str, seed: int) -> dict | None:
        """The metrics.json of the retrained model of the same seed, else of the least seed that has one, else None."""
        found = {}
        for path in (self.workdir.root / RETRAIN).glob(f"seed*-{slug}/metrics.json"):
            folder = re.fullmatch(rf"seed(\d+)-{re.escape(slug)}", path.parent.name)  # the glob finds longer slugs too
            found |= {int(folder[1]): path} if folder else {}
        return files.read_json(found.get(seed, found[min(found)])) if found else None

    def _report(self, folder, method: str, target) -> None:
        from retrack_jax.report.html import run_report

        def write() -> None:
            before = read_samples_or_explain(self.experiment.pretrained_folder(self.workdir, target))
            after = before if method == PRETRAINED else read_samples_or_explain(folder)
            run_report(folder, **self.experiment.pictures(target, before, after))

        parallel.on_main(write)


def _check_same_everywhere(inputs: Mapping[str, str]) -> None:
    """Raises `UserError` on every process unless all of them read the same: each would train on its own, and average with it."""
    if not parallel.all_processes_agree(int(files.json_digest(inputs)[:7], 16)):
        read = ", ".join(f"{name} {digest[:8]}" for name, digest in inputs.items())
        raise UserError(f"the processes read different inputs (this one: {read}); give every host the same files")


def _noted(run: dict | None) -> dict:
    """What the metrics of a finished run were computed from, by its name in messages."""
    return {} if run is None else {f"{RETRAIN}, seed {run['seed']}": run["provenance"]["metrics"]}


def _check_same_networks(notes: Mapping, others: Mapping[object, Mapping], folder) -> None:
    """Raises `UserError` where a metric of this run and of one that it stands beside come from different feature networks."""
    for place, found in others.items():
        for name in sorted({*notes, *found}):
            ours, theirs = (each.get(name, {}).get("features_digest") for each in (notes, found))
            if ours and theirs and ours != theirs:
                raise UserError(
                    f"{name} of {place} is by the network {theirs[:16]}, that of {folder} by {ours[:16]}: they do not compare; "
                    "set config.eval.weights_dir to one of the two, and delete the other's evaluation.json or metrics-*.json"
                )


def _is_other_export(path, kind: str | None) -> bool:
    """Whether the folder `path` holds an export, and not of the `kind` that is asked for (None: there is one kind)."""
    if kind not in ("pipeline", "unet") or not path.exists():
        return False  # with `none` what is there stays
    return (path / "unet").exists() != (kind == "pipeline")
