"""The stage that draws samples, and their file."""

from collections.abc import Callable

import numpy as np
from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checkpoints.run_store import tree_digest
from retrack_jax.checks import Preempted, check
from retrack_jax.log import progress
from retrack_jax.problem.target import Target
from retrack_jax.run.context import RunContext
from retrack_jax.run.training import Model


def draw(context: RunContext, folder: epath.Path, model: Callable[[], Model], target: Target, name: str) -> None:
    """Makes `folder/samples.npz` from `model()` if it is not there yet; `name` is shown with the progress."""
    sampler, path, parts = context.problem.sampler, folder / "samples.npz", folder / "samples-parts"
    if parallel.from_main(path.exists):
        parallel.on_main(lambda: parts.rmtree(missing_ok=True))  # left by a run that was killed before it removed them
        return
    params, total = model().params, sampler.total(target)
    with progress([], f"sample {name}", total=total, is_main=parallel.is_main_process(), unit="img") as bar:

        def advance(done: int, _: int) -> None:
            bar.update(done - bar.n)
            # Every process counts the same batches, so all of them ask here.
            if done < total and parallel.any_process(context.should_stop()):
                raise Preempted(f"sampling stopped at image {done} of {total}")

        arrays = sampler.sample(target, params, out_dir=parts, fingerprint=tree_digest(params), progress=advance)
    parallel.on_main(lambda: files.write_npz(path, **arrays))
    parallel.on_main(lambda: parts.rmtree(missing_ok=True))


def read(folder) -> dict[str, np.ndarray]:
    """Returns the arrays of `folder/samples.npz`. Raises `UserError` if it is damaged, or with the stage that makes it."""
    path = epath.Path(folder) / "samples.npz"
    check(path.exists(), f"{path} is not there; run --config.mode=sample first, or leave config.mode out to run every stage")
    return files.read_npz(path)
