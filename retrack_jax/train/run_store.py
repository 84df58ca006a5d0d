"""This project's own checkpoints: Orbax keeps them, and a digest of the values says whether they can be trusted.

The digest is taken from the arrays before they are saved and stored in the checkpoint's metadata; a restore computes it again.
Whatever happened to any file in between, wrong weights are never used: the checkpoint before is, or the run says why not.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath

from retrack_jax import parallel
from retrack_jax.checks import UserError
from retrack_jax.notation import PyTree

log = logging.getLogger(__name__)
# Status words of TensorStore and gRPC for what has nothing to do with the bytes of a file.
_PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED")


class RunStore:
    """The checkpoints of one run, `directory/STEP/`; use it as a context manager, for leaving waits until saves are finished.

    Args:
      directory: local or `gs://`.
      keep: how many of the newest checkpoints stay; two, so that a damaged one can be replaced by the one before.
    """

    def __init__(self, directory, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.directory = epath.Path(directory if "://" in str(directory) else os.path.abspath(directory))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "meta"))
        except OSError as error:
            raise _cannot_write(self.directory, error) from error
        for step in sorted(self._manager.all_steps())[:-keep]:  # a process was killed while it deleted this one
            with contextlib.suppress(OSError):  # a disk that can only be read
                self._delete(step)

    def save(self, step: int, state: PyTree, meta: dict | None = None) -> None:
        """Starts saving `state` as the checkpoint of `step`; an earlier save is finished first. All processes must call it."""
        args = self._ocp.args
        meta = {**(meta or {}), "step": step, "digest": tree_digest(state)}
        state = parallel.across_processes(state)
        with _writing(self.directory):
            self._manager.save(step, args=args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta)))

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Returns the newest step that was saved, damaged or not, or None."""
        return self._manager.latest_step()

    def latest_meta(self) -> dict | None:
        """Returns the metadata of the newest checkpoint without its arrays; None where there is none, or it cannot be read."""
        step = self.latest_step()
        if step is None:
            return None
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(meta=self._ocp.args.JsonRestore()))["meta"]
        except Exception as error:  # damage shows as any of Orbax's or JSON's errors; `restore` deals with it
            log.debug("no metadata in %s: %s", self.directory / str(step), error)
            return None

    def restore(self, like: Callable[[int], PyTree]) -> tuple[PyTree, dict] | None:
        """Returns the newest checkpoint that is whole, as (state replicated over all devices, meta), or None if there is none.

        A damaged one is deleted with a warning that names it and the one used in its place.

        Args:
          like: `step -> tree` of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes that were saved at that
            step.

        Raises:
          UserError: there are checkpoints, but not one of them is whole; or one cannot be read now, whatever its files hold.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            found, problem = self._restore_step(step, like(step))
            # One whole checkpoint for all: where a process cannot use it, none does.
            if not parallel.any_process(problem is not None):
                whole = self.directory / str(step)
                for bad_step, bad_problem in damaged:
                    log.warning("checkpoint %s is damaged (%s); using %s", self.directory / str(bad_step), bad_problem, whole)
                    self._delete(bad_step)
                return found
            damaged.append((step, problem or "another process cannot read it"))
        if damaged:
            names = "; ".join(f"{self.directory / str(step)}: {problem}" for step, problem in damaged)
            raise UserError(f"no whole checkpoint is left ({names}); delete {self.directory} to start this stage again")
        return None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with _writing(self.directory):  # closing writes too
            self._manager.wait_until_finished()
            self._manager.close()

    def _restore_step(self, step: int, like: PyTree) -> tuple[tuple[PyTree, dict] | None, str | None]:
        """Returns ((state, meta), None), or (None, what is wrong with the checkpoint)."""
        args, sharding = self._ocp.args, parallel.replicated_sharding()
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like)
        try:
            found = self._manager.restore(
                step, args=args.Composite(state=args.StandardRestore(abstract), meta=args.JsonRestore())
            )
            state, meta = found["state"], found["meta"]
            if meta["step"] != step or meta["digest"] != tree_digest(state):
                return None, "its digest does not match its values"
        except Exception as error:  # damage shows as any of Orbax's, TensorStore's or JSON's errors
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if _may_pass(error):
                path = self.directory / str(step)
                raise UserError(f"cannot read the checkpoint {path} now ({problem}); it was left as it is: try again") from error
            return None, problem
        return (state, meta), None

    def _delete(self, step: int) -> None:
        parallel.barrier(f"before deleting {step}")
        if parallel.is_main_process():
            (self.directory / str(step)).rmtree(missing_ok=True)
        parallel.barrier(f"after deleting {step}")
        self._manager.reload()


def _may_pass(error: Exception) -> bool:
    """Whether `error` tells of the machine, the network or a permission rather than of a damaged file."""
    return isinstance(error, (MemoryError, PermissionError, TimeoutError)) or any(word in str(error) for word in _PASSING)


def tree_digest(tree: PyTree) -> str:
    """Returns the SHA-256 over the paths, dtypes, shapes and bytes of a tree's leaves."""
    sha = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in leaves:
        array = np.ascontiguousarray(jax.device_get(leaf))
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


@contextlib.contextmanager
def _writing(directory) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # a RuntimeError of the devices or of another process, not of the disk
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_write(directory, error) from error


def _cannot_write(directory, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"cannot save a checkpoint in {directory}: {str(reason)[:300]}; free some space or choose another --workdir")
