"""What a command ends with, over every finished run of its workdir: summary.json, the comparison, the table on the screen."""

import collections
import logging
from collections.abc import Sequence

import numpy as np

from retrack_jax import files, parallel
from retrack_jax.checks import UserError
from retrack_jax.evaluate.aggregate import summarize
from retrack_jax.problem.target import Target
from retrack_jax.run import samples
from retrack_jax.run.context import Run, RunContext
from retrack_jax.run.one_run import read_metrics
from retrack_jax.run.workdir import Workdir
from retrack_jax.unlearn.methods import METHODS, PRETRAINED

log = logging.getLogger(__name__)


def summarize_workdir(context: RunContext, sweep: Sequence[tuple[str, str, int]]) -> dict:
    """Writes summary.json and, if the workdir has several runs, the comparison; prints the table and where the report is.

    Args:
      context: whose workdir's finished runs count.
      sweep: (method, target, seed) of this command's runs; if one of them alone is finished, its own table is printed.

    Returns:
      The summary; empty if no run is finished.
    """
    runs = parallel.from_main(lambda: _finished_runs(context.workdir))
    if not runs:
        return {}
    root = context.workdir.root
    counts = sorted({run["config"]["sampling"]["num_images"] for run in runs})
    if len(counts) > 1:
        log.warning(
            "runs of %s have config.sampling.num_images from %d to %d: give each as many before you compare them",
            root, counts[0], counts[-1],
        )  # fmt: skip
    notes = [note for run in runs for note in run["provenance"]["metrics"].values()]
    classifiers = sorted({note["classifier"] for note in notes if "classifier" in note})
    if len(classifiers) > 1:
        log.warning(
            "success rates of %s are by different classifiers (%s): run every method with one config.eval.classifier before you "
            "compare them",
            root, "; ".join(classifiers),
        )  # fmt: skip
    summary = summarize(runs)
    parallel.on_main(lambda: _write(context, sweep, runs, summary))
    return summary


def _finished_runs(workdir: Workdir) -> list[dict]:
    """Returns the `metrics.json` of each finished run, with its target's `slug`.

    A list that is named twice, `@list.txt`, may have changed in between: its targets are then told apart by their slugs.
    """
    paths = [path for method in (PRETRAINED, *METHODS) for path in sorted((workdir.root / method).glob("seed*-*/metrics.json"))]
    runs = [read_metrics(path) | {"slug": path.parent.name.partition("-")[2]} for path in paths]
    slugs = collections.defaultdict(set)
    for run in runs:
        slugs[run["target"]].add(run["slug"])
    return [run | {"target": run["slug"]} if len(slugs[run["target"]]) > 1 else run for run in runs]


def _write(context: RunContext, sweep: Sequence, runs: list[dict], summary: dict) -> None:
    from retrack_jax.report.comparison import comparison_report
    from retrack_jax.report.tables import before_after_text, comparison_text

    workdir, redraw = context.workdir, context.options.mode == "report"
    path, report = workdir.root / "summary.json", workdir.root / "report.html"
    targets = {target.slug: target for target in context.targets.values()}
    sweep = {(method, context.targets[target].slug, seed) for method, target, seed in sweep}
    mine = [run for run in runs if (run["method"], run["slug"], run["seed"]) in sweep]
    compared = bool(mine) and len(runs) > 1
    if compared and (redraw or not (report.exists() and _holds(path, summary))):
        pictures = _comparison_pictures(context, targets[mine[0]["slug"]], runs)
        comparison_report(workdir.root, summary=summary, **pictures)
    files.write_json(path, summary)  # last: a command that is cut before it makes the comparison again
    if len(mine) == 1:
        print(before_after_text(mine[0]))
        print(f"report: {workdir.run(mine[0]['method'], mine[0]['seed'], mine[0]['slug']) / 'report.html'}")
    elif mine:
        print(comparison_text(summary))
    if compared:
        print(f"{'comparison' if len(mine) == 1 else 'report'}: {report}")


def _holds(path, summary: dict) -> bool:
    try:
        return path.is_file() and files.read_json(path) == summary
    except UserError:  # damaged: it is written again
        return False


def _comparison_pictures(context: RunContext, target: Target, runs: list[dict]) -> dict[str, np.ndarray]:
    """The first samples of each method's first run on the target, from the same noise."""
    drawn = {PRETRAINED: samples.read(Run(context, PRETRAINED, target, 0).before)}
    for run in runs:
        if run["slug"] == target.slug and run["method"] not in drawn:  # the first seed of each method
            drawn[run["method"]] = samples.read(context.workdir.run(run["method"], run["seed"], target.slug))
    return context.problem.evaluation.comparison_pictures(target, drawn)
