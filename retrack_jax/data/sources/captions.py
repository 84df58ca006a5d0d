"""Captions of pictures in a folder: a table of them, or a text file next to each picture.

    metadata.jsonl   {"file_name": "a.png", "text": "a red circle"}, one object a line
    metadata.csv     the same with a header: file_name,text
    a.txt            the caption of a.png

A table names the pictures below its own folder. If there is any table, text files are not read.

A picture without a caption is refused: under a wrong one it would be trained to be something else. A row without a picture is
only warned about, because the picture may have been removed on purpose; if the row is misspelled, its picture has no row and is
refused.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from retrack_jax.checks import UserError, check, shown
from retrack_jax.data.dataset import ImageSet
from retrack_jax.data.needs import Requirement, requirement
from retrack_jax.data.sources.source import data_folder
from retrack_jax.data.tables import NAME, cell, composed, read_text, table_rows

TABLES = ("metadata.jsonl", "metadata.csv")
log = logging.getLogger(__name__)


def folder_captions(data: Mapping, images: ImageSet) -> list[str]:
    """Returns the caption of each of `images`, which are named by their paths below `data["dir"]`.

    Raises:
      UserError: pictures without a caption or with two, a table or text file that cannot be read, a caption that is no text.
    """
    folder, column = data_folder(data), data["caption_column"]
    rows = _table_rows(folder, column, images.ids)
    if rows is None:
        captions = {name: read_text(path).strip() for name, path in _text_files(folder, images.ids).items()}
        check(
            bool(captions),
            f"no captions in {folder}: looked for {', '.join(TABLES)} (columns {NAME} and {column}) and for a .txt next to each "
            "picture; the network in config.checkpoint takes a prompt, and each picture is trained under its own",
        )
        where = "a .txt of the same name"
    else:
        where = " or ".join(sorted({place.partition(":")[0] for _, place, _ in rows}))
        captions = _of_rows(rows, images, folder)
    missing = [name for name in images.ids if name not in captions]
    check(
        not missing,
        f"{len(missing)} of {len(images)} pictures have no caption in {where}: {shown(missing)}; add them (an empty caption is "
        "one too), or remove the pictures",
    )
    return [captions[name] for name in images.ids]


def captions_need(data: Mapping, images: ImageSet) -> Requirement:
    """Returns the files that hold the captions of `images`, found or missing."""
    folder = data_folder(data)
    found = [folder / table for table in _tables(folder, images.ids)] or list(_text_files(folder, images.ids).values())
    try:
        folder_captions(data, images)
    except UserError as error:
        return Requirement(description="captions", path=folder, found=False, advice=str(error))
    return requirement("captions", folder, found)


def _tables(folder: Path, names: Sequence[str]) -> list[PurePosixPath]:
    folders = sorted({PurePosixPath("."), *(PurePosixPath(name).parent for name in names)})
    return [below / table for below in folders for table in TABLES if (folder / below / table).is_file()]


def _text_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {name: path for name in names if (path := (folder / name).with_suffix(".txt")).is_file()}


def _of_rows(rows: Sequence[tuple[str, str, str]], images: ImageSet, folder: Path) -> dict[str, str]:
    """Returns name -> caption from (name, place, caption) of each row."""
    names = {composed(name): name for name in images.ids}
    captions, places, unknown = {}, {}, []
    for named, place, caption in rows:
        name = names.get(composed(named))
        if name is None:
            unknown.append(named)
            continue
        if name in places:
            raise UserError(f"two rows are for the picture {name}: {places[name]} and {place}; keep the right one")
        captions[name], places[name] = caption, place
    if unknown:
        log.warning("%d rows name no picture in %s and are left out: %s", len(unknown), folder, shown(unknown))
    return captions


def _table_rows(folder: Path, column: str, names: Sequence[str]) -> list[tuple[str, str, str]] | None:
    """Returns (path below `folder`, FILE:LINE, caption) of every row of all tables; None if there is no table."""
    tables = _tables(folder, names)
    twice = next((table.parent for table in tables if sum(other.parent == table.parent for other in tables) > 1), None)
    check(twice is None, f"{folder / str(twice)} has {' and '.join(TABLES)}; keep one of them")
    rows = []
    for table in tables:
        path = folder / table
        for line, row in table_rows(path):
            name, caption = cell(path, line, row, NAME), cell(path, line, row, column, "; set config.data.caption_column")
            check(isinstance(name, str), f"{path}, line {line}: {NAME} is {name!r}; it must be a text")
            below = (table.parent / name.replace("\\", "/")).as_posix()
            rows.append((below, f"{path}:{line}", as_caption(caption, f"{path}, line {line}")))
    return rows if tables else None


def as_caption(value: object, where: str) -> str:
    """Returns `value`, a caption. Raises `UserError` that starts with `where` unless it is a text."""
    check(isinstance(value, str), f"{where}: the caption is {value!r:.80}; it must be one text for each picture")
    half = any("\ud800" <= letter <= "\udfff" for letter in value)
    check(not half, f"{where}: the caption {value!a:.80} has half of a surrogate pair, which is no text; restore it")
    return value
