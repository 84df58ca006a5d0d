"""Flags to a config: every mistake becomes one line that names the nearest right thing. Imports nothing heavy."""

import runpy
import sys
import traceback
from pathlib import Path

from retrack_jax.checks import UserError, check, nearest_names

USAGE = """\
usage: retrack --config=NAME[:METHOD] [--workdir=DIR] [--config.FIELD=VALUE ...]

`python -m retrack_jax.main` is the same command.

NAME     a config that comes with the package (celebahq, cifar10, custom, digits_class, digits_flow, digits_label,
         digits_random, digits_tshirt, mnist5k_tshirt, mnist_tshirt, stable_diffusion), or the path of a config file
METHOD   retrack (default), siss, siss_no_is, erasediff, neggrad, vanilla, retrain, pretrained, or all
DIR      a folder or gs:// address, runs/NAME by default; the same command again continues where it stopped
FIELD    any field of the config, such as
           mode             run (default: every stage that is not done), pretrain, unlearn, sample, eval, report, check
           seeds, targets   a sweep, such as --config.seeds=0,1,2 --config.targets=10001.jpg,10002.jpg;
                            one target may be a+b+c, @list.txt, a glob, label:7 or random:0.05
           checkpoint       the pretrained model: a diffusers folder, or its name on the Hugging Face hub (org/name)

docs/config.md of the repository lists the fields with their defaults. A method's own options are
config.unlearn.METHOD.FIELD, such as --config.unlearn.retrack.lam=0.01; that spelling also overrides a shared field for it.
Exit status: 0 done, 2 something you can fix, 75 preempted."""


def parse(argv: list[str]):
    """Returns (config, workdir) for the command line, `argv[0]` being the program.

    Raises:
      UserError: an unknown flag, config file, field or method, or a value of the wrong kind.
    """
    from absl import flags
    from ml_collections import config_flags

    from retrack_jax.cli.process import import_jax

    argv = [_quoted(argument) for argument in _joined(argv)]
    named = [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]
    check(len(named) == 1, "give one --config=NAME[:METHOD]; --help shows the usage")
    typed = named[0]
    path, colon, method = typed.partition(":")
    file = str(_config_file(path))
    config_flag = f"{file}{colon}{method}"
    argv.remove(f"--config={typed}")
    argv.insert(1, f"--config={config_flag}")  # ml_collections wants it before the fields
    import_jax()  # config files import it
    argv, unset = _unset(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "the config file", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "where results go", flag_values=values)
    try:
        _loaded(config_flag)  # by itself: a file without get_config would be given that of the file loaded before in this process
        rest = values(argv, known_only=False)
        config = values.config
        _ = config.name  # a config file that fails to load raises only when it is used
        for field in unset:
            group, _, name = f"config.{field}".rpartition(".")
            _field(config, group)[name] = None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config file may call sys.exit
        raise UserError(_place_in_config(error, file) or _explained(error, argv, config_flag)) from error
    check(len(rest) == 1, f"{rest[1:2]} is no flag; flags begin with --, and a value follows =")
    given = {argument.partition("=")[0].lstrip("-") for argument in argv[1:]} | {f"config.{field}" for field in unset}
    if "config.method" in given:
        raise UserError(f"name the method behind the config file, --config={path}:METHOD: its own recipe comes with it there")
    if "config.sampling.preset" in given and config.sampling.preset:  # it takes the place of what the config file has
        for field in ("sampler", "num_steps"):
            if f"config.sampling.{field}" not in given:
                config.sampling[field] = None
    _tell_overridden(given, config)
    return config, values.workdir or f"runs/{Path(path).stem}"


def _joined(argv: list[str]) -> list[str]:
    """Returns `argv` with `--config FILE` as `--config=FILE`."""
    argv = list(argv)
    for place in range(len(argv) - 2, 0, -1):
        if argv[place] == "--config" and not argv[place + 1].startswith("-"):
            argv[place : place + 2] = [f"--config={argv[place + 1]}"]
    return argv


