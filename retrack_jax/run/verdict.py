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
from retrack_jax.evaluate.turned import turned_copies
from retrack_jax.evaluate.verdict import FEWEST, Losses, before_in_words, memory, unknown, verdict
from retrack_jax.log import say
from retrack_jax.notation import PyTree
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
    say(before_in_words(found, memory(found)), is_main=parallel.is_main_process())


def judge(run: Run, params: Callable[[], PyTree]) -> dict:
    """Returns the verdict on the run's model, as metrics.json holds it. What is measured is kept, so that a second call reads it.

    `params()` are the model's parameters; it is called only if the losses are not there yet.
    """
    try:
        found = losses_before(run)
        if run.method == PRETRAINED:
            return verdict(found, found.before, found.turned[found.forgotten])
        images = judged(run.context.problem, run.target)
        arrays = _kept_losses(run.folder / "losses.npz", ("after", "turned"), lambda: _of_images(run, params(), images, "after"))
        return verdict(found, arrays["after"], arrays["turned"])
    except Diverged as error:
        return unknown(str(error))


def losses_before(run: Run) -> Losses:
    """Returns the losses of the model before unlearning, which are kept in `run.before`."""
    images = judged(run.context.problem, run.target)
    rows, count = np.arange(len(images.images)), len(images.names)

    def measure() -> dict[str, np.ndarray]:
        params = pretrained(run.context, load).params
        arrays = _of_images(run, params, images, "before")
        turned = _losses(run, params, images, images.turned[count:], rows[count:], rows[count:])
        about = {"usable": images.usable, "num_remaining": np.array(images.num_remaining)}
        return arrays | about | {"turned": np.concatenate([arrays["turned"], turned])}

    arrays = _kept_losses(run.before / f"losses-{run.target.slug}.npz", ("before", "turned"), measure)
    about = {name: getattr(images, name) for name in ("names", "num_forgotten", "num_remaining", "usable", "is_random")}
    found = Losses(**about, before=arrays["before"], turned=arrays["turned"])
    return found if memory(found).same_kind else _with_sideways(run, images, found)


def _with_sideways(run: Run, images: Judged, found: Losses) -> Losses:
    """Returns `found` with the losses of the comparison images turned by a quarter, if they can be turned."""
    height, width = images.images.shape[1:3]
    if height != width:
        return found
    sideways = np.rot90(images.images[found.compared], axes=(1, 2))
    turned, usable = turned_copies(sideways)
    if usable.sum() < FEWEST:
        return found
    rows = np.arange(len(images.images))[found.compared][usable]

    def measure() -> dict[str, np.ndarray]:
        params, numbers = pretrained(run.context, load).params, np.arange(len(rows))
        pictures = {"before": sideways[usable], "turned": turned[usable]}
        return {name: _losses(run, params, images, those, rows, numbers) for name, those in pictures.items()}

    arrays = _kept_losses(run.before / f"sideways-{run.target.slug}.npz", ("before", "turned"), measure)
    return replace(found, sideways=(arrays["before"], arrays["turned"]))


def _of_images(run: Run, params: PyTree, images: Judged, name: str) -> dict[str, np.ndarray]:
    """Returns the losses of all `images`, under `name`, and `turned`, those of the forgotten ones' copies."""
    rows, count = np.arange(len(images.images)), len(images.names)
    pictures, both = np.concatenate([images.images, images.turned[:count]]), np.concatenate([rows, rows[:count]])
    found = _losses(run, params, images, pictures, both, both)
    return {name: found[: len(rows)], "turned": found[len(rows) :]}


def _losses(run: Run, params: PyTree, images: Judged, pictures: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns the losses of `pictures` `[M, h, w, c]` under the conditions of `rows` of `images`, float64 `[M, n]`.

    `numbers` decide the draws. All calls are filled up to the same number of images, so that one program is compiled for them.
    """
    fill = np.arange(len(images.images) + len(images.names)) % len(pictures)
    conditions = jax.tree.map(lambda leaf: leaf if len(leaf) == 1 else leaf[rows[fill]], images.conditions)
    return losses(run.context.problem, params, pictures[fill], conditions, "verdict", numbers=numbers[fill])[: len(pictures)]


def _kept_losses(path: epath.Path, names: tuple[str, ...], measure: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the arrays of `path`; if it is not there or lacks one of `names`, of `measure()`, which are then written there."""
    kept = parallel.from_main(lambda: files.read_npz(path) if path.exists() else {})
    if kept.keys() >= set(names):
        return kept
    arrays = measure()
    parallel.on_main(lambda: files.write_npz(path, **arrays))
    return arrays
