"""One cache of programs for all drills, and one undisturbed run of each session to compare with."""

import os
import shutil

import pytest

from tests.drills import cli


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs, shared by all commands of the drills, those of other workers too, never the user's own."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory):
    """The workdir of an undisturbed run; copy it, never change it."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "work"
    cli.succeed(cli.flags(workdir), cache)
    return workdir


@pytest.fixture
def copy_of(tmp_path):
    """Returns a function that copies a workdir to a fresh place."""

    def copy(workdir, name="work"):
        return shutil.copytree(workdir, tmp_path / name)

    return copy
