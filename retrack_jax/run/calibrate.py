"""The last step of unlearning that `config.unlearn.calibrate` asks for: how much of the way from the pretrained model to keep.

METHOD/seed0-TARGET/calibration.json    what `unlearn.calibration.line_search` returns
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import check
from retrack_jax.evaluate.memory import enough_noises
from retrack_jax.evaluate.verdict import Memory, memory
from retrack_jax.log import say
from retrack_jax.notation import PyTree
from retrack_jax.problem.conditioning import remembered_conditions
from retrack_jax.problem.judged import judged, losses
from retrack_jax.report.verdict import calibration_in_words
from retrack_jax.run.context import Run
from retrack_jax.run.training import Model, load, pretrained
from retrack_jax.run.verdict import losses_before
from retrack_jax.train.lora import scaled
from retrack_jax.unlearn.calibration import UNSEEN, between, line_search
from retrack_jax.unlearn.methods import METHODS

_FILE = "calibration.json"
_SHAPE = {"alpha": (int, float), "loss": (int, float), "reference": (int, float), "curve": list}
_DESC = "calibration"


def calibrated(run: Run, model: Model) -> Model:
    """Returns `model`, as training left it, or the point between the pretrained model and it that `config.unlearn.calibrate` asks
    for. The point is searched for once and kept, so that a second call reads it.

    Raises:
      UserError: the verdict has no estimate of what unseen images would have.
      Diverged: a loss on the way is not finite.
    """
    asked = run.context.options.recipe(run.method).calibrate
    if not asked or METHODS[run.method].from_scratch:
        return model
    start, path = pretrained(run.context, load).params, run.folder / _FILE
    if not parallel.from_main(path.exists):
        loss, reference = _as_the_verdict(run) if asked == UNSEEN else _as_the_metric(run, asked)
        found = line_search(lambda alpha: loss(between(start, model.params, alpha)), reference) | _draws(run, asked)
        say(calibration_in_words(found), is_main=parallel.is_main_process())
        parallel.on_main(lambda: files.write_json(path, found))
    found = parallel.from_main(lambda: read(run.folder))
    seed = run.context.options.sampling.seed
    check(
        asked == UNSEEN or found.get("seed", seed) == seed,
        f"{path} was measured with config.sampling.seed={found.get('seed')}, and this command has {seed}; use that, or another "
        "--workdir",
    )
    alpha = found["alpha"]
    adapter = None if model.adapter is None else scaled(model.adapter, alpha)
    return dataclasses.replace(model, params=between(start, model.params, alpha), adapter=adapter)


def _draws(run: Run, asked: str) -> dict[str, int]:
    """Returns what the losses depend on besides the model: the seed of the metric's draws; the verdict's are always the same."""
    return {} if asked == UNSEEN else {"seed": run.context.options.sampling.seed}


def check_reference(run: Run) -> None:
    """Raises `UserError`, before training, if `config.unlearn.calibrate` asks for an estimate that the verdict does not have."""
    if run.context.options.recipe(run.method).calibrate == UNSEEN and not METHODS[run.method].from_scratch:
        _unseen(run)


def read(folder: epath.Path) -> dict | None:
    """Returns the calibration of a run, or None if it has none. Raises `UserError` if the file is damaged."""
    path = folder / _FILE
    return files.read_shaped(path, _SHAPE) if path.exists() else None


def _as_the_verdict(run: Run) -> tuple[Callable[[PyTree], float], float]:
    """Returns a model's loss as the verdict compares it, and what it estimates for unseen images.

    Both are geometric means over the images of which it has an estimate. An arithmetic mean of losses that differ is larger, and
    would reach the estimate too early.
    """
    known, problem = _unseen(run), run.context.problem
    chosen = judged(problem, run.target)
    count = len(chosen.names)
    images, usable = chosen.images[:count], chosen.usable[:count]
    conditions = jax.tree.map(lambda leaf: leaf[:count], chosen.conditions)

    def loss(params: PyTree) -> float:
        found = losses(problem, params, images, conditions, _DESC).mean(axis=1)
        return float(np.exp(np.log(found[usable]).mean()))

    return loss, known.unseen


def _unseen(run: Run) -> Memory:
    """Returns what the verdict knows of the model before unlearning. Raises `UserError` if that is no estimate."""
    known = memory(losses_before(run))
    check(
        known.has_reference and not known.why,
        f"config.unlearn.calibrate is {UNSEEN}, but the loss of unseen images cannot be estimated ({known.why}); give a number, "
        "such as the forget_loss of a retrained model, or leave it empty",
    )
    return known


def _as_the_metric(run: Run, number: str) -> tuple[Callable[[PyTree], float], float]:
    """Returns a model's loss as the metric forget_loss means it, over every forgotten image, and `number`.

    Of a large group the search draws fewer noises for an image than the metric does.
    """
    problem, target = run.context.problem, run.target
    images = problem.codec.clean(target.images, target.unique)
    conditions = remembered_conditions(problem.conditioning, target, [(target.images, target.unique)])
    how = {"num_noises": enough_noises(len(images)), "seed": run.context.options.sampling.seed}
    return lambda params: float(losses(problem, params, images, conditions, _DESC, **how).mean()), float(number)
