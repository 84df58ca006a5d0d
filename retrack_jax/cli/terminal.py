"""Standard streams that outlive their reader: a connection that breaks ends no run without saving it."""

import os
import signal
import sys


def outlive_terminal() -> None:
    """Makes a standard stream that nobody reads any more a hang-up, as a terminal that is gone is one: save and stop.

    A connection without a terminal, such as a command given to ssh, sends no SIGHUP when it breaks: the next line fails.
    """
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)


class _Lasting:
    """A stream whose reader may go away."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._guarded(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._guarded(self._stream.flush)

    def _guarded(self, call, *arguments) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            signal.raise_signal(signal.SIGHUP)  # nohup's wish to go on counts here too
