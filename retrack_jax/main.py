"""The command line: flags, process set-up, one call.

    python -m retrack_jax.main --config=configs/NAME.py[:METHOD] [--workdir=DIR] [--config.FIELD=VALUE ...]
"""

import sys
import traceback

from retrack_jax.checks import UserError
from retrack_jax.cli.exit_status import DONE, FAILED, USER_ERROR
from retrack_jax.cli.flags import USAGE, parse
from retrack_jax.cli.huge_pages import restart_with_huge_pages
from retrack_jax.cli.terminal import outlive_terminal


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 done, 2 the user can mend it, 75 preempted, 1 anything else."""
    argv = sys.argv if argv is None else argv
    if {"-h", "--help", "--helpfull"} & set(argv[1:]):
        print(USAGE)
        return DONE
    from retrack_jax.cli.process import is_one_of_many, leave

    try:
        config, workdir = parse(argv)
        # Only now: importing jax takes longer than telling the user about a mistyped flag.
        from retrack_jax.cli.process import run_command

        status = run_command(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        status = FAILED
    except Exception:
        if not is_one_of_many():
            raise
        traceback.print_exc()
        status = FAILED
    return leave(status)


if __name__ == "__main__":
    restart_with_huge_pages()
    outlive_terminal()
    sys.exit(main())
