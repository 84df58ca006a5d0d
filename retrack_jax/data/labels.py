"""Labels of a folder's images, and which images of a label remain when some are forgotten."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from retrack_jax.checks import check, shown
from retrack_jax.data.tables import NAME, cell, composed, table_rows
from retrack_jax.files import read_object

FOLDERS = "folders"
_NO_IMAGES = ("lost+found", "__MACOSX")  # of the file system, which only root reads, and of archives
log = logging.getLogger(__name__)


def is_listed(folder_name: str) -> bool:
    """Whether a folder of this name may hold images, and so may be a class."""
    return not folder_name.startswith(".") and folder_name not in _NO_IMAGES


def labels_of_files(names: Sequence[str], data: Mapping, folder: Path) -> np.ndarray | None:
    """Returns the labels of the images `names` (paths below `folder`) as `config.data.labels` says, int64 `[N]`; None if it is
    empty.

    A file is CSV or JSON lines with `file_name` and `label`, or JSON `{"labels": [[file_name, label], ...]}`.

    Raises:
      UserError: an image without a label, or a file of labels that cannot be read.
    """
    where = data.get("labels", "")
    if not where:
        return None
    return _of_folders(names, folder) if where == FOLDERS else _of_file(names, folder / Path(where).expanduser())


def _of_folders(names: Sequence[str], folder: Path) -> np.ndarray:
    """A label is the place of the image's first folder among all, in the order of their names, as in torchvision.

    A folder without images has a place too: who empties a class leaves the others their labels.
    """
    parts = [Path(name).parts for name in names]
    outside = next((name for name, part in zip(names, parts, strict=True) if len(part) < 2), None)
    check(outside is None, f"{folder} / {outside} is in no subfolder, and config.data.labels=folders takes its label from that")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_listed(path.name))
    numbers = {name: number for number, name in enumerate(classes)}
    log.info("labels: %s", ", ".join(f"{number} {name}" for name, number in numbers.items()))
    return np.array([numbers[part[0]] for part in parts], np.int64)


def _of_file(names: Sequence[str], path: Path) -> np.ndarray:
    check(path.is_file(), f"no file {path}; config.data.labels is `{FOLDERS}`, or a file of labels below config.data.dir")
    known: dict[str, int] = {}
    for where, name, label in _rows(path):
        name = composed(name)
        check(name not in known, f"{where}: a second row is for {name}; keep the right one")
        known[name] = _as_label(label, where)
    missing = [name for name in names if composed(name) not in known]
    check(not missing, f"{path} has no label for {len(missing)} of {len(names)} images: {shown(missing)}; add or remove them")
    return np.array([known[composed(name)] for name in names], np.int64)


def _rows(path: Path) -> Iterator[tuple[str, object, object]]:
    """Yields (place, file name, label) of each row of a file of labels; `labels_of_files` says what it may hold."""
    if path.suffix != ".json":
        for line, row in table_rows(path):
            yield f"{path}, line {line}", cell(path, line, row, NAME), cell(path, line, row, "label")
        return
    rows = read_object(path).get("labels")
    pairs = isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)
    check(pairs, f'{path} holds no {{"labels": [[NAME, LABEL], ...]}}; write it so')
    yield from ((f"{path}, row {number}", *row) for number, row in enumerate(rows, 1))


def _as_label(value: object, where: str) -> int:
    """Returns a label of JSON or CSV as a number. Raises `UserError` that starts with `where` unless it is a whole one."""
    whole = isinstance(value, (int, float, str)) and re.fullmatch(r"-?\d{1,18}(\.0*)?", str(value).strip())
    check(bool(whole), f"{where}: the label is {value!r:.80}; it must be a whole number")
    return int(str(value).strip().partition(".")[0])


def remaining_of_labels(labels: np.ndarray, forget: np.ndarray) -> dict[int, np.ndarray]:
    """Returns, for each label of the rows `forget`, the rows that have it and remain; `labels` is int `[N]`."""
    remains = np.ones(len(labels), bool)
    remains[forget] = False
    return {int(label): np.flatnonzero(remains & (labels == label)) for label in np.unique(labels[forget])}


def most_neighbors(labels: np.ndarray | None, forget: np.ndarray, num_images: int) -> int:
    """Returns how many neighbors each forgotten image has at least: remaining images, with `labels` only those of the same label.

    A label of which nothing remains is not counted: its images have neighbors of every label, or none.
    """
    rooms = [num_images - len(forget)]
    if labels is not None:
        rooms += [len(rows) for rows in remaining_of_labels(labels, forget).values() if len(rows)]
    return min(rooms)
