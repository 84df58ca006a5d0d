"""What `pip install` of the package brings is what requirements.txt says it needs, and no tool of the tests."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
OF_TESTS = "# Of tests and benchmarks:"


def names_in(text: str) -> set[str]:
    """The requirements of a file, without comments; quotes as TOML's strings have them."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return {line.replace('"', "'") for line in lines if line}


def test_the_package_needs_what_requirements_txt_lists_for_it():
    own, of_tests = (ROOT / "requirements.txt").read_text().split(OF_TESTS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) == names_in(own)
    assert {"pytest", "hypothesis"} <= {line.split(">=")[0] for line in names_in(of_tests)}
