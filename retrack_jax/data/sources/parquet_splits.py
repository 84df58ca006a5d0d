"""Which parquet files in a folder belong to a split, by how they are named.

    train-00000-of-00002.parquet, data/train-00000-of-00002.parquet     the name is the split
    x-train.parquet, train_images.parquet                               the split is the first or last word of the name
    default/train/0000.parquet, default/partial-train/0000.parquet      the split is a folder (the hub's refs/convert/parquet)
    a.parquet, 0000.parquet                                             no file names a split: all are `train`

Files of another split are never read. Files of one split in two folders, or with different names around the split, are different
configs of the data set, which may share images: they are refused.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath

from retrack_jax.checks import UserError

_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")  # older ones end in a hash
_SPLIT_OF = {word: split for split, words in _SYNONYMS.items() for word in words}


def parquet_files(folder, split: str = "train") -> list[Path]:
    """Returns the parquet files of `split` in `folder` and below it, sorted by path; hidden ones are left out.

    Args:
      folder: a folder, or one file, which is taken whatever its name.

    Raises:
      UserError: there is none, or there are several configs.
    """
    folder = Path(folder).expanduser()
    if folder.is_file():
        return [folder]
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.parquet"))
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    chosen, configs = _of_split(paths, split)
    if not chosen:
        others = sorted({name for path in paths if (name := _named_split(path)[0])})
        there = f", which has {', '.join(others)}" if others else ""
        raise UserError(
            f"no {split}-*.parquet in {folder} or below it{there}; set config.data.dir or config.data.split, or see "
            "config.mode=check for the download"
        )
    if len(set(configs)) > 1:
        shown = ", ".join(f"{path.as_posix()}" for path in dict(zip(configs, chosen, strict=True)).values())
        raise UserError(
            f"{folder} holds {len(set(configs))} configs of a data set with split {split} ({shown}); set config.data.dir to the "
            "folder or file of one of them"
        )
    _check_shards(folder, chosen)
    return [folder / path for path in chosen]


def _check_shards(folder: Path, paths: Sequence[PurePath]) -> None:
    """Raises `UserError` unless all N files are there where names say "of N": an image is named by its row over all of them."""
    shards: dict[PurePath, list[tuple[int, int]]] = {}
    for path in paths:
        if shard := _SHARD.search(path.stem):
            shards.setdefault(path.parent / _stem(path), []).append((int(shard[1]), int(shard[2])))
    for name, numbers in shards.items():
        total = max(total for _, total in numbers)
        if sorted(numbers) != [(index, total) for index in range(total)]:
            there = ", ".join(f"{index} of {of}" for index, of in sorted(numbers)[:8])
            raise UserError(
                f"{folder / name}-*.parquet are not the files 0 to {total - 1} of {total} (there are {there}); download the "
                "missing ones, or remove those of another version"
            )


@lru_cache
def files_of_split(split: str) -> Callable[[Iterable[str]], list[str]]:
    """Returns a function that picks from the paths of a data set's files those of `split`: the same object for one split."""

    def choose(paths: Iterable[str]) -> list[str]:
        return [str(path) for path in _of_split([PurePosixPath(path) for path in paths if path.endswith(".parquet")], split)[0]]

    return choose


def _of_split(paths: Sequence[PurePath], split: str) -> tuple[list[PurePath], list[tuple]]:
    """(the files of `split`, the config of each)."""
    exact = [path for path in paths if _stem(path) == split or split in path.parent.parts]
    wanted = _SPLIT_OF.get(split, split)
    named = [path for path in paths if _named_split(path)[0] == wanted]
    if exact and not named:  # a split with a name that is none of the usual ones
        return exact, [tuple(part for part in path.parent.parts if part != split) for path in exact]
    if not named and wanted == "train" and not any(_named_split(path)[0] for path in paths):
        return list(paths), [_without_shards(path.parent.parts) for path in paths]
    return named, [_named_split(path)[1] for path in named]


def _named_split(path: PurePath) -> tuple[str | None, tuple]:
    """(the split that the path of a file names, or None; the rest of the path, which identifies the config)."""
    # Of NAME-00000-of-00002 all of NAME may be the split: `train_extra` is not `train`.
    between = "-" if _SHARD.search(path.stem) else r"[-_. ]+"
    words = [word for word in re.split(between, _stem(path)) if not word.isdigit()]
    for position in (0, -1):
        if words and any(part in _SPLIT_OF for part in re.split(r"[_. ]+", words[position].lower())):
            split = words.pop(position)
            return _SPLIT_OF.get(split.lower(), split), (*_without_shards(path.parent.parts), *words)
    folders = list(path.parent.parts)
    for position in reversed(range(len(folders))):
        name = folders[position].lower().removeprefix("partial-")
        if name in _SPLIT_OF:
            del folders[position]
            return _SPLIT_OF[name], _without_shards(folders)
    return None, ()


def _stem(path: PurePath) -> str:
    """The name without the number of a shard: `train` of `train-00000-of-00002.parquet`."""
    return re.sub(r"(^|[-_. ]+)\d+$", "", _SHARD.sub("", path.stem))


def _without_shards(folders: Sequence[str]) -> tuple[str, ...]:
    """The folders that may name a config: not numbers, nor `key=value` of a partition."""
    return tuple(name for name in folders if not name.isdigit() and "=" not in name)
