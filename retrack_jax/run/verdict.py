"""The verdict of a run: the losses behind it, which are kept in the workdir, and the line that is said before training.

pretrained/losses-TARGET.npz    before, turned, usable, num_remaining (of evaluate.verdict.Losses), once per target
METHOD/seed0-TARGET/losses.npz  after
"""

from collections.abc import Callable

import numpy as np
from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import Diverged
from retrack_jax.evaluate.verdict import Losses, before_in_words, memory, unknown, verdict
from retrack_jax.log import say
from retrack_jax.notation import PyTree
from retrack_jax.problem.evaluation import label_of
from retrack_jax.problem.judged import judged, losses
from retrack_jax.run.context import Run
from retrack_jax.run.training import load, pretrained
from retrack_jax.unlearn.methods import PRETRAINED


def announce(run: Run) -> None:
    """Says in one line whether the model before unlearning remembers the target."""
    try:
        found = losses_before(run)
    except Diverged as error:
        say(f"whether the model remembers {run.target.spec} cannot be told: {error}", is_main=parallel.is_main_process())
        return
    known = memory(found)
    # A whole class is known without any of its images being remembered, and unlearning it changes much.
    little = known.remembered is False and label_of(run.target) is None
    advice = "; unlearning will change little" if little else ""
    say(f"{before_in_words(found, known)}{advice}", is_main=parallel.is_main_process())


def judge(run: Run, params: Callable[[], PyTree]) -> dict:
    """Returns the verdict on the run's model, as metrics.json holds it. What is measured is kept, so that a second call reads it.

    `params()` are the model's parameters; it is called only if the losses are not there yet.
    """
    try:
        found = losses_before(run)
        if run.method == PRETRAINED:
            return verdict(found, found.before)
        images = judged(run.context.problem, run.target)

        def measure() -> dict[str, np.ndarray]:
            return {"after": losses(run.context.problem, params(), images.images, images.conditions, "verdict")}

        return verdict(found, _kept_losses(run.folder / "losses.npz", ("after",), measure)["after"])
    except Diverged as error:
        return unknown(str(error))


def losses_before(run: Run) -> Losses:
    """Returns the losses of the model before unlearning, which are kept in `run.before`."""
    problem, images = run.context.problem, judged(run.context.problem, run.target)

    def measure() -> dict[str, np.ndarray]:
        params = pretrained(run.context, load).params
        pictures = {"before": images.images, "turned": images.turned}
        conditions = images.conditions
        arrays = {name: losses(problem, params, those, conditions, f"verdict, {name}") for name, those in pictures.items()}
        return {**arrays, "usable": images.usable, "num_remaining": np.array(images.num_remaining)}

    arrays = _kept_losses(run.before / f"losses-{run.target.slug}.npz", ("before", "turned"), measure)
    about = {name: getattr(images, name) for name in ("names", "num_forgotten", "num_remaining", "usable", "is_random")}
    return Losses(**about, before=arrays["before"], turned=arrays["turned"])


def _kept_losses(path: epath.Path, names: tuple[str, ...], measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays `names` of `path`; if it is not there, of `measure()`, which are then written there."""
    if parallel.from_main(path.exists):
        return parallel.from_main(lambda: files.read_npz(path, names))
    arrays = measure()
    parallel.on_main(lambda: files.write_npz(path, **arrays))
    return arrays
