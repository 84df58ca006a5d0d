"""The last step of unlearning that `config.unlearn.calibrate` asks for: how much of the way from the pretrained model to keep.

METHOD/seed0-TARGET/calibration.json    what `unlearn.calibration.line_search` returns
"""

import dataclasses

from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import check
from retrack_jax.evaluate.verdict import memory
from retrack_jax.problem.judged import judged, losses
from retrack_jax.problem.target import Target
from retrack_jax.run.context import RunContext
from retrack_jax.run.training import Model, load, pretrained
from retrack_jax.run.verdict import losses_before
from retrack_jax.train.lora import scaled
from retrack_jax.unlearn.calibration import UNSEEN, between, line_search
from retrack_jax.unlearn.methods import METHODS

_FILE = "calibration.json"
_SHAPE = {"alpha": (int, float), "loss": (int, float), "reference": (int, float), "curve": list}
_NOISES = 256  # as the metric forget_loss, which a number of the user's comes from


def calibrated(context: RunContext, method: str, target: Target, folder: epath.Path, before: epath.Path, model: Model) -> Model:
    """Returns `model`, or the point between the pretrained model and it that `config.unlearn.calibrate` asks for.

    The point is searched for once and kept, so that a second call reads it.

    Args:
      folder, before: of the run, and of the model before unlearning for this target.
      model: as training left it.

    Raises:
      UserError: the verdict has no estimate of what unseen images would have.
      Diverged: a loss on the way is not finite.
    """
    asked = context.options.recipe(method).calibrate
    if not asked or METHODS[method].from_scratch:
        return model
    start, problem, path = pretrained(context, load).params, context.problem, folder / _FILE
    if not parallel.from_main(path.exists):
        images = judged(problem, target)
        forgotten, conditions = images.images[: len(images.names)], images.conditions
        how = {"desc": "calibration"} if asked == UNSEEN else {"desc": "calibration", "num_noises": _NOISES}
        conditions = None if conditions is None else conditions[: len(images.names)]

        def loss(alpha: float) -> float:
            return float(losses(problem, between(start, model.params, alpha), forgotten, conditions, **how).mean())

        found = line_search(loss, _unseen(context, target, before) if asked == UNSEEN else float(asked))
        parallel.on_main(lambda: files.write_json(path, found))
    alpha = parallel.from_main(lambda: read(folder))["alpha"]
    adapter = None if model.adapter is None else scaled(model.adapter, alpha)
    return dataclasses.replace(model, params=between(start, model.params, alpha), adapter=adapter)


def read(folder: epath.Path) -> dict | None:
    """Returns the calibration of a run, or None if it has none. Raises `UserError` if the file is damaged."""
    path = folder / _FILE
    return files.read_shaped(path, _SHAPE) if path.exists() else None


def _unseen(context: RunContext, target: Target, before: epath.Path) -> float:
    known = memory(losses_before(context, target, before))
    check(
        known.log_unseen is not None,
        f"config.unlearn.calibrate is {UNSEEN}, but the loss of unseen images cannot be estimated ({known.why}); give a number, "
        "such as the forget_loss of a retrained model, or leave it empty",
    )
    return known.unseen
