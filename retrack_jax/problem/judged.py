"""The images that a verdict is reached from, and a model's losses on them (evaluate/verdict.py)."""

from dataclasses import dataclass

import jax
import numpy as np

from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.distinct import distinct_rows
from retrack_jax.data.target_names import is_random
from retrack_jax.evaluate.turned import turned_copies
from retrack_jax.metrics.membership import denoising_losses
from retrack_jax.notation import PyTree
from retrack_jax.problem.conditioning import remembered_conditions
from retrack_jax.problem.problem import Problem
from retrack_jax.problem.target import Target

# How many images of each kind, and how many draws each: 64 up to 32 x 32, fewer as images are larger, down to 16. The loss of a
# large image is a sum over more pixels and so has less noise, and a verdict must cost little next to unlearning.
_MOST, _LEAST, _PIXELS = 64, 16, 64 * 32 * 32
_SEED = 0  # of the choice of images and of all draws: the same for every run and seed, so that losses are paired


@dataclass(frozen=True, eq=False)
class Judged:
    """Images as the network denoises them, float32 `[N, h, w, c]`: the forgotten ones, then remaining, then held-out ones.

    Attributes:
      names, num_forgotten, num_remaining, usable, is_random: as in `evaluate.verdict.Losses`.
      images: as above; turned: their turned copies.
      conditions: under which the model remembers each, leaves `[N, ...]`; `[1, ...]`: the same for all; or None.
    """

    names: list[str]
    num_forgotten: int
    num_remaining: int
    images: np.ndarray
    turned: np.ndarray
    usable: np.ndarray
    is_random: bool
    conditions: PyTree = None


def judged(problem: Problem, target: Target) -> Judged:
    """Returns a fixed random choice of distinct images; no remaining or held-out one is a copy of a forgotten one."""
    most = _count(problem)
    forgotten = np.sort(_chosen(target.images, target.unique, most))
    remaining = _chosen(target.images, target.remain, most, target)
    chosen = [(target.images, forgotten), (target.images, remaining)]
    if (held_out := problem.data.held_out) is not None:
        chosen.append((held_out, _chosen(held_out, np.arange(len(held_out)), most, target)))
    images = np.concatenate([problem.codec.clean(*part) for part in chosen])
    return Judged(
        names=[str(target.images.ids[row]) for row in forgotten],
        num_forgotten=len(target.unique),
        num_remaining=len(remaining),
        images=images,
        **dict(zip(("turned", "usable"), turned_copies(images), strict=True)),
        is_random=is_random(target.spec),
        conditions=remembered_conditions(problem.conditioning, target, chosen),
    )


def losses(
    problem: Problem,
    params: PyTree,
    images: np.ndarray,
    conditions: PyTree,
    desc: str,
    num_noises: int | None = None,
    numbers: np.ndarray | None = None,
    seed: int = _SEED,
) -> np.ndarray:
    """Returns the denoising losses of `images` under `conditions` (both as in `Judged`), float64 `[N, n]`.

    `num_noises` is n; None: as many as a verdict takes. `seed` and `numbers` (as in `denoising_losses`) decide the draws; by
    default they are the verdict's.
    """
    denoiser = problem.denoiser
    how = {"num_noises": num_noises or _count(problem), "conditions": conditions, "numbers": numbers, "desc": desc}
    return denoising_losses(denoiser.eps_fn, params, denoiser.schedule, images, jax.random.key(seed), **how)


def _count(problem: Problem) -> int:
    height, width, _ = problem.denoiser.shape
    return min(_MOST, max(_LEAST, _PIXELS // (height * width)))


def _chosen(images: ImageSet, rows: np.ndarray, most: int, target: Target | None = None) -> np.ndarray:
    """Returns up to `most` of `rows`, at random, distinct in their pixels and from the forgotten images of `target`."""
    order = np.random.default_rng(_SEED).permutation(rows)
    copies = set() if target is None else {image.tobytes() for image in target.images.images[target.unique]}
    chosen: list[int] = []
    for start in range(0, len(order), most):
        block = np.concatenate([np.array(chosen, np.int64), order[start : start + most]])
        pictures = images.images[block]
        chosen = [int(block[row]) for row in distinct_rows(pictures)[0] if pictures[row].tobytes() not in copies][:most]
        if len(chosen) == most:
            break
    return np.array(chosen, np.int64)
