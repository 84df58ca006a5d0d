"""The stage that draws samples, and their file.

The pretrained model's samples are also kept in the cache under all that they depend on, so that another workdir, such as one that
tries another recipe, does not draw them again.
"""

import logging
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

import retrack_jax
from retrack_jax import files, parallel
from retrack_jax.checks import Preempted, UserError, check
from retrack_jax.log import progress, say
from retrack_jax.problem.target import Target
from retrack_jax.run.context import RunContext
from retrack_jax.run.training import Model
from retrack_jax.train.run_store import tree_digest
from retrack_jax.unlearn.methods import PRETRAINED

log = logging.getLogger(__name__)


def draw(context: RunContext, folder: epath.Path, model: Callable[[], Model], target: Target, name: str) -> None:
    """Makes `folder/samples.npz` from `model()`, or adds the samples that it lacks; `name` is shown with the progress.

    Metrics that were computed from other samples are removed, so that they are computed again.

    Raises:
      UserError: there are more samples than the config asks for.
    """
    sampler, path, parts = context.problem.sampler, folder / "samples.npz", folder / "samples-parts"
    first, wanted = parallel.from_main(lambda: files.npz_rows(path) if path.exists() else 0), context.options.sampling.num_images
    check(
        first <= wanted,
        f"{path} holds {first} samples and config.sampling.num_images is {wanted}: none are thrown away; set it to {first} or "
        "more, or choose another --workdir",
    )
    if first == wanted:
        parallel.on_main(lambda: parts.rmtree(missing_ok=True))  # left by a run that was killed before it removed them
        return
    params, total = model().params, sampler.total(target) * (wanted - first) // wanted
    fingerprint = tree_digest(params)
    shared = None
    if name == PRETRAINED:
        where = [retrack_jax.__version__, jax.__version__, jax.devices()[0].device_kind]
        key = [*where, wanted, sampler.depends_on(target, fingerprint)]
        shared = files.cache_path(context.options.data.cache_dir, "samples", key, "npz")
    if parallel.from_main(lambda: shared is not None and _take(shared, folder)):
        return
    with progress([], f"sample {name}", total=total, is_main=parallel.is_main_process(), unit="img") as bar:

        def advance(done: int, _: int) -> None:
            bar.update(done - bar.n)
            # Every process counts the same batches, so all of them ask here.
            if done < total and parallel.any_process(context.should_stop()):
                raise Preempted(f"sampling stopped at image {done} of {total}")

        arrays = sampler.sample(target, params, out_dir=parts, fingerprint=fingerprint, progress=advance, first=first)

    def write() -> None:
        before = read(folder) if first else {}
        _remove_metrics(folder)
        files.write_npz(path, **{key: np.concatenate([before[key], array]) if first else array for key, array in arrays.items()})
        if shared is not None and not first:  # what drew earlier samples is not known for certain
            _keep(path, shared)

    parallel.on_main(write)
    parallel.on_main(lambda: parts.rmtree(missing_ok=True))


def _take(shared: epath.Path, folder: epath.Path) -> bool:
    """Copies `folder/samples.npz` from the cache; returns whether it was there."""
    if files.read_cached(shared, files.read_npz) is None:
        return False
    say(f"samples of the pretrained model are read from {shared}")
    _remove_metrics(folder)
    files.write_bytes(folder / "samples.npz", shared.read_bytes())
    (folder / "samples-parts").rmtree(missing_ok=True)
    return True


def _keep(path: epath.Path, shared: epath.Path) -> None:
    """Copies samples into the cache, if there is room."""
    data = path.read_bytes()
    try:
        files.write_whole(shared, lambda temporary: temporary.write_bytes(data), advice=files.IN_CACHE)
    except UserError as error:
        log.warning("another workdir will draw these samples again: %s", error)


def _remove_metrics(folder: epath.Path) -> None:
    """Removes what was computed from other samples."""
    for stale in (folder / "evaluation.json", *folder.glob("metrics-*.json")):
        stale.unlink(missing_ok=True)


def read(folder, count: int | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of `folder/samples.npz`. Raises `UserError` if it is damaged or has not `count` samples."""
    path = epath.Path(folder) / "samples.npz"
    advice = "run --config.mode=sample first, or leave config.mode out to run every stage"
    check(path.exists(), f"{path} is not there; {advice}")
    arrays = files.read_npz(path)
    counts = sorted({len(array) for array in arrays.values()})
    check(count is None or counts == [count], f"{path} holds {counts} samples of {count}; {advice}")
    return arrays
