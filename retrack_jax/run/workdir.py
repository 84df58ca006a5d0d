"""The workdir: where each result lies, what it was made from, and the one command at a time that may write there.

    pretrained/                 config.json checkpoints/ samples.npz metrics-TARGET.json losses-TARGET.npz
                                sideways-TARGET.npz diffusers/
    retrained/seed0-TARGET/     checkpoints/
    METHOD/seed0-TARGET/        config.json metrics.json log.jsonl losses.npz samples.npz samples.png checkpoints/ report.html
                                diffusers/
    summary.json report.html

TARGET is `Target.slug`. What is not there yet is made by the stage that needs it.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from retrack_jax import files, parallel
from retrack_jax.checks import UserError, check, shown
from retrack_jax.config.options import Options
from retrack_jax.unlearn.methods import METHODS, PRETRAINED

log = logging.getLogger(__name__)
RETRAINED = "retrained"
_FORMAT = 2  # of config.json


class Workdir:
    """The folder or `gs://` address that holds every file of an experiment; made if absent.

    Raises:
      UserError: it cannot be made or written, or (several processes) it is not shared by all of them.
    """

    def __init__(self, root):
        try:
            self.root = epath.Path(root if "://" in str(root) else os.path.abspath(os.path.expanduser(root)))
        except KeyError as error:  # etils does not know the scheme
            raise UserError(f"--workdir {root} is an address of an unknown kind; give a folder or a gs:// address") from error
        # TensorStore, which reads checkpoints, and searches for files take these for something else than a part of the path.
        wrong = [sign for sign in "[\\*?" if sign in str(self.root)]
        check(not wrong, f"--workdir {self.root} has {' and '.join(wrong)} in its path, which no path here can; choose another")
        parallel.together(self._check_writable)
        self._check_shared()

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
            locked = parallel.together(lambda: lock is not None and self._lock(lock))
            if lock is not None:  # an object store holds no halves
                files.sweep_temporaries(Path(self.root), untouched_seconds=0 if locked else 600)
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def _lock(self, descriptor: int) -> bool:
        """Returns whether there are locks here."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another command is at work in --workdir {self.root}; wait until it ends, or choose another --workdir"
            ) from error
        except OSError as error:  # some network disks have no locks
            log.warning("--workdir %s cannot be locked (%s); start no other command on it meanwhile", self.root, error.strerror)
            return False
        return True

    @property
    def pretrained(self) -> epath.Path:
        """The folder of the model before unlearning."""
        return self.root / PRETRAINED

    def model(self, method: str, seed: int, slug: str) -> epath.Path:
        """The folder of a method's checkpoints: its results' own, except that what is retrained lies by itself."""
        retrained = method in METHODS and METHODS[method].from_scratch
        return self.root / RETRAINED / f"seed{seed}-{slug}" if retrained else self.run(method, seed, slug)

    def run(self, method: str, seed: int, slug: str) -> epath.Path:
        """The folder of one run's results."""
        return self.root / method / f"seed{seed}-{slug}"

    def check(self, folder: epath.Path, reads: Mapping[str, Mapping]) -> None:
        """Raises `UserError`, with what differs, if `folder` holds a result that was made from something else than `reads`.

        Args:
          folder: of a run, of a model that runs share, or of all runs of a method.
          reads: section -> what results of that kind are made from now (reads.py). A section that `folder` does not have binds
            nothing, and one that is left out here is not compared.
        """
        path = folder / "config.json"
        if not path.exists():
            return
        stored = _sections(path)
        for section, now in reads.items():
            if section not in stored:
                continue
            differing = _differences(stored[section], now)
            if not differing:
                continue
            if section == "inputs":
                names = " and ".join(name for name, _, _ in differing)
                raise UserError(
                    f"{folder} holds a run with other {names} than the config names now (or those under the same paths have "
                    "changed); choose another --workdir"
                )
            fields = shown([f"config.{name} ({old!r} there, {new!r} now)" for name, old, new in differing], most=4)
            whose = "another config's run" if section == "model" else f"{section} of another config"
            raise UserError(f"{folder} holds {whose}: {fields}; choose another --workdir")

    def record(self, folder: epath.Path, reads: Mapping[str, Mapping]) -> None:
        """Writes into `folder/config.json` what the results of each section of `reads` are made from.

        To be called only once all that the config names is there: a mistyped command leaves nothing.
        """
        path = folder / "config.json"

        def write() -> None:
            stored = _sections(path) if path.exists() else {"format": _FORMAT}
            if any(section not in stored for section in reads):
                files.write_json(path, {**reads, **stored})

        parallel.on_main(write)

    def _check_shared(self) -> None:
        """Refuses a workdir that the processes do not share: process 0 writes a token and all must read it."""
        if jax.process_count() == 1:
            return
        path = self.root / ".shared-token"
        parallel.on_main(lambda: files.write_text(path, uuid.uuid4().hex))
        token = path.read_text() if path.exists() else f"process {jax.process_index()} sees none"
        agree = parallel.all_processes_agree(token.encode())
        parallel.barrier("workdir token read")
        if parallel.is_main_process():
            path.unlink(missing_ok=True)
        if not agree:
            hint = "give a folder on a shared disk or a gs:// address"
            raise UserError(f"--workdir {self.root} is not shared by all processes; {hint}")


def _sections(path: epath.Path) -> dict:
    """Returns what a `config.json` holds. Raises `UserError` for one of an older version, or one that is damaged."""
    stored = files.read_json(path)
    if not isinstance(stored, dict) or not all(isinstance(value, dict) for name, value in stored.items() if name != "format"):
        stored = {}
    check(
        stored.get("format") == _FORMAT,
        f"{path} is damaged or was written by another version of retrack_jax, whose runs cannot be continued; choose another "
        "--workdir (reports that are finished can still be opened)",
    )
    return stored


def _differences(old: Mapping, new: Mapping, prefix: str = "") -> list[tuple[str, object, object]]:
    differing = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(old.get(name, {}), Mapping) and isinstance(now, Mapping):
            differing += _differences(old.get(name, {}), now, f"{prefix}{name}.")
        elif before != now and (name in old or now != _default(prefix + name)):
            differing.append((prefix + name, before, now))
    return differing


def _default(name: str) -> object:
    """Returns the default of a field of the config, by its dotted name: what an option did before it existed."""
    options = dataclasses.asdict(Options())
    options["unlearn"] |= {method: dataclasses.asdict(entry.options()) for method, entry in METHODS.items()}
    value: Any = json.loads(json.dumps(options))
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
