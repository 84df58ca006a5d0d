"""Labels of a folder's images, and which images of a label remain when some are forgotten."""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retrack_jax.checks import UserError, check

FOLDERS = "folders"
_SHOWN = 3  # names in a message
log = logging.getLogger(__name__)


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
    """A label is the place of the image's first folder among all, in the order of their names, as torchvision and datasets do."""
    parts = [Path(name).parts for name in names]
    outside = next((name for name, part in zip(names, parts, strict=True) if len(part) < 2), None)
    check(outside is None, f"{folder} / {outside} is in no subfolder, and config.data.labels=folders takes its label from that")
    numbers = {name: number for number, name in enumerate(sorted({part[0] for part in parts}))}
    log.info("labels: %s", ", ".join(f"{number} {name}" for name, number in numbers.items()))
    return np.array([numbers[part[0]] for part in parts], np.int64)


def _of_file(names: Sequence[str], path: Path) -> np.ndarray:
    known = _read(path)
    missing = [name for name in names if name not in known]
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        raise UserError(f"{path} has no label for {len(missing)} of {len(names)} images, such as {shown}; add or remove them")
    return np.array([known[name] for name in names], np.int64)


def _read(path: Path) -> dict[str, int]:
    """Returns file name -> label from a file of labels; `labels_of_files` says what it may hold."""
    check(path.is_file(), f"no file {path}; config.data.labels is `{FOLDERS}`, or a file of labels below config.data.dir")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = json.loads(text)["labels"]
        else:
            records = csv.DictReader(text.splitlines()) if path.suffix == ".csv" else map(json.loads, text.splitlines())
            rows = [(record["file_name"], record["label"]) for record in records]
        labels = {str(name): int(label) for name, label in rows}
        whole = all(float(label) == int(label) for _, label in rows)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no labels ({type(error).__name__}: {error}); it needs the columns file_name and label, a whole number "
            'for each (.csv, .jsonl), or {"labels": [[NAME, LABEL], ...]} (.json)'
        ) from error
    check(whole, f"{path}: a label is no whole number")
    check(len(labels) == len(rows), f"{path} names an image twice; give each one row")
    return labels


def remaining_of_labels(labels: np.ndarray, forget: np.ndarray) -> dict[int, np.ndarray]:
    """Returns, for each label of the rows `forget`, the rows that have it and remain; `labels` is int `[N]`."""
    remains = np.ones(len(labels), bool)
    remains[forget] = False
    return {int(label): np.flatnonzero(remains & (labels == label)) for label in np.unique(labels[forget])}


def most_neighbors(labels: np.ndarray | None, forget: np.ndarray, num_images: int) -> int:
    """Returns how many neighbors every forgotten image can have: the remaining images, or with `labels` those of its own label.

    A label of which nothing remains is not counted: its images have neighbors of every label, or none.
    """
    rooms = [num_images - len(forget)]
    if labels is not None:
        rooms += [len(rows) for rows in remaining_of_labels(labels, forget).values() if len(rows)]
    return min(rooms)
