"""What a config needs: each file found (size, digest) or missing, with the command that gets it; settings, and names to forget.

Nothing is downloaded here. `launch/download.sh` runs the commands that this prints.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from retrack_jax.checks import UserError
from retrack_jax.data.downloads import KAGGLE, hub, unzip
from retrack_jax.data.required_model import checkpoint_parts, metric_networks
from retrack_jax.data.requirement import Requirement, if_file, matching, requirement
from retrack_jax.data.sources.concepts import CLASSIFIER, INFO, LABELS
from retrack_jax.data.sources.folder import list_images, named_images
from retrack_jax.data.sources.load import CELEBAHQ_TFDS, data_folder, data_format
from retrack_jax.data.sources.parquet import parquet_files
from retrack_jax.data.sources.tfds import find_prepared, prepare_command
from retrack_jax.data.target_names import resolve_target

GET = "get it: "  # what launch/download.sh looks for
_HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}
_READY_MADE = "claserken/mnist-with-tshirt"


def requirements(config: dict, unset: Mapping[str, str] = MappingProxyType({})) -> list[Requirement]:
    """Returns what a config needs beside this package.

    Args:
      config: as `ConfigDict.to_dict()` gives it.
      unset: the fields that must still be set, each with what to do about it; they head the list.

    Raises:
      UserError: the config names no source that exists.
    """
    data, specs = config["data"], _specs(config["targets"])
    needed = [Requirement(description="setting", path=Path(name), found=False, advice=todo) for name, todo in unset.items()]
    needed += checkpoint_parts(config.get("checkpoint", ""), data["source"])
    if data["source"] == "concepts":
        needed += _concepts(data, specs, config["eval"])
    else:
        needed += () if "config.data.dir" in unset else _images(data)
        needed += _targets(data, specs)
    return needed + list(metric_networks(config["eval"]))


def print_requirements(config: dict, unset: Mapping[str, str] = MappingProxyType({}), file=None) -> list[Requirement]:
    """Prints `requirements(config, unset)`, one line each and under what is missing the command or advice; returns them."""
    file = file or sys.stdout
    needed = requirements(config, unset)
    for item in needed:
        if item.found:
            many = f"{item.files} files, " if item.files > 1 else ""
            print(f"found    {item.description}: {item.path} ({many}{_size(item.size)}, sha256 {item.digest[:16]})", file=file)
        else:
            without = f" (without it {item.without})" if item.optional else ""
            print(f"missing  {item.description}: {item.path}{without}", file=file)
            print(f"         {GET}{item.command}" if item.command else f"         {item.advice}", file=file)
    missing = sum(not item.found for item in needed)
    if not needed:
        print("nothing is needed: data and model are made here", file=file)
    else:
        print(f"{len(needed) - missing} found, {missing} missing", file=file)
    return needed


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _images(data: dict) -> Iterator[Requirement]:
    source = data["source"]
    format = data_format(source, data.get("format", ""))
    if format == "embedded":
        return
    try:
        folder = data_folder(source, format, data.get("dir", ""))
    except UserError as error:
        yield Requirement(description="images", path=Path("config.data.dir"), found=False, advice=str(error))
        return
    advice, split = "set config.data.dir", data.get("split", "train")
    if format == "tfds":
        yield from _prepared_sets(source, data.get("tfds_name", ""), folder, split)
    elif format == "npz":
        yield requirement("images", folder, if_file(folder), advice=advice)
    elif format == "folder":
        command = unzip(f"{KAGGLE}-datasets", "data/datasets/celeba_hq_256", folder) if source == "celebahq" else ""
        yield requirement("images", folder, _folder_images(folder), command=command, advice=advice)
    elif source == "mnist_tshirt":
        ready_made = not (folder / "mnist").is_dir() and _parquet(folder, _READY_MADE, "train")
        if ready_made and ready_made.found:
            yield ready_made
        else:
            yield from (_parquet(folder / name, _HUB[name], "train") for name in ("mnist", "fashion_mnist"))
    else:
        yield _parquet(folder, _HUB.get(source, ""), split)


def _folder_images(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in list_images(folder)]
    except UserError:
        return []


def _parquet(folder: Path, repository: str, split: str) -> Requirement:
    command = hub(f"{repository} --repo-type=dataset", folder) if repository else ""
    description = f"{'training' if split == 'train' else split} images (parquet)"
    try:
        return requirement(description, folder, parquet_files(folder, split), command=command)
    except UserError as error:
        return Requirement(description=description, path=folder, found=False, command=command, advice=str(error))


def _prepared_sets(source: str, tfds_name: str, folder: Path, split: str) -> Iterator[Requirement]:
    if source == "mnist_tshirt":
        yield from (_tfds(name, folder, "train") for name in ("mnist", "fashion_mnist"))
        return
    name = {"cifar10": "cifar10", "celebahq": CELEBAHQ_TFDS}.get(source, tfds_name)
    if name:
        yield _tfds(name, folder, split)
    else:
        advice = "set it to a prepared TFDS data set, such as mnist"
        yield Requirement(description="setting", path=Path("config.data.tfds_name"), found=False, advice=advice)


def _tfds(name: str, data_dir: Path, split: str) -> Requirement:
    try:
        prepared = find_prepared(name, data_dir)
        found = matching(prepared, f"*-{split}.array_record*")
    except UserError as error:
        manual = " (put data256x256.tar into DATA_DIR/downloads/manual first)" if name == CELEBAHQ_TFDS else ""
        return Requirement(
            description=f"TFDS {name}{manual}",
            path=data_dir / name,
            found=False,
            command=prepare_command(name, data_dir),
            advice=str(error),
        )
    return requirement(f"TFDS {name}, {split}", prepared, found, advice="it has no such split; set config.data.split")


def _specs(targets) -> list[str]:
    return [part.strip() for target in targets for part in str(target).split(",") if part.strip()]


def _targets(data: dict, specs: list[str]) -> Iterator[Requirement]:
    """The lists that targets name; and each target that is not there, where names are known without decoding (a folder)."""
    lists = {part for spec in specs for part in _parts(spec) if part.startswith("@")}
    found = {name: Path(name[1:]).expanduser().is_file() for name in sorted(lists)}
    for name, here in found.items():
        path = Path(name[1:]).expanduser()
        yield requirement("list of targets", path, [path] if here else [], advice="write one name per line into it")
    if not data.get("dir") or data_format(data["source"], data.get("format", "")) != "folder":
        return
    try:
        images = named_images(data["dir"], data["source"])
    except UserError:  # the images are on the list as missing
        return
    for spec in (spec for spec in specs if all(found.get(part, True) for part in _parts(spec))):
        try:
            resolve_target(spec, images)
        except UserError as error:
            yield Requirement(description="target", path=Path(spec), found=False, advice=str(error))


def _parts(spec: str) -> list[str]:
    """The members of a group; a list file may have a + in its own name."""
    whole = spec.startswith("@") and Path(spec[1:]).expanduser().is_file()
    return [spec] if whole else [part.strip() for part in spec.split("+")]


def _concepts(data: dict, specs: list[str], evaluation: dict) -> Iterator[Requirement]:
    folder = Path(data.get("dir", "")).expanduser()
    prompts = [f"data/datasets/{kind}_prompts.json" for kind in ("original", "modified")]
    command = unzip(f"{KAGGLE}-datasets", "data/datasets/sd", folder, *prompts)
    for field in ("original_prompts", "modified_prompts"):
        path = folder / Path(data.get(field) or f"{field}.json").expanduser()
        yield requirement(f"{field.replace('_', ' ')}", path, if_file(path), command=command)
    scored = any(metric.startswith("success_rate") for metric in evaluation["metrics"])
    for name in specs:
        pictures = matching(folder / name, "images/*")
        parts = [if_file(folder / name / file) for file in (LABELS, INFO)]
        found = sorted(pictures + sum(parts, [])) if pictures and all(parts) else []
        yield requirement(f"concept {name}", folder / name, found, command=command)
        if scored and evaluation.get("classifier") == "joblib":
            path = folder / name / CLASSIFIER
            without = "success_rate is left out, or refitted with config.eval.classifier=labels"
            yield requirement(f"classifier of {name}", path, if_file(path), command=command, without=without)
