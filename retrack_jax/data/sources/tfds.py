"""Data sets that TensorFlow Datasets has prepared as array_record, read through `tfds.data_source` without TensorFlow.

Nothing is downloaded here, so a missing set is an error at once. Names of images, which do not depend on how the set was
sharded:

    an `id` feature              tfds:train_20000   (CIFAR-10)
    an `image/filename` feature  10001.jpg          (CelebA-HQ: the names in the user's own tar)
    MNIST and its kin            tfds:train_1       (the row of the original file: TFDS stores rows by the hash of their
                                                     number, so sorting the hashes tells which record is which)
    else                         tfds:train_0       (the position in the prepared files)
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.data.cache import decoded_images, file_key
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement, matching, requirement
from retrack_jax.data.sources.source import Source, decode_options

KEYED_BY_ROW = ("mnist", "fashion_mnist", "kmnist")


def _data_dir(data: Mapping) -> Path:
    """`config.data.dir`, else where TFDS keeps prepared sets: TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data["dir"] or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def prepare_command(name: str, data_dir) -> str:
    """The command that downloads and prepares a set; it needs TensorFlow (`pip install tensorflow-cpu`)."""
    return f"tfds build {name} --data_dir={shlex.quote(str(data_dir))} --file_format=array_record"


def find_prepared(name: str, data_dir) -> Path:
    """Returns the folder of the newest prepared version of `name`, such as `mnist` or `celeb_a_hq/256`.

    Raises:
      UserError: it is not there, or is prepared as something else than array_record, with the command that prepares it.
    """
    folder = Path(data_dir).expanduser() / name
    get = f"prepare it with: {prepare_command(name, data_dir)} (needs TensorFlow and, to download, a network)"
    versions = [path.parent for path in folder.glob("*/dataset_info.json")]
    if not versions:
        raise UserError(f"no prepared TFDS data set {name!r} in {folder}; {get}; or set config.data.dir")
    records = [path for path in versions if any(path.glob("*.array_record*"))]
    if not records:
        raise UserError(f"{versions[0]} is not prepared as array_record, which is what can be read without TensorFlow; {get}")
    return max(records, key=lambda path: tuple(int(part) if part.isdigit() else -1 for part in path.name.split(".")))


def load_tfds(name: str, data: Mapping, rows: Sequence[int] | None = None) -> ImageSet:
    """Returns `data["split"]` of the prepared set `name`, sorted by original row or name, decoded once into the cache.

    Args:
      rows: only these of that order; None takes all.

    Raises:
      UserError: the set is missing, damaged, lacks the split or has no images; and as `decoded_images` does.
    """
    split, options, data_dir = data["split"], decode_options(data), _data_dir(data)
    folder = find_prepared(name, data_dir)
    records = sorted(folder.glob(f"*-{split}.array_record*"))
    if not records:
        raise UserError(f"{folder} has no split {split!r}; set config.data.split")
    source, features = _open(name, folder, split, records, data_dir)
    if rows is not None and max(rows) >= len(source):
        raise UserError(f"{folder} has {len(source)} images of {split}; row {max(rows)} is needed")

    def read(position, feature):
        try:
            value = source[position][feature]
        except Exception as error:  # whatever TFDS and array_record raise for damaged records
            raise _unreadable(name, folder, data_dir, f"{type(error).__name__}: {error}") from error
        if value is None:
            raise _unreadable(name, folder, data_dir, f"record {position} has no {feature}")
        return value

    @cache  # reads every record where names are in them, so only if something must be decoded
    def order() -> list[tuple[str, int]]:
        positions, ids = _order(name, split, len(source), features, read)
        return [(ids[row], int(positions[row])) for row in (range(len(ids)) if rows is None else rows)]

    def encoded() -> Iterator[tuple[str, bytes]]:
        return ((image_id, read(position, "image")) for image_id, position in order())

    return decoded_images(
        name,
        encoded,
        len(source) if rows is None else len(rows),
        options,
        cache_dir=data["cache_dir"],
        source_key=["tfds", name, split, rows, [file_key(path) for path in [folder / "dataset_info.json", *records]]],
        labels=(lambda: [read(position, "label") for _, position in order()]) if "label" in features else None,
    )


