"""Scalars to `log.jsonl` and progress to the screen, from process 0 only.

`log.jsonl` holds one JSON object a line: `{"step": 50, "time": 1760000000.123, "train_loss": 4.2}`. Steps never fall from one
line to the next. Each line is flushed as it is written, so any exit, kill -9 included, loses at most the line being written, and
that broken tail is cut when the file is opened again. Names carry a prefix (`train_`, `eval_`).
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from retrack_jax.checks import UserError

_PLAIN_SECONDS = 10.0  # how often a log that is not a terminal gets a progress line


class Writer:
    """Appends scalar records to a JSON-lines file; use it as a context manager.

    Args:
      path: the file, local or `gs://`. An object store cannot append: there the records are kept and written whole by `flush`.
      is_main: whether this process writes. Others accept the same calls and do nothing.
      every: `scalars` keeps a record only where `step % every == 0`; see `due`.

    Raises:
      UserError: from any call, when the file cannot be written. What was logged before stays whole.
    """

    def __init__(self, path, *, is_main: bool = True, every: int = 1):
        if every < 1:
            raise UserError(f"a log record every {every} steps; use at least 1")
        self._path, self._is_main, self._every = path, is_main, every
        self._remote = "://" in str(path)
        self._file, self._lines, self._changed = None, [], False
        if is_main:
            self._guarded(self._open)

    def due(self, step: int) -> bool:
        """Returns whether `scalars(step, ...)` would record: ask before a device-to-host copy. The same on every process."""
        return step % self._every == 0

    def scalars(self, step: int, values: Mapping[str, float], *, force: bool = False) -> None:
        """Records `values` (floats, or what `float` takes) for `step`, if due or `force`. Non-finite ones become strings."""
        if not self._is_main or not (force or self.due(step)):
            return
        record = {"step": int(step), "time": round(time.time(), 3)}
        record |= {name: _json_number(value) for name, value in values.items()}
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._remote:
            self._lines.append(line)
            self._changed = True
        else:
            self._guarded(lambda: self._append(line.encode()))

    def truncate_after(self, step: int) -> None:
        """Drops the records of steps greater than `step`: what a restart from the checkpoint of `step` is about to repeat."""
        if not self._is_main:
            return
        if self._remote:
            self._lines, self._changed = ([line for line in self._lines if json.loads(line)["step"] <= step], True)
        else:
            self._guarded(lambda: self._cut(lambda record: record["step"] <= step))

    def flush(self) -> None:
        """Makes what was recorded so far readable by others."""
        if self._remote and self._changed:
            self._guarded(lambda: _remote_path(self._path).write_text("".join(self._lines)))
            self._changed = False

    def close(self) -> None:
        """Flushes and closes; safe to call twice."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _open(self):
        if self._remote:
            path = _remote_path(self._path)
            text = path.read_text() if path.exists() else ""
            self._lines = [line + "\n" for line in text.splitlines() if _parse(line.encode() + b"\n") is not None]
            return
        path = Path(self._path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "r+b" if path.exists() else "w+b", buffering=0)
        self._cut(lambda record: True)

    def _cut(self, keep):
        """Truncates the file in place (one atomic call, no second file) before the first line that is broken or not kept."""
        self._file.seek(0)
        end = 0
        for line in self._file.read().splitlines(keepends=True):
            record = _parse(line)
            if record is None or not keep(record):
                break
            end += len(line)
        self._file.truncate(end)
        self._file.seek(end)

    def _append(self, line: bytes):
        start = self._file.tell()
        try:
            if self._file.write(line) != len(line):  # unbuffered: a full disk takes a part of the line
                raise OSError("no space left on device")
        except OSError:
            self._file.truncate(start)
            self._file.seek(start)
            raise

    def _guarded(self, call):
        try:
            call()
        except OSError as error:
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}; free some space or choose another --workdir"
            ) from error


def read_log(path) -> list[dict]:
    """Returns the records of a `log.jsonl`, in order; an absent file has none and a broken last line is left out."""
    path = _remote_path(path) if "://" in str(path) else Path(path)
    if not path.exists():
        return []
    records = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


class _PlainLines(tqdm):
    """tqdm that prints whole lines: for logs, where a carriage return makes one endless line."""

    def __init__(self, *args, **kwargs):
        self._shown = None
        kwargs["bar_format"] = "{desc}: {n_fmt}/{total_fmt} ({percentage:.0f}%), {rate_fmt}, {remaining} left{postfix}"
        if kwargs.get("total") is None:
            kwargs["bar_format"] = "{desc}: {n_fmt}, {rate_fmt}{postfix}"
        super().__init__(*args, mininterval=_PLAIN_SECONDS, miniters=0, position=0, **kwargs)

    def display(self, msg=None, pos=None):
        if self.n != self._shown and self.n > self.initial:
            self._shown = self.n
            self.fp.write(f"{msg or self}\n")
            self.fp.flush()
        return True

    def moveto(self, n):
        pass

    def clear(self, nolock=False):
        pass

    def close(self):
        if not self.disable:
            self._ema_dt = lambda: None  # as tqdm does at its end: the last rate is that of the whole
            self.display()
            self.leave, self.disable = True, True
            self._decr_instances(self)


def progress(
    iterable: Iterable | int, desc: str, *, total: int | None = None, initial: int = 0, is_main: bool = True, unit: str = "it"
) -> tqdm:
    """Returns a `tqdm` over `iterable`: a bar with rate and time left on a terminal, a plain line every 10 s in a log.

    Args:
      iterable: anything, or an int n for `range(n)`.
      desc: what is being done, such as `pretrain`.
      total: how many in all, where `len(iterable)` does not say, or where `initial` of them are done already:
        `progress(range(start, stop), "unlearn", total=stop, initial=start)`.
      is_main: other processes iterate silently.
      unit: what the rate counts.

    Use it in `for`, or as a context manager with `.update(n)`; `.set_postfix(loss=..., refresh=False)` adds a number to it.
    """
    if isinstance(iterable, int):
        iterable, total = range(initial, iterable), iterable
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    options = dict(desc=desc, total=total, initial=initial, unit=unit, disable=not is_main, file=sys.stderr)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    return _PlainLines(iterable, **options)


def say(message: str, *, is_main: bool = True) -> None:
    """Prints a line to standard error without tearing a progress bar that is on the screen."""
    if is_main:
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()


def _json_number(value):
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _parse(line: bytes) -> dict | None:
    """Returns the record in a whole line, else None."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _remote_path(path):
    from etils import epath

    return epath.Path(str(path))