def _unset(argv: list[str]) -> tuple[list[str], list[str]]:
    """Returns `argv` without the flags that set a field to None which is None by default, and these fields."""
    from retrack_jax.config.reading import default_config

    defaults, rest, unset = default_config(), [], []
    for argument in argv:
        field = argument.removeprefix("--config.").removesuffix("=None")
        is_none = argument == f"--config.{field}=None"
        if is_none and _field(defaults, f"config.{field}", default="") is None:
            unset.append(field)
        else:
            rest.append(argument)
    return rest, unset


def _field(config, dotted: str, default=None):
    """Returns what `config.GROUP.FIELD` names in `config`, or `default` if it has no such field."""
    for name in dotted.split(".")[1:]:
        if not hasattr(config, "keys") or name not in config:
            return default
        config = config[name]
    return config


def _quoted(argument: str) -> str:
    """Names with commas between them as a tuple of strings: ml_collections takes `a.jpg,b.jpg` for Python that it cannot read."""
    name, _, value = argument.partition("=")
    names = ("--config.targets", "--config.eval.metrics", "--config.unlearn.lora.layers")
    if name not in names or value[:1] in ("", "(", "[", "'", '"'):
        return argument
    return f"{name}={tuple(value.split(','))!r}"


def _tell_overridden(given: set[str], config) -> None:
    """Prints a note if an option of the command line does not reach a method: the config has one for it, or it trains anew."""
    from retrack_jax.unlearn.methods import RETRAIN

    if config.method == RETRAIN and (unread := sorted(name for name in given if name.startswith("config.unlearn."))):
        print(f"note: {RETRAIN} reads config.pretrain, and not --{', --'.join(unread)}", file=sys.stderr)
    for name in sorted(given):
        field = name.removeprefix("config.unlearn.")
        if name == f"config.unlearn.{field}" and "." not in field:
            for method in (config.method,) if config.method in config.unlearn else config.unlearn:
                own = config.unlearn[method] if hasattr(config.unlearn[method], "keys") else {}
                if own.get(field) is not None and f"config.unlearn.{method}.{field}" not in given:
                    kept = f"config.unlearn.{method}.{field}={own[field]}"
                    print(f"note: {kept} wins over --{name}, for the more specific field wins", file=sys.stderr)


def _config_file(typed: str) -> Path:
    """Returns the config file that `typed` means: a path, or the name of a config that comes with the package.

    Raises:
      UserError: there is no such file; the message has the nearest one.
    """
    path, package = Path(typed), Path(__file__).parents[1]
    if path.is_file():
        check(path.suffix == ".py", f"config file {path} does not end in .py; give --config=FILE.py[:METHOD]")
        return path
    # Next to the package in a clone, inside it once it is installed.
    folder = next(place for place in (package / "configs", package.parent / "configs") if place.is_dir())
    shipped = {file.name: file for file in folder.glob("[!_]*.py")}
    if path.name == typed and f"{path.stem}.py" in shipped:
        return shipped[f"{path.stem}.py"]
    names = {name: name.removesuffix(".py") for name in shipped}
    if path.parent != Path("."):
        names |= {file.name: str(file) for file in path.parent.glob("*.py")}
    what = f"{path} is a folder, no config file" if path.is_dir() else f"no config file {path}"
    near = nearest_names(f"{path.stem.strip()}.py", names, count=1) if path.stem and not path.is_dir() else []
    looked = " and ".join(str(place.absolute()) for place in dict.fromkeys((path.parent, folder)))
    raise UserError(f"{what}; did you mean {names[near[0]]}?" if near else f"{what}; give --config=FILE.py ({looked})")


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

    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error.flagname, config_flag)
    for argument in argv:
        if argument.startswith("--config.") and "-" in (name := argument[2:].partition("=")[0]):
            return f"there is no field {name}; did you mean --{name.replace('-', '_')}?"
    if isinstance(error, flags.Error):
        return _one_line(error)
    if isinstance(error, (AttributeError, KeyError)):
        return _unknown_field(argv, config_flag, error)
    if isinstance(error, (TypeError, ValueError)):
        return f"a value given to --config does not fit: {error}"
    return f"config file {config_flag.partition(':')[0]} cannot be loaded: {type(error).__name__}: {error}"


def _loaded(config_flag: str):
    """Returns the config of a `--config` flag without its overrides."""
    path, *method = config_flag.split(":", 1)
    defined = runpy.run_path(path)
    check("get_config" in defined, f"config file {path} has no function get_config(method)")
    config = defined["get_config"](*method)
    check(hasattr(config, "keys"), f"get_config of config file {path} returns {config!r}; it must return the config")
    return config


def _unknown_flag(name: str, config_flag: str) -> str:
    """Says which field was meant by a flag that there is not."""
    if name in ("dir", "out", "output", "output_dir", "work-dir", "work_dir"):
        return f"there is no flag --{name}; did you mean --workdir?"
    if name == "method":
        return f"there is no flag --method; name it behind the config file, --config={config_flag.partition(':')[0]}:METHOD"
    return f"there is no flag --{name}{_meant('seeds' if name == 'seed' else name, _loaded(config_flag))}"


# What other programs call the fields that have another name here.
_ALIASES = {
    "lr": "learning_rate", "steps": "num_steps", "num_samples": "num_images", "n_samples": "num_images", "path": "dir",
    "data_dir": "dir", "lambda": "lam", "k": "num_neighbors", "bs": "batch_size", "model_path": "checkpoint", "forget": "targets",
    "pretrained_model_name_or_path": "checkpoint", "image_size": "resolution", "gradient_accumulation_steps": "accumulation",
}  # fmt: skip


def _meant(name: str, config) -> str:
    """Returns a hint: the fields anywhere in the config that `name`, a flag or a dotted field, may mean; "" if there are none."""
    last = name.replace("-", "_").rpartition(".")[2]
    last = _ALIASES.get(last, last)
    fields = _leaves(config)
    group = name.replace("-", "_").removeprefix("config.").rpartition(".")[0]
    same = [field for field in fields if field.rpartition(".")[2] == last]
    same = [field for field in same if group and f".{group}." in field] or same
    if not same:
        near = nearest_names(last, dict.fromkeys(field.rpartition(".")[2] for field in fields), count=1)
        same = [field for field in fields if near and field.rpartition(".")[2] == near[0]]
    fewest = [field for field in same if field.count(".") == min(map(str.count, same, "." * len(same)))]
    return f"; did you mean {' or '.join(f'--{field}' for field in fewest[:4])}?" if fewest else ""


def _leaves(node, walked: str = "config") -> list[str]:
    """Every field by its dotted name; those of a method only if they are its own."""
    if not hasattr(node, "keys"):
        return [walked]
    shared = set(node.keys()) if walked == "config.unlearn" else set()
    inner = {name: _leaves(node[name], f"{walked}.{name}") for name in node.keys()}
    leaves = [leaf for below in inner.values() for leaf in below]
    return [leaf for leaf in leaves if leaf.count(".") < 3 or leaf.rpartition(".")[2] not in shared]


def _unknown_field(argv: list[str], config_flag: str, error: Exception) -> str:
    """Says which override names no field, and which fields may be meant."""
    whole = _loaded(config_flag)
    for argument in argv:
        if argument.startswith("--config."):
            node, walked = whole, "config"
            for name in argument.removeprefix("--config.").partition("=")[0].split("."):
                if not hasattr(node, "keys") or name not in node:
                    near = nearest_names(name, node.keys() if hasattr(node, "keys") else (), count=1, cutoff=0.75)
                    given = argument.removeprefix("--").partition("=")[0]
                    hint = f"; did you mean {near[0]!r}?" if near else _meant(given, whole)
                    return f"there is no field {walked}.{name}{hint}"
                node, walked = node[name], f"{walked}.{name}"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
