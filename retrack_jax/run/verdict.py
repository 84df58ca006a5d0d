"""The verdict of a run: the losses behind it, which are kept in the workdir, and the line that is said before training.

pretrained/losses-TARGET.npz    before, turned, usable, num_remaining (of evaluate.verdict.Losses), once per target
pretrained/sideways-TARGET.npz  before, turned, of other images turned by a quarter, if the target is of another kind than they
METHOD/seed0-TARGET/losses.npz  after; turned, of the forgotten images' copies, after too
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import Diverged
from retrack_jax.evaluate.verdict import FEWEST, Losses, before_in_words, memory, turned_copies, unknown, verdict
from retrack_jax.log import say
from retrack_jax.notation import PyTree
from retrack_jax.problem.evaluation import label_of
from retrack_jax.problem.judged import Judged, judged, losses
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
            return verdict(found, found.before, found.turned[found.forgotten])
        images = judged(run.context.problem, run.target)

        def measure() -> dict[str, np.ndarray]:
            unlearned = params()
            everyone, forgotten = np.arange(len(images.images)), np.arange(len(images.names))
            return {
                "after": _losses(run, unlearned, images, images.images, everyone),
                "turned": _losses(run, unlearned, images, images.turned[forgotten], forgotten),
            }

        arrays = _kept_losses(run.folder / "losses.npz", ("after", "turned"), measure)
        return verdict(found, arrays["after"], arrays["turned"])
    except Diverged as error:
        return unknown(str(error))


def losses_before(run: Run) -> Losses:
    """Returns the losses of the model before unlearning, which are kept in `run.before`."""
    images = judged(run.context.problem, run.target)

    def measure(pictures: np.ndarray, turned: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        params = pretrained(run.context, load).params
        return {name: _losses(run, params, images, those, rows) for name, those in (("before", pictures), ("turned", turned))}

    def measure_upright() -> dict[str, np.ndarray]:
        arrays = measure(images.images, images.turned, np.arange(len(images.images)))
        return {**arrays, "usable": images.usable, "num_remaining": np.array(images.num_remaining)}

    arrays = _kept_losses(run.before / f"losses-{run.target.slug}.npz", ("before", "turned"), measure_upright)
    about = {name: getattr(images, name) for name in ("names", "num_forgotten", "num_remaining", "usable", "is_random")}
    found = Losses(**about, before=arrays["before"], turned=arrays["turned"])
    height, width = images.images.shape[1:3]
    if memory(found).same_kind or height != width:
        return found
    sideways = np.rot90(images.images[found.compared], axes=(1, 2))
    turned, usable = turned_copies(sideways)
    if usable.sum() < FEWEST:
        return found
    rows = np.arange(len(images.images))[found.compared][usable]
    path = run.before / f"sideways-{run.target.slug}.npz"
    arrays = _kept_losses(path, ("before", "turned"), lambda: measure(sideways[usable], turned[usable], rows))
    return replace(found, sideways=(arrays["before"], arrays["turned"]))


def _losses(run: Run, params: PyTree, images: Judged, pictures: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the losses of `pictures` `[M, h, w, c]` under the conditions of `rows` of `images`, float64 `[M, n]`."""
    conditions = jax.tree.map(lambda leaf: leaf if len(leaf) == 1 else leaf[rows], images.conditions)
    return losses(run.context.problem, params, pictures, conditions, "verdict")


def _kept_losses(path: epath.Path, names: tuple[str, ...], measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays of `path`; if it is not there or lacks one of `names`, of `measure()`, which are then written there."""
    kept = parallel.from_main(lambda: files.read_npz(path) if path.exists() else {})
    if kept.keys() >= set(names):
        return kept
    arrays = measure()
    parallel.on_main(lambda: files.write_npz(path, **arrays))
    return arrays
