"""Flags to a config: every mistake becomes one line that names the nearest right thing. Imports nothing heavy."""

import sys
import traceback
from pathlib import Path

from retrack_jax.checks import UserError, check, nearest_names, suggestion

USAGE = """\
usage: python -m retrack_jax.main --config=configs/NAME.py[:METHOD] [--workdir=DIR] [--config.FIELD=VALUE ...]

METHOD   retrack (default), siss, siss_no_is, erasediff, neggrad, vanilla, retrain, pretrained, or all
DIR      a folder or gs:// address, runs/NAME by default; the same command again continues where it stopped
FIELD    any field of the config, such as
           mode             run (default: every stage that is not done), pretrain, unlearn, sample, eval, report, check
           seeds, targets   a sweep, such as --config.seeds=0,1,2 --config.targets=10001.jpg,10002.jpg;
                            one target may be a+b+c, @list.txt, a glob, label:7 or random:0.05
           checkpoint       a diffusers folder with the pretrained model

retrack_jax/config/options.py lists the fields with their units and sources. A method's own options are
config.unlearn.METHOD.FIELD, such as --config.unlearn.retrack.lam=0.01; that spelling also overrides a shared field for it.
Exit status: 0 done, 2 something you can fix, 75 preempted."""


# Fields that had another name before a method's options were its own.
_RENAMED = {
    "config.unlearn.lam": "config.unlearn.retrack.lam (ReTrack's weight) or --config.unlearn.siss.mixture (SISS's mixture)",
    "config.unlearn.lam_schedule": "config.unlearn.retrack.lam_schedule or --config.unlearn.siss.mixture_schedule",
    "config.unlearn.lam_end": "config.unlearn.retrack.lam_end or --config.unlearn.siss.mixture_end",
    "config.unlearn.siss_scale": "config.unlearn.siss.scale (and --config.unlearn.siss_no_is.scale)",
    "config.unlearn.siss_share": "config.unlearn.siss.share (and --config.unlearn.siss_no_is.share)",
    "config.unlearn.erasediff_eta": "config.unlearn.erasediff.eta",
    "config.recipes": "config.unlearn.METHOD.FIELD",
}


def parse(argv: list[str]):
    """Returns (config, workdir) for the command line, `argv[0]` being the program.

    Raises:
      UserError: an unknown flag, config file, field or method, or a value of the wrong kind.
    """
    from absl import flags
    from ml_collections import config_flags

    from retrack_jax.cli.process import import_jax

    argv = [_quoted(argument) for argument in argv]
    config_flag = _only(argv, "--config=")
    path, _, _ = config_flag.partition(":")
    _check_file(Path(path))
    import_jax()  # config files import it
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "the config file", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "where results go", flag_values=values)
    try:
        rest = values(argv, known_only=False)
        config = values.config
        _ = config.name  # a config file that fails to load raises only when it is used
    except Exception as error:
        raise UserError(_place_in_config(error, path) or _explained(error, argv, config_flag)) from error
    check(len(rest) == 1, f"{rest[1:2]} is no flag; flags begin with --, and a value follows =")
    given = {argument.partition("=")[0].lstrip("-") for argument in argv[1:]}
    if "config.method" in given:
        raise UserError(f"name the method behind the config file, --config={path}:METHOD: its own recipe comes with it there")
    _tell_overridden(given, config)
    return config, values.workdir or f"runs/{Path(path).stem}"


def _quoted(argument: str) -> str:
    """Names with commas between them as a tuple of strings: ml_collections takes `a.jpg,b.jpg` for Python that it cannot read."""
    name, _, value = argument.partition("=")
    if name not in ("--config.targets", "--config.eval.metrics") or value[:1] in ("", "(", "[", "'", '"'):
        return argument
    return f"{name}={tuple(value.split(','))!r}"


def _tell_overridden(given: set[str], config) -> None:
    """Prints a note if a shared option of the command line does not reach a method, because the config has one for it."""
    for name in sorted(given):
        field = name.removeprefix("config.unlearn.")
        if name == f"config.unlearn.{field}" and "." not in field:
            for method in (config.method,) if config.method in config.unlearn else config.unlearn:
                own = config.unlearn[method] if hasattr(config.unlearn[method], "keys") else {}
                if own.get(field) is not None and f"config.unlearn.{method}.{field}" not in given:
                    kept = f"config.unlearn.{method}.{field}={own[field]}"
                    print(f"note: {kept} wins over --{name}, for the more specific field wins", file=sys.stderr)


def _only(argv: list[str], prefix: str) -> str:
    found = [argument.removeprefix(prefix) for argument in argv if argument.startswith(prefix)]
    check(len(found) == 1, "give one --config=configs/NAME.py[:METHOD]; --help shows the usage")
    return found[0]


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    folder = path.parent if path.parent.is_dir() else Path("configs")
    near = nearest_names(path.name, [file.name for file in folder.glob("*.py")], count=1)
    hint = f"; did you mean {folder / near[0]}?" if near else f"; looked in {folder.absolute()}"
    raise UserError(f"no config file {path}{hint}")


def _place_in_config(error: Exception | None, path: str) -> str | None:
    """Says which line of the config file, or of one beside it, an error was raised at; None where it is not of theirs."""
    folder = Path(path).absolute().parent
    while error is not None:
        frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
        places = [(file, line) for file, line in frames if file.absolute().parent == folder]
        if places:
            file, line = places[-1]
            return f"config file {file}, line {line}: {type(error).__name__}: {_one_line(error)}"
        error = error.__cause__ or error.__context__  # ml_collections and absl raise others in its place
    return None


def _explained(error: Exception, argv: list[str], config_flag: str) -> str:
    from absl import flags

    if isinstance(error, flags.Error):
        return _one_line(error)
    if isinstance(error, (AttributeError, KeyError)):
        return _unknown_field(argv, config_flag, error)
    if isinstance(error, (TypeError, ValueError)):
        return f"a value given to --config does not fit: {error}"
    return f"config file {config_flag.partition(':')[0]} cannot be loaded: {type(error).__name__}: {error}"


def _unknown_field(argv: list[str], config_flag: str, error: Exception) -> str:
    """Says which override names no field, and the nearest that exists beside it."""
    import importlib.util

    path, *method = config_flag.split(":", 1)
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for argument in argv:
        if argument.startswith("--config."):
            node, walked = module.get_config(*method), "config"
            for name in argument.removeprefix("--config.").partition("=")[0].split("."):
                if f"{walked}.{name}" in _RENAMED:
                    return f"--{walked}.{name} is --{_RENAMED[f'{walked}.{name}']} now"
                if not hasattr(node, "keys") or name not in node:
                    choices = list(node.keys()) if hasattr(node, "keys") else []
                    return f"there is no field {walked}.{name}{suggestion(name, choices)}"
                node, walked = node[name], f"{walked}.{name}"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
