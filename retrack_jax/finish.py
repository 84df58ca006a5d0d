"""What is said at the end, over every finished run of a workdir: summary.json, the comparison, the table on the screen."""

from collections.abc import Callable, Sequence

import numpy as np

from retrack_jax import files, parallel
from retrack_jax.data.target import Target
from retrack_jax.data.targets import slug
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.experiment import PixelExperiment
from retrack_jax.stages import read_samples_or_explain
from retrack_jax.unlearn.methods import METHODS, PRETRAINED
from retrack_jax.workdir import Workdir


def finish(workdir: Workdir, methods: Sequence[str], spec: str, pictured: Callable[[], tuple[PixelExperiment, Target]]) -> dict:
    """Writes summary.json and, where there are several runs, the comparison; prints the table and where the report is.

    Args:
      workdir: whose finished runs count.
      methods: those of this command; if they have one run between them its own table is printed.
      spec: the target that the comparison shows.
      pictured: `() -> (experiment, target of spec)`, asked only where pictures are made.

    Returns:
      The summary; empty where no run is finished.
    """
    runs = parallel.from_main(lambda: _finished_runs(workdir))
    if not runs:
        return {}
    summary = summarize(runs)
    parallel.on_main(lambda: files.write_json(workdir.root / "summary.json", summary))
    parallel.on_main(lambda: _print(workdir, methods, spec, pictured, runs, summary))
    return summary


def _finished_runs(workdir: Workdir) -> list[dict]:
    return [
        files.read_json(path)
        for method in (PRETRAINED, *METHODS)
        for path in sorted((workdir.root / method).glob("seed*-*/metrics.json"))
    ]


def _print(workdir: Workdir, methods: Sequence[str], spec: str, pictured: Callable, runs: list[dict], summary: dict) -> None:
    from retrack_jax.report.comparison import comparison_report
    from retrack_jax.report.tables import before_after_text, comparison_text

    mine = [run for run in runs if run["method"] in methods]
    if len(mine) == 1:
        report = workdir.run(mine[0]["method"], mine[0]["seed"], slug(mine[0]["target"])) / "report.html"
        print(before_after_text(mine[0]))
    else:
        report = comparison_report(workdir.root, **_comparison_pictures(workdir, spec, pictured, runs))
        print(comparison_text(summary))
    print(f"report: {report}")


def _comparison_pictures(workdir: Workdir, spec: str, pictured: Callable, runs: list[dict]) -> dict[str, np.ndarray]:
    """The first samples of each method's first run on the target, from the same noise."""
    experiment, target = pictured()
    samples = {PRETRAINED: read_samples_or_explain(experiment.pretrained_folder(workdir, target))}
    for run in runs:
        if run["target"] == spec and run["method"] not in samples:  # the first seed of each method
            samples[run["method"]] = read_samples_or_explain(workdir.run(run["method"], run["seed"], slug(spec)))
    return experiment.comparison_pictures(target, samples)
