"""What `pip install` brings: what requirements.txt lists for the package, the configs and the templates."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    assert {"pytest", "hypothesis", "hatchling"} <= {line.split(">=")[0] for line in names_in(of_tests)}


def test_a_wheel_installed_elsewhere_runs_a_config_by_its_name(tmp_path):
    """Built without a network, by the hatchling of this environment; packages that it needs are this environment's."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {"retrack_jax/py.typed", "retrack_jax/report/templates/page.html"} <= inside
    assert {f"retrack_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")} <= inside
    assert {name.split("/")[0] for name in inside if ".dist-info/" not in name} == {"retrack_jax"}

    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False, symlinks=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "packages.pth").write_text(packages)
    command = "from retrack_jax.main import command; command()"
    run = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", command, "--config=digits_tshirt", "--config.mode=check"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "nothing is needed: data and model are made here\n"), run.stderr


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_the_help_imports_nothing_heavy(word):
    code = f"import sys; from retrack_jax.main import main; main(['retrack', {word!r}]); assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage: retrack "), run.stderr


def test_the_lock_file_has_a_version_for_each_requirement_that_its_range_allows():
    locked = dict(line.split("==") for line in names_in((ROOT / "requirements.lock").read_text()))
    locked = {canonicalize_name(name): version for name, version in locked.items()}
    for line in names_in((ROOT / "requirements.txt").read_text()):
        requirement = Requirement(line)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement
