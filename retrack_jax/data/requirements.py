"""What a config needs: each file found (size, digest) or missing, with the command that gets it; settings, and names to forget.

Nothing is downloaded here. `launch/download.sh` runs the commands that this prints.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from retrack_jax.checks import UserError
from retrack_jax.data.downloads import ALSO, KAGGLE, NETWORKS, checkpoint_command, unzip, unzip_file
from retrack_jax.data.folder_source import list_images, named_images
from retrack_jax.data.load import CELEBAHQ_TFDS, data_folder, data_format
from retrack_jax.data.targets import resolve_target
from retrack_jax.data.tfds_source import find_prepared, prepare_command
from retrack_jax.files import file_digest

_WEIGHTS = ("diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin", "pytorch_model*.bin")
GET = "get it: "  # what launch/download.sh looks for


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A file, or a folder of them, that a config reads.

    Attributes:
      description: what it is.
      path: where it is, or was looked for.
      found: whether it is there.
      files: how many files it is.
      size: bytes in all.
      digest: SHA-256 of the file; of names and sizes where it is many files.
      command: the shell command that gets it; empty where `advice` says what to do instead.
      advice: what to do, in words.
      optional: whether only some metrics need it, which are left out without it.
    """

    description: str
    path: Path
    found: bool
    files: int = 0
    size: int = 0
    digest: str = ""
    command: str = ""
    advice: str = ""
    optional: bool = False


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
    needed += _checkpoint(config.get("checkpoint", ""), data["source"])
    if data["source"] == "concepts":
        needed += _concepts(data, specs)
    else:
        needed += () if "config.data.dir" in unset else _images(data)
        needed += _targets(data, specs)
    return needed + list(_metric_weights(config["eval"]))


def print_requirements(config: dict, unset: Mapping[str, str] = MappingProxyType({}), file=None) -> list[Requirement]:
    """Prints `requirements(config, unset)`, one line each and under what is missing the command or advice; returns them."""
    file = file or sys.stdout
    needed = requirements(config, unset)
    for item in needed:
        if item.found:
            many = f"{item.files} files, " if item.files > 1 else ""
            print(f"found    {item.description}: {item.path} ({many}{_size(item.size)}, sha256 {item.digest[:16]})", file=file)
        else:
            metrics = " (without it its metrics are left out)" if item.optional else ""
            print(f"missing  {item.description}: {item.path}{metrics}", file=file)
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


def _item(description: str, path: Path, found: list[Path], **how) -> Requirement:
    if not found:
        return Requirement(description=description, path=path, found=False, **how)
    sizes = [entry.stat().st_size for entry in found]
    if len(found) == 1:
        return Requirement(
            description=description, path=found[0], found=True, files=1, size=sizes[0], digest=file_digest(found[0]), **how
        )
    listing = "".join(f"{entry.relative_to(path)}\0{size}\n" for entry, size in zip(found, sizes, strict=True))
    digest = hashlib.sha256(listing.encode()).hexdigest()
    return Requirement(description=description, path=path, found=True, files=len(found), size=sum(sizes), digest=digest, **how)


def _glob(folder: Path, *patterns: str) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _checkpoint(checkpoint: str, source: str) -> Iterator[Requirement]:
    if not checkpoint:
        return
    folder = Path(checkpoint).expanduser()
    how = {"command": checkpoint_command(source, folder), "advice": "set config.checkpoint to a folder that diffusers saved"}
    parts = ("unet", "vae", "text_encoder") if source == "concepts" else ("unet", "unet_ema", ".")
    present = [part for part in parts if (folder / part / "config.json").is_file()]
    for part in parts if source == "concepts" else present[:1] or (".",):
        config = folder / part / "config.json"
        name = "model" if part == "." else part
        yield _item(f"{name} config", config, [config] if config.is_file() else [], **how)
        patterns = (*_WEIGHTS, "model*.safetensors") if part == "text_encoder" else _WEIGHTS
        yield _item(f"{name} weights", folder / part, _glob(folder / part, *patterns), **how)
    if source == "concepts":
        for name in ("vocab.json", "merges.txt"):
            yield _item("tokenizer", folder / "tokenizer" / name, _glob(folder / "tokenizer", name), **how)


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
    advice = "set config.data.dir"
    if format == "tfds":
        names = {"mnist_tshirt": ("mnist", "fashion_mnist"), "cifar10": ("cifar10",), "celebahq": (CELEBAHQ_TFDS,)}
        for name in names.get(source, (data.get("tfds_name", ""),)):
            yield _tfds(name, folder)
    elif format == "npz":
        yield _item("images", folder, [folder] if folder.is_file() else [], advice=advice)
    elif format == "folder":
        command = unzip(f"{KAGGLE}-datasets", "data/datasets/celeba_hq_256", folder) if source == "celebahq" else ""
        yield _item("images", folder, _folder_images(folder), command=command, advice=advice)
    elif source == "mnist_tshirt" and not _glob(folder, "*.parquet", "data/*.parquet"):
        for name, repository in (("mnist", "ylecun/mnist"), ("fashion_mnist", "zalando-datasets/fashion_mnist")):
            yield _parquet(folder / name, repository, advice)
    else:
        repository = {"cifar10": "uoft-cs/cifar10", "mnist_tshirt": "claserken/mnist-with-tshirt"}.get(source, "")
        yield _parquet(folder, repository, advice)


