"""Relearning: how many steps of fine-tuning bring a forgotten image back.

Each model has two curves, and so has the retrained one: fine-tuning on the remaining images alone (if the image never comes back,
the number of steps is censored), and on those plus one copy of each forgotten image. A model that has forgotten relearns no
sooner than one that never saw the image. The caller passes in how to train.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retrack_jax.checks import Diverged


def relearning_curve(
    train: Callable[[Any, int, int], Any], measure: Callable[[Any], float], state: Any, steps: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Returns the steps of fine-tuning after which the metric was measured, from 0 on, and its values there.

    Args:
      train: `train(state, first_step, num_steps) -> state`, pure. The step numbers decide its batches.
      steps: rising numbers of steps, from above 0, after which to measure; 0 is always measured.

    Raises:
      Diverged: a value that is not finite.
    """
    values, done = [float(measure(state))], 0
    for step in steps:
        state = train(state, done, step - done)
        done = step
        values.append(float(measure(state)))
    if not np.isfinite(values).all():
        raise Diverged(f"the relearning metric is not finite: {values}; the fine-tuned model has diverged")
    return [0, *steps], values


def relearning_steps(steps: Sequence[int], values: Sequence[float], threshold: float) -> tuple[float, bool]:
    """Returns how many steps it takes a curve to fall to `threshold`, such as twice the pretrained model's loss, and False.

    The number is interpolated. Of a curve that does not fall so far it is the last one measured, and the second value is True:
    the number is censored.
    """
    distance = threshold - np.asarray(values)
    back = np.flatnonzero(distance >= 0)
    if not len(back):
        return float(steps[-1]), True
    first = int(back[0])
    if first == 0:
        return 0.0, False
    before, after = distance[first - 1], distance[first]
    share = -before / (after - before)
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1])), False
