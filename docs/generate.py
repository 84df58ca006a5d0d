"""Writes what the documents repeat from elsewhere: docs/config.md from the typed options, tables from docs/results/*.json.

    python docs/generate.py            # rewrites; `make docs` does the same

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`, and comes from docs/results/NAME.json:

    {"command": ..., "version": ..., "machine": ..., "date": ..., "columns": [...], "rows": [[...], ...]}

A result may hold more columns than a document shows: `<!-- table NAME: a, b -->` shows columns a and b. What a text says of a
measurement beside its table stands in `"quoted": [...]`, as the document has it; a result with quotes needs no table.
Quotes are copied by hand: a test notices when a document and its quote part, not that both are wrong.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path

from retrack_jax.config import options
from retrack_jax.unlearn.methods import METHODS

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULT_FIELDS = {"command", "version", "machine", "date"}
_CONFIG_HEAD = """# Configuration

Every field, its default, and what it means, generated from the code (`make docs`). Files in `configs/` change the defaults, and
`--config.FIELD=VALUE` overrides both. A default of None is filled in by the config file or by a rule. A shared field of
`config.unlearn` may also be set under a method's name, and then counts for that method alone:
`--config.unlearn.erasediff.learning_rate=5e-5`.
"""
_TABLE = re.compile(r"(<!-- table (\w+)(?:: ([^>]*?))? -->\n).*?(<!-- end of table -->)", re.DOTALL)


def result(name: str) -> dict:
    """Returns docs/results/NAME.json; raises ValueError if it does not say how it was measured."""
    found = json.loads((DOCS / "results" / f"{name}.json").read_text())
    if missing := RESULT_FIELDS - set(found) | (set() if "quoted" in found else {"columns", "rows"} - set(found)):
        raise ValueError(f"docs/results/{name}.json lacks {', '.join(sorted(missing))}")
    return found


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_tables(text: str) -> str:
    """Returns a document's text with every marked table written anew."""

    def table(match: re.Match) -> str:
        found = result(match[2])
        shown = [name.strip() for name in match[3].split(",")] if match[3] else found["columns"]
        positions = [found["columns"].index(name) for name in shown]
        rows = [[row[position] for position in positions] for row in found["rows"]]
        return f"{match[1]}\n{markdown(shown, rows)}\n{match[4]}"

    return _TABLE.sub(table, text)


def config_page() -> str:
    """Returns docs/config.md: each field of each record of options, with its default and its comment."""
    groups = _groups("config", options.Options)
    own = [(f"config.unlearn.{name}", method.options) for name, method in METHODS.items() if dataclasses.fields(method.options)]
    sections = [_section(name, record) for name, record in [*groups, *own]]
    return _CONFIG_HEAD + "".join(sections)


def _groups(name: str, record: type) -> list[tuple[str, type]]:
    """Returns a record and those nested in it, each under its name in the config."""
    nested = [one for one in dataclasses.fields(record) if dataclasses.is_dataclass(one.type) and one.name != "own"]
    return [(name, record), *(group for one in nested for group in _groups(f"{name}.{one.name}", one.type))]


def _section(name: str, record: type) -> str:
    comments = _comments(record)
    rows = [
        [f"`{one.name}`", f"`{one.default!r}`", comments.get(one.name, "")]
        for one in dataclasses.fields(record)
        if isinstance(one.default, (bool, int, float, str, tuple, type(None)))
    ]
    what = inspect.cleandoc(record.__doc__).split("\n")[0]
    what = re.sub(r"^`config[\w.]*`: ", "", what)
    return f"\n## {name}\n\n{what[:1].upper()}{what[1:]}\n\n{markdown(['field', 'default', 'meaning'], rows)}"


def _comments(record: type) -> dict[str, str]:
    """Returns the comment behind each field, of the record and of those it is derived from."""
    found = {}
    for kind in reversed(record.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+): [^\n]*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
    return {name: text.replace("|", "\\|") for name, text in found.items()}


def pages() -> dict[Path, str]:
    """Returns every generated document with the text that it should have."""
    marked = [path for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if "<!-- table " in path.read_text()]
    return {path: with_tables(path.read_text()) for path in marked} | {DOCS / "config.md": config_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
