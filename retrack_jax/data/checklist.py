"""The list that config.mode=check prints: each file that a config needs, found (size, digest) or missing, with the command that
gets it; settings that are empty; targets that do not exist.

Nothing is downloaded here. `launch/download.sh` runs the commands that this prints.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from retrack_jax.checks import UserError
from retrack_jax.data.left_out import resolve_remaining, split_held_out, without
from retrack_jax.data.needs import Requirement, requirement
from retrack_jax.data.required_model import checkpoint_parts, metric_networks
from retrack_jax.data.sources.load import known_names
from retrack_jax.data.sources.table import SOURCES, complete_fields
from retrack_jax.data.target_names import parts_of, target_specs

_SHOWN = 4  # files of one command
GET = "get it: "  # launch/download.sh looks for this
_OTHERS = "other files are in its folder, which a download could replace; set the field to a new folder, and run this again"


def requirements(config: dict, unset: Mapping[str, str] = MappingProxyType({})) -> list[Requirement]:
    """Returns what a config needs in addition to this package.

    Args:
      config: the options as nested plain dicts.
      unset: the fields that must still be set, each with what to do about it; they head the list.

    Raises:
      UserError: the config names no source that exists.
    """
    data = complete_fields(config["data"])
    needed = [Requirement(description="setting", path=Path(name), found=False, advice=todo) for name, todo in unset.items()]
    needed += checkpoint_parts(config.get("checkpoint", ""), data["source"])
    needed += () if "config.data.dir" in unset else _files_of_data(data, config)
    needed += () if SOURCES[data["source"]].gives_concepts else _targets(data, target_specs(config["targets"]))
    return needed + list(metric_networks(config["eval"]))


def print_requirements(config: dict, unset: Mapping[str, str] = MappingProxyType({})) -> list[Requirement]:
    """Prints `requirements(config, unset)` and returns them: a line for each that is found, then those that are missing.

    What one command gets, or one advice is about, stands together above it; of many files the first few are named.
    """
    needed = requirements(config, unset)
    groups: dict[tuple[str, str], list[Requirement]] = {}
    for item in needed:
        if item.found:
            many = f"{item.files} files, " if item.files > 1 else ""
            print(f"found    {item.description}: {item.path} ({many}{_size(item.size)}, sha256 {item.digest[:16]})")
        else:
            groups.setdefault((item.command, item.advice), []).append(item)
    for (command, advice), items in groups.items():
        for item in items[:_SHOWN]:
            without = f" (without it {item.without})" if item.without else ""
            print(f"missing  {item.description}: {item.path}{without}")
        if len(items) > _SHOWN:
            print(f"missing  and {len(items) - _SHOWN} more of these")
        print(f"         {GET}{command}" if command else f"         {advice or _OTHERS}")
    missing = sum(not item.found for item in needed)
    if not needed:
        print("nothing is needed: data and model are made here")
    else:
        print(f"{len(needed) - missing} found, {missing} missing")
    return needed


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _files_of_data(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    try:
        yield from SOURCES[data["source"]].needs(data, config)
    except UserError as error:  # config.data.dir is empty
        yield Requirement(description="images", path=Path("config.data.dir"), found=False, advice=str(error))


def _targets(data: dict, specs: list[str]) -> Iterator[Requirement]:
    """The lists that targets name; and each target that does not exist, if names are known before decoding."""
    lists = {part for spec in specs for part in parts_of(spec) if part.startswith("@")}
    found = {name: Path(name[1:]).expanduser().is_file() for name in sorted(lists)}
    for name, here in found.items():
        path = Path(name[1:]).expanduser()
        yield requirement("list of targets", path, [path] if here else [], advice="write one name per line into it")
    try:
        images = known_names(data)
    except UserError:  # the images are on the list as missing
        return
    if images is None:
        return
    try:
        training, _ = split_held_out(images, data["held_out"])
        remaining = without(training, data["exclude"])
    except UserError as error:
        yield Requirement(description="images that are left", path=Path(data["dir"]), found=False, advice=str(error))
        return
    for spec in (spec for spec in specs if all(found.get(part, True) for part in parts_of(spec))):
        try:
            resolve_remaining(spec, remaining, training)
        except UserError as error:
            yield Requirement(description="target", path=Path(spec), found=False, advice=str(error))
