"""What is said at the end, over every finished run of a workdir: summary.json, the comparison, the table on the screen."""

from collections.abc import Callable, Sequence

import numpy as np

from retrack_jax import files, parallel
from retrack_jax.checks import UserError
from retrack_jax.data.target_names import slug
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.problem.experiment import Experiment
from retrack_jax.problem.target import Target
from retrack_jax.run.training import read_samples_or_explain
from retrack_jax.run.workdir import Workdir
from retrack_jax.unlearn.methods import METHODS, PRETRAINED


def finish(
    workdir: Workdir,
    sweep: Sequence[tuple[str, str, int]],
    pictured: Callable[[str], tuple[Experiment, Target]],
    redraw: bool = False,
) -> dict:
    """Writes summary.json and, where the workdir has several runs, the comparison; prints the table and where the report is.

    Args:
      workdir: whose finished runs count.
      sweep: (method, target, seed) of this command's runs; where one of them is finished its own table is printed.
      pictured: `spec -> (experiment, its target)`, asked only where pictures are made.
      redraw: makes the comparison even where it stands and shows the same numbers.

    Returns:
      The summary; empty where no run is finished.
    """
    runs = parallel.from_main(lambda: _finished_runs(workdir))
    if not runs:
        return {}
    summary = summarize(runs)
    parallel.on_main(lambda: _write(workdir, sweep, pictured, runs, summary, redraw))
    return summary


def _finished_runs(workdir: Workdir) -> list[dict]:
    return [
        files.read_json(path)
        for method in (PRETRAINED, *METHODS)
        for path in sorted((workdir.root / method).glob("seed*-*/metrics.json"))
    ]


def _write(workdir: Workdir, sweep: Sequence, pictured: Callable, runs: list[dict], summary: dict, redraw: bool) -> None:
    from retrack_jax.report.comparison import comparison_report
    from retrack_jax.report.tables import before_after_text, comparison_text

    path, report = workdir.root / "summary.json", workdir.root / "report.html"
    mine = [run for run in runs if (run["method"], run["target"], run["seed"]) in sweep]
    compared = bool(mine) and len(runs) > 1
    # Pictures need the images, which a command that finds everything done does not read.
    if compared and (redraw or not (report.exists() and _holds(path, summary))):
        pictures = _comparison_pictures(workdir, mine[0]["target"], pictured, runs)
        comparison_report(workdir.root, summary=summary, **pictures)
    files.write_json(path, summary)  # last: a command that is cut before it makes the comparison again
    if len(mine) == 1:
        print(before_after_text(mine[0]))
        print(f"report: {workdir.run(mine[0]['method'], mine[0]['seed'], slug(mine[0]['target'])) / 'report.html'}")
    elif mine:
        print(comparison_text(summary))
    if compared:
        print(f"{'comparison' if len(mine) == 1 else 'report'}: {report}")


def _holds(path, summary: dict) -> bool:
    try:
        return path.is_file() and files.read_json(path) == summary
    except UserError:  # damaged: it is written again
        return False


def _comparison_pictures(workdir: Workdir, spec: str, pictured: Callable, runs: list[dict]) -> dict[str, np.ndarray]:
    """The first samples of each method's first run on the target, from the same noise."""
    experiment, target = pictured(spec)
    samples = {PRETRAINED: read_samples_or_explain(experiment.pretrained_folder(workdir, target))}
    for run in runs:
        if run["target"] == spec and run["method"] not in samples:  # the first seed of each method
            samples[run["method"]] = read_samples_or_explain(workdir.run(run["method"], run["seed"], slug(spec)))
    return experiment.comparison_pictures(target, samples)
