"""Scalars to `log.jsonl` and progress to the screen, from process 0 only.

`log.jsonl` holds one JSON object a line: `{"step": 50, "time": 1760000000.123, "train_loss": 4.2}`. Steps never fall from one
line to the next. Each line is flushed as it is written, so any exit, kill -9 included, loses at most the line being written, and
that broken tail is cut when the file is opened again. Names carry a prefix (`train_`, `eval_`).
"""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from retrack_jax.checks import UserError

_PLAIN_SECONDS = 10.0  # how often a log that is not a terminal gets a progress line
_COMPILE_SECONDS = 5.0  # after which a first step that is not back yet is explained
_BAR_BEFORE_THE_SECOND = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"


class Writer:
    """Appends scalar records to a JSON-lines file; use it as a context manager.

    Args:
      path: the file, local or `gs://`. An object store cannot append: there the records are kept and written whole by `flush`.
      is_main: whether this process writes. Others accept the same calls and do nothing.
      every: `scalars` keeps a record only where `step % every == 0`; see `due`.
      also: called as `also(step, values)` with each record.

    Raises:
      UserError: from any call, when the file cannot be written. What was logged before stays whole.
    """

    def __init__(self, path, *, is_main: bool = True, every: int = 1, also: Callable | None = None):
        self._path, self._is_main, self._every, self._also = path, is_main, every, also
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
        if self._also is not None:
            self._also(step, values)

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


class progress:
    """`iterable` with its progress: a bar with rate and time left on a terminal, a plain line every 10 s in a log.

    Args:
      iterable: anything, or an int n for `range(n)`.
      desc: what is being done, such as `pretrain`.
      total: how many in all, if `len(iterable)` does not say or if `initial` of them are done already:
        `progress(range(start, stop), "unlearn", total=stop, initial=start)`.
      is_main: other processes iterate silently.
      unit: what the rate counts.
      compiles: whether a program is compiled before the first update; a line says so if that takes longer than 5 s.

    Use it in `for`, or as a context manager with `.update(n)`. The first update may have compiled, so the rate is that since
    then, and no time left is shown before the second.
    """

    def __init__(
        self,
        iterable: Iterable | int,
        desc: str,
        *,
        total: int | None = None,
        initial: int = 0,
        is_main: bool = True,
        unit: str = "it",
        compiles: bool = False,
    ):
        if isinstance(iterable, int):
            iterable, total = range(initial, iterable), iterable
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self._iterable, self._desc, self._total, self._unit = iterable, desc, total, unit
        self.n = self._shown = initial  # how many are done, and how many the last line said
        self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first update came, and how many were done then
        self._silent, self._bar = not is_main, None
        if is_main and sys.stderr.isatty():
            options = dict(initial=initial, total=total, unit=unit, dynamic_ncols=True, bar_format=_BAR_BEFORE_THE_SECOND)
            self._bar = tqdm(desc=desc, file=sys.stderr, **options)
        self._notice = threading.Timer(_COMPILE_SECONDS, say, [f"{desc}: compiling, which may take up to a minute"])
        self._notice.daemon = True
        if compiles and is_main:
            self._notice.start()

    def __iter__(self):
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._notice.cancel()
        if self._bar is not None:
            self._bar.close()
        elif self.n != self._shown and not self._silent:
            self._print_line()

    def update(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._notice.cancel()
        self.n += count
        if self._bar is not None:
            if self._first is not None:
                self._bar.bar_format = None  # tqdm's own, with a rate and the time left
            self._bar.update(count)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS and not self._silent:
            self._print_line()
        self._first = self._first or (time.monotonic(), self.n)

    def _print_line(self) -> None:
        self._shown, self._printed = self.n, time.monotonic()
        of = "" if self._total is None else f"/{self._total} ({100 * self.n / max(self._total, 1):.0f}%)"
        print(f"{self._desc}: {self.n}{of}{self._rate()}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        """Returns the rate since the first update, and the time left at that rate; nothing before the second update."""
        since, done_then = self._first or (0.0, self.n)
        if self.n == done_then:
            return ""
        seconds = max(time.monotonic() - since, 1e-6) / (self.n - done_then)
        text = f", {1 / seconds:.2f}{self._unit}/s" if seconds < 1 else f", {seconds:.2f}s/{self._unit}"
        left = "" if self._total is None else f", {tqdm.format_interval(seconds * (self._total - self.n))} left"
        return text + left


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