def _open(name: str, folder: Path, split: str, records: Sequence[Path], data_dir):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    def count(path: Path) -> int:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()

    try:
        builder = tfds.builder_from_directory(folder)
        # TFDS believes dataset_info.json: with more there it would list records that do not exist, with fewer leave some out.
        stored, listed = sum(map(count, records)), builder.info.splits[split].num_examples
        if stored != listed:
            raise ValueError(f"dataset_info.json lists {listed} records of {split}, the files hold {stored}")
        features = builder.info.features
        if "image" not in features:
            raise UserError(f"the TFDS data set {name!r} has no feature 'image'; it has {', '.join(features)}")
        # The encoded bytes: they are decoded in parallel, by the same rules as every other source.
        decoders = {"image": tfds.decode.SkipDecoding()}
        return builder.as_data_source(split, decoders=decoders), features
    except UserError:
        raise
    except Exception as error:  # whatever TFDS and array_record raise for a damaged folder
        raise _unreadable(name, folder, data_dir, f"{type(error).__name__}: {error}") from error


def _unreadable(name: str, folder: Path, data_dir, why: str) -> UserError:
    again = f"delete {folder} and prepare it again: {prepare_command(name, data_dir)}"  # TFDS keeps what is there
    return UserError(f"cannot read the TFDS data set in {folder} ({why}); {again}")


def _order(name: str, split: str, count: int, features, read: Callable) -> tuple[np.ndarray, list[str]]:
    """(positions in the prepared files, ids), in the order that the image set takes; `read(position, feature)` reads one."""
    for feature, pattern in (("id", "tfds:{}"), ("image/filename", "{}"), ("file_name", "{}")):
        if feature in features:
            names = [pattern.format(_text(read(row, feature))) for row in range(count)]
            order = np.argsort(np.array(names), kind="stable")
            return order, [names[row] for row in order]
    ids = [f"tfds:{split}_{row}" for row in range(count)]
    if name.split("/")[0] not in KEYED_BY_ROW:
        return np.arange(count), ids
    return positions_of_rows(count, split), ids


def positions_of_rows(count: int, split: str) -> np.ndarray:
    """Returns where TFDS stored each row of a set whose keys are the numbers 0 ... count - 1, int64 `[count]`.

    TFDS writes examples in the order of the MD5 of the split's name and their key; shards keep that order.
    """
    stored = sorted(range(count), key=lambda row: hashlib.md5(f"{split}{row}".encode()).digest())
    positions = np.empty(count, np.int64)
    positions[stored] = np.arange(count)
    return positions


def _text(value) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def tfds_need(name: str, data: Mapping, first: str = "") -> Requirement:
    """Returns the files of `data["split"]` of the prepared set `name`, found or missing; `first`: what to do before that."""
    data_dir, split = _data_dir(data), data["split"]
    try:
        prepared = find_prepared(name, data_dir)
        found = matching(prepared, f"*-{split}.array_record*")
    except UserError as error:
        description, command = f"TFDS {name}" + (f" ({first})" if first else ""), prepare_command(name, data_dir)
        return Requirement(description=description, path=data_dir / name, found=False, command=command, advice=str(error))
    return requirement(f"TFDS {name}, {split}", prepared, found, advice="it has no such split; set config.data.split")


def _load(data: Mapping) -> ImageSet:
    if not data["tfds_name"]:
        raise UserError("config.data.tfds_name is empty; set it to a prepared TFDS data set, such as mnist")
    return load_tfds(data["tfds_name"], data)


def _needs(data: Mapping, config: Mapping) -> Iterator[Requirement]:
    if data["tfds_name"]:
        yield tfds_need(data["tfds_name"], data)
    else:
        advice = "set it to a prepared TFDS data set, such as mnist"
        yield Requirement(description="setting", path=Path("config.data.tfds_name"), found=False, advice=advice)


SOURCE = Source(formats=("tfds",), load=_load, needs=_needs, reads=("dir", "split", "tfds_name"))
