"""Imports point down only: no module imports one of a level above, nor one beside it in another package."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "retrack_jax"

# From the top down. Names in one entry are beside each other.
LEVELS = (
    {"__main__"},
    {"main"},
    {"cli", "api"},
    {"run"},
    {"problem"},
    {"config"},
    {"evaluate", "report"},
    {"train"},
    {"unlearn", "sampling", "metrics", "checkpoints"},
    {"neighbors"},
    {"data"},
    {"diffusion", "models", "weights"},
    {"parallel", "log", "files", "checks", "notation"},
)
LEVEL = {name: index for index, names in enumerate(LEVELS) for name in names}
# These may use each other: the base of the pyramid.
_FREE = {
    ("files", "checks"),
    ("log", "checks"),
    ("parallel", "checks"),
    ("parallel", "notation"),
}


def imports(path: Path) -> set[str]:
    """The names below retrack_jax that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("retrack_jax"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("retrack_jax.")}
    return found


def test_imports_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path) - {own}:
            if name in LEVEL and LEVEL[name] <= LEVEL[own] and (own, name) not in _FREE:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_level():
    names = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert names == set(LEVEL)


def test_config_dicts_end_at_the_doors():
    doors = {"api", "cli", "config"}
    users = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py") if uses(path, "ml_collections")}
    assert users <= doors


def uses(path: Path, package: str) -> bool:
    """Whether a file imports something of a package."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] == package for name in names)


def test_few_modules_stand_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


def test_nothing_imports_pytorch():
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "configs").glob("*.py")]:
        assert not any(uses(path, name) for name in ("torch", "diffusers", "transformers")), path
