"""The workdir: where each thing lies, whose run it holds, and the one command at a time that may write there.

    pretrained/                 checkpoints/ samples.npz metrics-TARGET.json diffusers/
    retrained/seed0-TARGET/     checkpoints/
    METHOD/seed0-TARGET/        config.json metrics.json log.jsonl samples.npz samples.png checkpoints/ report.html diffusers/
    summary.json report.html
"""

import contextlib
import fcntl
import json
import logging
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import UserError, check

log = logging.getLogger(__name__)
PRETRAINED, RETRAINED = "pretrained", "retrained"
_INPUTS = "inputs"  # in config.json beside the fields of the config: digests of what was read

# Fields that may differ between two commands on one workdir: what to do next, where files lie, how often to log and save, what
# only costs memory or time (so that a run goes on on a machine with other devices), and which metrics to compute and what to
# export, for each is kept by itself (runner.py).
_FREE = {"mode", "method", "seeds", "targets", "log_every", "checkpoint_every", "recipes", "export"}
_FREE_NESTED = {
    "data.cache_dir", "data.dir", "data.encode_batch_size", "sampling.batch_size", "eval.weights_dir", "eval.metrics",
    "eval.classifier", "compute.cpu_devices", "compute.remat", "pretrain.accumulation",
    "unlearn.accumulation",
}  # fmt: skip


class Workdir:
    """The folder or `gs://` address that holds every file of an experiment.

    Args:
      root: its address; made if absent.

    Raises:
      UserError: it cannot be made or written, or (several processes) it is not shared by all of them.
    """

    def __init__(self, root):
        self.root = epath.Path(os.path.expanduser(root)) if "://" not in str(root) else epath.Path(root)
        if "://" not in str(root):
            self.root = epath.Path(self.root.absolute())
        parallel.together(self._check_writable)
        self._check_shared()
        if "://" not in str(root):  # an object store holds no halves
            parallel.on_main(lambda: files.sweep_temporaries(Path(self.root)))

    def _check_writable(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            check(self.root.is_dir(), f"--workdir {self.root} is a file; choose a folder")
            if parallel.is_main_process():
                probe = self.root / ".probe"
                probe.write_text(uuid.uuid4().hex)
                probe.unlink(missing_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--workdir {self.root} is not a folder, or a file lies in its place; choose another") from error
        except OSError as error:
            raise UserError(f"--workdir {self.root} cannot be written ({error.strerror or error}); choose another") from error
        except ImportError as error:  # of etils, which asks for the store's client when it first meets an address
            hint = '; pip install -e ".[gcs]" brings it' if str(self.root).startswith("gs://") else ""
            raise UserError(f"--workdir {self.root}: {error}{hint}") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the workdir for one command, of one process or of many that were started together.

        Two would remove each other's half-written checkpoints. The kernel gives the lock back however the process ends. On an
        object store nobody checks.

        Raises:
          UserError: another command holds it.
        """
        lock = None
        if "://" not in str(self.root) and parallel.is_main_process():
            lock = os.open(self.root, os.O_RDONLY)
        try:
            parallel.together(lambda: None if lock is None else self._lock(lock))
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another command is at work in --workdir {self.root}; wait until it ends, or choose another --workdir"
            ) from error
        except OSError as error:  # some network disks have no locks
            log.warning("--workdir %s cannot be locked (%s); start no other command on it meanwhile", self.root, error.strerror)

    @property
    def pretrained(self) -> epath.Path:
        """The folder of the model before unlearning."""
        return self.root / PRETRAINED

    def retrained(self, seed: int, slug: str) -> epath.Path:
        """The folder of the model retrained without the target's images."""
        return self.root / RETRAINED / f"seed{seed}-{slug}"

    def run(self, method: str, seed: int, slug: str) -> epath.Path:
        """The folder of one run."""
        return self.root / method / f"seed{seed}-{slug}"

    def check_claim(self, folder: epath.Path, config: Mapping, inputs: Mapping[str, str] | None = None) -> None:
        """Raises `UserError`, with what differs, if `folder` holds a run of another config, or one that read other `inputs`.

        Args:
          folder: of a run, or of a model that runs share.
          config: its comparable part.
          inputs: what was read, such as images or weights, by name -> digest; None before they are read.
        """
        path = folder / "config.json"
        if not path.exists():
            return
        stored = files.read_json(path)
        # Of the stored one too: it may hold a field that has become free since it was written.
        differing = _differences(comparable(stored), json.loads(json.dumps(config)))
        if differing:
            shown = ", ".join(f"config.{name} ({old!r} there, {new!r} now)" for name, old, new in differing[:4])
            more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
            raise UserError(f"{folder} holds another config's run: {shown}{more}; choose another --workdir")
        read_then = stored.get(_INPUTS, {})
        if others := [name for name, digest in (inputs or {}).items() if read_then.get(name, digest) != digest]:
            names = " and ".join(others)
            raise UserError(f"{folder} holds a run with other {names} than the config names now; choose another --workdir")

    def claim(self, folder: epath.Path, config: Mapping, inputs: Mapping[str, str]) -> None:
        """Writes `config` and the digests of `inputs` to `folder/config.json`.

        To be called only once all that the config names was found: a mistyped command claims nothing.
        """
        path = folder / "config.json"
        claimed = {**config, _INPUTS: dict(inputs)}
        parallel.on_main(lambda: None if path.exists() else files.write_json(path, claimed))

    def _check_shared(self) -> None:
        """Refuses a workdir that the processes do not share: process 0 writes a token and all must read it."""
        import jax

        if jax.process_count() == 1:
            return
        path = self.root / ".shared-token"
        parallel.on_main(lambda: files.write_text(path, uuid.uuid4().hex))
        token = path.read_text() if path.exists() else f"process {jax.process_index()} sees none"
        agree = parallel.all_processes_agree(zlib.crc32(token.encode()) >> 1)
        parallel.barrier("workdir token read")
        if parallel.is_main_process():
            path.unlink(missing_ok=True)
        if not agree:
            hint = "give a folder on a shared disk or a gs:// address"
            raise UserError(f"--workdir {self.root} is not shared by all processes; {hint}")


def comparable(config: Mapping, *, model_only: bool = False) -> dict:
    """Returns the part of a config (a plain dict) that a run's results depend on; `model_only`: without the unlearning recipe."""
    left_out = _FREE - {"method"} | {_INPUTS} | ({"unlearn", "method"} if model_only else set())
    kept = {name: value for name, value in config.items() if name not in left_out}
    for name in _FREE_NESTED:
        group, field = name.split(".")
        if group in kept:
            kept[group] = {key: value for key, value in kept[group].items() if key != field}
    return kept


def _differences(old: Mapping, new: Mapping, prefix: str = "") -> list[tuple[str, object, object]]:
    found = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now, f"{prefix}{name}.")
        # An option that is newer than the workdir is off by default, and off it changes nothing.
        elif before != now and not (name not in old and not now):
            found.append((prefix + name, before, now))
    return found
