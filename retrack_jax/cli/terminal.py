"""Standard streams that may be closed, full or without a reader, and the signals that stop a run."""

import atexit
import io
import os
import signal
import sys
import threading
from collections.abc import Callable

_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def open_closed_streams() -> None:
    """Opens /dev/null as each standard stream that is closed: the next file that is opened would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, so this one


def drop_what_cannot_be_printed() -> None:
    """Makes standard output and error accept everything: what a full disk or a closed stream does not take is lost.

    A stream whose reader is gone counts as a lost terminal, so the run saves and stops: a connection without a terminal, such as
    a command given to ssh, sends no SIGHUP when it breaks.
    """
    sys.stdout, sys.stderr = _text(1, sys.stdout), _text(2, sys.stderr)


def _text(number: int, stream: io.TextIOBase | None) -> io.TextIOWrapper:
    """Returns a text stream on the file descriptor `number`, without a buffer that a later write could fail on."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return io.TextIOWrapper(_Lasting(number, "w", closefd=False), encoding, errors="backslashreplace", write_through=True)


class _Lasting(io.FileIO):
    """A file whose `write` never fails."""

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) or len(rest) :]  # None: it would block
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            signal.raise_signal(signal.SIGHUP)  # which nohup makes this process ignore here too
        except OSError:
            pass
        return size


def hold_signals() -> None:
    """Keeps the signals that stop a run waiting until `catch_termination`, also if the process restarts itself before."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)


def catch_termination(status: int) -> Callable[[], bool]:
    """Returns a function that says whether the process was asked to stop; the loops then save and stop.

    SIGTERM, SIGHUP (a lost terminal) and Ctrl-C ask. A second Ctrl-C ends the process at once, with `status`. Signals that are
    ignored already stay so: nohup's SIGHUP, and Ctrl-C for a command in a script's background.
    """
    arrived = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: arrived.append(number))
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Python runs the handlers above between two of its instructions, so not while XLA compiles. This thread runs meanwhile.
    threading.Thread(target=_watch, args=(reader, status), daemon=True).start()
    # The first to be registered runs last. From then on Python would take the handlers away, and a signal would end the process.
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in _STOPPING])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    return lambda: bool(arrived)


def _watch(reader: int, status: int) -> None:
    """Reads the numbers of the signals that arrive: answers the first Ctrl-C and ends the process at the second."""
    interrupts = 0
    while True:
        for number in os.read(reader, 64):
            interrupts += number == signal.SIGINT
            if number == signal.SIGINT and interrupts == 1:
                print("stopping as soon as this step is done and saved; Ctrl-C again stops at once", file=sys.stderr)
            if interrupts == 2:
                print("stopped at once; the same command continues from the last checkpoint", file=sys.stderr)
                os._exit(status)