def _folder_images(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in list_images(folder)]
    except UserError:
        return []


def _parquet(folder: Path, repository: str, advice: str) -> Requirement:
    found = [folder] if folder.is_file() else _glob(folder, "**/train*.parquet") or _glob(folder, "**/*.parquet")
    command = f"hf download {repository} --repo-type=dataset --local-dir {folder}" if repository else ""
    return _item("training images (parquet)", folder, found, command=command, advice=advice)


def _tfds(name: str, data_dir: Path) -> Requirement:
    try:
        found = _glob(find_prepared(name, data_dir), "*.array_record*")
    except UserError as error:
        manual = " (put data256x256.tar into DATA_DIR/downloads/manual first)" if name == CELEBAHQ_TFDS else ""
        return Requirement(
            description=f"TFDS {name}{manual}",
            path=data_dir / name,
            found=False,
            command=prepare_command(name, data_dir),
            advice=str(error),
        )
    return _item(f"TFDS {name}", found[0].parent, found)


def _specs(targets) -> list[str]:
    return [part.strip() for target in targets for part in str(target).split(",") if part.strip()]


def _targets(data: dict, specs: list[str]) -> Iterator[Requirement]:
    """The lists that targets name; and each target that is not there, where names are known without decoding (a folder)."""
    lists = {part for spec in specs for part in _parts(spec) if part.startswith("@")}
    found = {name: Path(name[1:]).expanduser().is_file() for name in sorted(lists)}
    for name, here in found.items():
        path = Path(name[1:]).expanduser()
        yield _item("list of targets", path, [path] if here else [], advice="write one name a line into it")
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


def _concepts(data: dict, specs: list[str]) -> Iterator[Requirement]:
    folder = Path(data.get("dir", "")).expanduser()
    prompts = [f"data/datasets/{kind}_prompts.json" for kind in ("original", "modified")]
    command = unzip(f"{KAGGLE}-datasets", "data/datasets/sd", folder, *prompts)
    for field in ("original_prompts", "modified_prompts"):
        path = folder / Path(data.get(field) or f"{field}.json").expanduser()
        yield _item(f"{field.replace('_', ' ')}", path, [path] if path.is_file() else [], command=command)
    for name in specs:
        pictures = _glob(folder / name, "images/*")
        parts = [_glob(folder / name, file) for file in ("kmeans_labels.json", "clustering_info.json")]
        found = sorted(pictures + sum(parts, [])) if pictures and all(parts) else []
        yield _item(f"concept {name}", folder / name, found, command=command)


_USES_INCEPTION = ("fid", "kid", "precision", "recall", "inception_score")
_CLASS_SCORES = ("inception_score", "inception_score_official")
_MNIST_FILE = "mnist.pt"


def _metric_weights(evaluation: dict) -> Iterator[Requirement]:
    folder = Path(evaluation["weights_dir"]).expanduser()
    metrics = set(evaluation["metrics"])
    classifier = evaluation.get("score_network") == "mnist_resnet" and metrics & set(_CLASS_SCORES)
    by_features = metrics & set(_USES_INCEPTION) - (set(_CLASS_SCORES) if classifier else set())
    wanted = ["inception"] if evaluation.get("features") == "inception" and by_features else []
    wanted += ["sscd"] if any(metric.startswith("sscd") for metric in metrics) else []
    wanted += ["CLIP RN50"] if any(metric.startswith("clip_iqa") for metric in metrics) else []
    for network in wanted:
        name, url = NETWORKS[network]
        command = f"curl -fL --connect-timeout 10 --create-dirs -o {folder / name} '{url}'"
        found = next((files for kind in (name, *ALSO[network]) if (files := _glob(folder, kind))), [])
        yield _item(f"feature network {network}", folder / name, found, command=command, optional=True)
    if classifier:
        command = unzip_file(f"{KAGGLE}-checkpoints", f"checkpoints/classifiers/{_MNIST_FILE}", folder)
        found = _glob(folder, _MNIST_FILE)
        yield _item("classifier MNIST ResNet-18", folder / _MNIST_FILE, found, command=command, optional=True)
