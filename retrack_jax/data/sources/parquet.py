"""Hugging Face parquet files, as `hf download` leaves them: an image column of encoded bytes, and perhaps a label.

Image `hf:ROW` is row ROW over all files of the split in the order of their paths (parquet_splits.py), the numbers that the
official ReTrack code uses.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check
from retrack_jax.data import commands
from retrack_jax.data.cache import decoded_images, file_key
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement, hub_need, requirement
from retrack_jax.data.sources.captions import as_caption
from retrack_jax.data.sources.parquet_splits import files_of_split, parquet_files
from retrack_jax.data.sources.source import Source, data_folder, decode_options
from retrack_jax.weights import hub

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def load_parquet(data: Mapping, rows: Sequence[int] | None = None) -> ImageSet:
    """Returns the images (and labels, if any) of `data["split"]` in the parquet files in `data["dir"]`, in their order.

    Args:
      rows: only these, in rising order; None takes all.

    Raises:
      UserError: no file, a damaged one, no image column; and as `decoded_images` does.
    """
    split, options = data["split"], decode_options(data)
    folder = _local_folder(data)
    paths = parquet_files(folder, split)
    tables = [_open(path) for path in paths]
    image_column = _column(tables[0], paths[0], IMAGE_COLUMNS)
    label_column = _column(tables[0], paths[0], LABEL_COLUMNS, required=False)
    for table, path in zip(tables, paths, strict=True):
        for column in filter(None, (image_column, label_column)):
            _column(table, path, (column,))
    total = sum(table.metadata.num_rows for table in tables)
    rows = range(total) if rows is None else rows
    if not len(rows) or rows[-1] >= total:
        raise UserError(
            f"{paths[0].parent} has {total} rows of {split}; {len(rows)} rows up to {max(rows, default=0)} are needed"
        )
    keys = [file_key(path, None if path == folder else path.relative_to(folder).as_posix()) for path in paths]
    return decoded_images(
        data["source"],
        lambda: _encoded(tables, paths, image_column, set(rows)),
        len(rows),
        options,
        cache_dir=data["cache_dir"],
        source_key=["parquet", keys, list(rows) if len(rows) < total else "all"],
        labels=(lambda: _labels(tables, paths, label_column)[list(rows)]) if label_column else None,
    )


def _local_folder(data: Mapping) -> Path:
    """Returns the folder `data["dir"]`, or what it is the hub's id of: the files of the split, downloaded when needed."""
    if hub.is_id(data["dir"]):
        return hub.snapshot(data["dir"], files_of_split(data["split"]), "dataset")
    return data_folder(data)


def parquet_captions(data: Mapping, images: ImageSet) -> list[str]:
    """Returns the text of column `data["caption_column"]` for each of `images`, which are named `hf:ROW`.

    Raises:
      UserError: there is no such column, or a value in it is no text.
    """
    paths, column = parquet_files(_local_folder(data), data["split"]), data["caption_column"]
    tables = [_open(path) for path in paths]
    for table, path in zip(tables, paths, strict=True):
        present = ", ".join(table.schema_arrow.names)
        missing = f"{path} has no column {column!r} of captions among {present}; set config.data.caption_column"
        check(column in table.schema_arrow.names, missing)
    texts = [text for batch in _batches(tables, paths, column) for text in batch.column(0).to_pylist()]
    return [as_caption(texts[int(name.removeprefix("hf:"))], f"{paths[0].parent}, {name}") for name in images.ids]


def _open(path: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}); download it again") from error


def _column(table, path: Path, names: tuple[str, ...], required: bool = True) -> str | None:
    present = table.schema_arrow.names
    found = next((name for name in names if name in present), None)
    if found is None and required:
        raise UserError(f"{path} has no column named {' or '.join(names)}; it has {', '.join(present)}")
    return found


def _encoded(tables, paths, column: str, rows: set[int]) -> Iterator[tuple[str, bytes]]:
    start = 0
    for batch in _batches(tables, paths, column):
        wanted = [row for row in range(batch.num_rows) if start + row in rows]
        for row, value in zip(wanted, batch.column(0).take(wanted).to_pylist() if wanted else (), strict=True):
            encoded = value.get("bytes") if isinstance(value, dict) else value
            yield f"hf:{start + row}", encoded if isinstance(encoded, bytes) else b""
        start += batch.num_rows


def _labels(tables, paths, column: str) -> np.ndarray:
    import pyarrow

    parts = []
    for batch in _batches(tables, paths, column):
        labels = batch.column(0)
        if not pyarrow.types.is_integer(labels.type) or labels.null_count:
            kind = f"{labels.type}, {labels.null_count} of {len(labels)} missing" if labels.null_count else labels.type
            raise UserError(
                f"column {column!r} of {paths[0].parent} holds no whole numbers ({kind}); "
                "number the classes from 0, or remove the column"
            )
        parts.append(labels.to_numpy(zero_copy_only=False).astype(np.int64))
    return np.concatenate(parts)


def _batches(tables, paths, column: str) -> Iterator:
    """Yields the record batches of one column of every file; what pyarrow cannot read is one line that names the file."""
    for table, path in zip(tables, paths, strict=True):
        try:
            yield from table.iter_batches(batch_size=1024, columns=[column])
        except Exception as error:  # pyarrow's own kinds, OSError among them: the cache would take it for a full disk
            raise UserError(f"{path} is damaged: column {column!r} cannot be read ({error}); download it again") from error


def parquet_need(data: Mapping, repository: str = "") -> Requirement:
    """Returns the parquet files of `data["split"]`, found or missing; `repository` is the hub's data set that has them."""
    folder, split = data_folder(data), data["split"]
    if hub.is_id(data["dir"]):
        return hub_need("dataset", data["dir"], files_of_split(split))
    command = commands.hub(f"{repository} --repo-type=dataset", folder) if repository else ""
    description = f"{'training' if split == 'train' else split} images (parquet)"
    try:
        return requirement(description, folder, parquet_files(folder, split), command=command)
    except UserError as error:
        return Requirement(description=description, path=folder, found=False, command=command, advice=str(error))


SOURCE = Source(
    formats=("parquet",),
    load=load_parquet,
    needs=lambda data, config: iter([parquet_need(data)]),
    captions=parquet_captions,
    reads=("dir", "split"),
)
