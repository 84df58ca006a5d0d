"""Metric values with what they were computed from, kept in one JSON file per model and filled in metric by metric.

Evaluation can be stopped at any metric and goes on at the next. A metric that could not be computed is recorded with the reason,
and tried again by the next command unless the reason is final: one that follows from the config and the data.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import Diverged, UserError

log = logging.getLogger(__name__)


class Unavailable(UserError):
    """A metric cannot be computed here: a weights file is missing, say. Others still run."""


class Inapplicable(Unavailable):
    """It cannot for a reason that no other try of the same run mends: its network is for other data, say."""


@dataclass
class Results:
    """Values of one model.

    Attributes:
      values: metric name -> number.
      notes: metric name -> what it was computed from, as plain JSON.
      absent: metric name -> why it could not be computed.
      final: those of `absent` that no other try would bring.
    """

    values: dict[str, float] = field(default_factory=dict)
    notes: dict[str, dict] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    final: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Computes a family of metrics in one pass.

    Attributes:
      names: the metrics it can compute.
      compute: `(task, subject, wanted names) -> (values, note)`; raises `Unavailable` where an input is missing. A wanted metric
        that the config or the data leave without a value is not among the values, and `note["why"]` says why.
      is_current: `(task, note) -> bool`, whether a stored value with that note is what `compute` would give for `task`.
    """

    names: tuple[str, ...]
    compute: Callable
    is_current: Callable[..., bool] = lambda task, note: True


def evaluate(evaluators: Sequence[Evaluator], wanted: Sequence[str], task, subject, path, should_stop=lambda: False) -> Results:
    """Returns the `wanted` metrics of `subject`, computing those that the file at `path` does not hold yet, or of another task.

    Args:
      task, subject: what is evaluated against, and the model, as the evaluators expect them.
      path: the JSON file, written after every evaluator by process 0.
      should_stop: asked before every evaluator; true raises `Preempted`, and what was computed before is kept.
    """
    # Of process 0: it writes the file in between, and all must find the same metrics missing.
    results = parallel.from_main(lambda: read_results(path))
    for evaluator in evaluators:
        missing = [name for name in evaluator.names if name in wanted and not _holds(results, name, evaluator, task)]
        if not missing:
            continue
        parallel.stop_together(should_stop, f"the metric {missing[0]}")
        try:
            values, note = evaluator.compute(task, subject, missing)
            why, final = note.get("why", "not defined here"), True
        except Unavailable as reason:
            if not parallel.is_main_process():  # the file has process 0's reason, which may be that another one had one
                log.warning("%s: %s", missing[0], reason)
            values, note, why, final = {}, {}, str(reason), isinstance(reason, Inapplicable)
        except Diverged as reason:  # the same on every process and at every try; other metrics may have a value all the same
            values, note, why, final = {}, {}, str(reason), True
        for name in missing:
            for kept in (results.values, results.notes, results.absent):
                kept.pop(name, None)
            if name in values:
                results.values[name] = values[name]
                results.notes[name] = {key: said for key, said in note.items() if key != "why"}  # which is of metrics without one
            else:
                results.absent[name] = why
                results.final += [name] * final
        parallel.on_main(lambda: files.write_json(path, vars(results)))
    return results


def _holds(results: Results, name: str, evaluator: Evaluator, task) -> bool:
    current = name in results.values and evaluator.is_current(task, results.notes.get(name, {}))
    return current or name in results.final


def is_complete(evaluators: Sequence[Evaluator], wanted: Sequence[str], task, path) -> bool:
    """Whether the file at `path` holds every wanted metric of `task`, or a final reason why it is absent."""
    results = parallel.from_main(lambda: read_results(path))
    by_name = {name: evaluator for evaluator in evaluators for name in evaluator.names}
    return all(name in by_name and _holds(results, name, by_name[name], task) for name in wanted)


def worth_another_try(metrics: Mapping, wanted: Sequence[str]) -> bool:
    """Whether `metrics`, what a `metrics.json` holds, lacks a wanted metric, and not for a final reason."""
    return not set(wanted) <= {*metrics["unlearned"], *metrics["provenance"].get("final", ())}


def read_results(path) -> Results:
    """Returns what the file at `path` holds; nothing where there is none."""
    if not epath.Path(path).exists():
        return Results()
    stored = {"final": [], **files.read_shaped(path, {"values": files.NUMBERS, "notes": dict, "absent": dict})}
    return Results(**{name: stored[name] for name in ("values", "notes", "absent", "final")})
