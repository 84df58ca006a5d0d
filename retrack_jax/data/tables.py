"""Tables that people write next to their pictures: CSV with a header, or JSON with one object a line."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from retrack_jax.checks import UserError, check

NAME = "file_name"  # the column that names a picture, as in the hub's data sets


def table_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (line, row) of the table at `path`, `.csv` or else JSON lines; a row is column -> value.

    Raises:
      UserError: the file cannot be read, or a line is no row; the message names the line.
    """
    text = read_text(path)
    return _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)


def cell(path: Path, line: int, row: Mapping, column: str, hint: str = ""):
    """Returns the value of `column` in a row. Raises `UserError`, which ends with `hint`, if there is no such column."""
    check(column in row, f"{path}, line {line}: there is no {column!r} among {', '.join(map(str, row))}{hint}")
    return row[column]


def read_text(path: Path) -> str:
    """Returns the UTF-8 text of a file. Raises `UserError` if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); write it as UTF-8") from error


def composed(name: object) -> str:
    """Returns a name in Unicode's form NFC, in which names are compared: macOS writes `é` as two characters, others as one."""
    return unicodedata.normalize("NFC", str(name))


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is no JSON ({error}); write one object a line") from error
        check(isinstance(row, dict), f"{path}, line {number} is no JSON object; write one a line")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            check(None not in row, f"{where} has more values than the header; put text with commas into quotes")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is no CSV ({error}); write it again") from error
