"""Relearning: how many steps of fine-tuning bring a forgotten image back.

Each model has two curves, and so has the retrained one: fine-tuning on the remaining images alone (if the image never comes back,
the number of steps is censored), and on those plus one copy of each forgotten image. A model that has forgotten relearns no
sooner than one that never saw the image. The caller passes in how to train.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrack_jax.checks import Diverged, check


@dataclass(frozen=True)
class RelearningCurve:
    """The metric `values` measured after `steps` steps of fine-tuning; the first is before any, at step 0."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RelearningSteps:
    """Steps until the metric came back, interpolated. If it did not, `censored` is true and `steps` is the last one measured."""

    steps: float
    censored: bool


def relearning_curve(
    train: Callable[[Any, int, int], Any], measure: Callable[[Any], float], state: Any, steps: Sequence[int]
) -> RelearningCurve:
    """Returns the metric along fine-tuning.

    Args:
      train: `train(state, first_step, num_steps) -> state`, pure. The step numbers decide its batches.
      measure: `measure(state) -> float`.
      state: where fine-tuning starts.
      steps: rising numbers of steps after which to measure; 0 is always measured.

    Raises:
      UserError: steps that do not rise; `Diverged` for a value that is not finite.
    """
    steps = tuple(int(step) for step in steps if step != 0)
    check(
        len(steps) > 0 and all(a < b for a, b in zip((0, *steps), steps, strict=False)), f"steps {steps} must rise from above 0"
    )
    values, done = [float(measure(state))], 0
    for step in steps:
        state = train(state, done, step - done)
        done = step
        values.append(float(measure(state)))
    if not np.isfinite(values).all():
        raise Diverged(f"the relearning metric is not finite: {values}; the fine-tuned model has diverged")
    return RelearningCurve((0, *steps), tuple(values))


def relearning_steps(curve: RelearningCurve, threshold: float) -> RelearningSteps:
    """Returns how many steps it takes the curve to fall to `threshold`, such as twice the pretrained model's loss."""
    distance = threshold - np.asarray(curve.values)
    back = np.flatnonzero(distance >= 0)
    if not len(back):
        return RelearningSteps(float(curve.steps[-1]), True)
    first = int(back[0])
    if first == 0:
        return RelearningSteps(0.0, False)
    before, after = distance[first - 1], distance[first]
    share = -before / (after - before)
    return RelearningSteps(float(curve.steps[first - 1] + share * (curve.steps[first] - curve.steps[first - 1])), False)
