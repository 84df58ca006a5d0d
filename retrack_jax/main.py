"""The command line: flags (cli/flags.py has the usage), process set-up, one call."""

import errno
import sys
from collections.abc import Callable

from retrack_jax.checks import Preempted, UserError
from retrack_jax.cli import terminal
from retrack_jax.cli.huge_pages import restart_with_huge_pages

DONE, FAILED, USER_ERROR = 0, 1, 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues


def main(argv: list[str] | None = None, should_stop: Callable[[], bool] = lambda: False) -> int:
    """Runs the command and returns its exit status.

    Args:
      argv: the program's name and its flags; those of this process by default.
      should_stop: asked often; once it is true, the run saves what it has and stops.

    Returns:
      0: done. 2: the user can fix it, and one line says how. 75: stopped by `should_stop`. 1: anything else.
    """
    from retrack_jax.cli.flags import USAGE, parse

    argv = sys.argv if argv is None else argv
    if {"-h", "--help", "--helpfull"} & set(argv[1:]):
        print(USAGE)
        return DONE
    from retrack_jax.cli.process import is_one_of_many, leave, run_command

    try:
        config, workdir = parse(argv)
        run_command(config, workdir, should_stop)
        return DONE
    except Preempted as reason:
        print(f"preempted: {reason}; everything is saved, the same command continues", file=sys.stderr)
        return leave(PREEMPTED, at_once=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(USER_ERROR)
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            print(f"error: {str(error.filename)[:80]}... is too long for the name of a file; correct it", file=sys.stderr)
            return leave(USER_ERROR)
        if not is_one_of_many():
            raise
        sys.excepthook(*sys.exc_info())
        return leave(FAILED)


def command() -> None:
    """Runs this process as the command, and ends it.

    Streams and signals come first: whatever is closed, full or sent from then on is handled.
    """
    terminal.hold_signals()
    terminal.open_closed_streams()
    restart_with_huge_pages()
    terminal.drop_what_cannot_be_printed()
    sys.exit(main(should_stop=terminal.catch_termination(FAILED)))


if __name__ == "__main__":
    command()
