"""What the command says when it ends with an error."""

from retrack_jax.main import main


def error_of(capsys, argv: list[str] | None = None) -> str:
    """Returns the one line of the error with which the command `argv` ends, or of the last one that ended."""
    assert argv is None or main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line
