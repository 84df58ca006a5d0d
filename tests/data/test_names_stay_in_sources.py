"""To add a source of data is one module and one line: no other module decides anything by a source's name."""

import ast
from collections.abc import Iterator
from pathlib import Path

from retrack_jax.data.sources.table import SOURCES

PACKAGE = Path(__file__).parents[2] / "retrack_jax"
FORMATS = {"folder", "parquet", "npz", "idx", "tfds"}  # these also name ways to store images
NAMES = (set(SOURCES) - FORMATS) | {"mnist", "celeba", "celeb_a", "cifar"}
# These name a classifier, not a set of images: the network behind MNIST's inception scores.
ALLOWED = {"data/commands.py", "data/required_model.py", "metrics/features/network.py", "metrics/features/resnet.py"}


def words(path: Path) -> Iterator[str]:
    """The strings without a space in a module: names and paths, not messages or docstrings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not any(map(str.isspace, node.value)):
            yield node.value.lower()


def test_no_source_is_named_outside_its_module():
    names = {}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).as_posix()
        if not module.startswith("data/sources/"):
            names[module] = {name for name in NAMES for word in words(path) if name in word}
    assert not {module: held for module, held in names.items() if held - ({"mnist"} if module in ALLOWED else set())}


def test_every_source_is_a_whole_record():
    for name, source in SOURCES.items():
        assert source.formats and callable(source.load) and callable(source.needs), name
