"""Shared by the tests of config.mode=check: configs by name, and what is printed for them."""

import contextlib
import dataclasses
import importlib.util
import io
from pathlib import Path

from retrack_jax.config.reading import read_config
from retrack_jax.config.rules import unset
from retrack_jax.data.checklist import print_requirements

CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(name: str):
    """The config of configs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def printed(config) -> str:
    """What config.mode=check prints for it."""
    options = read_config(config)
    with contextlib.redirect_stdout(io.StringIO()) as file:
        print_requirements(dataclasses.asdict(options), unset(options))
    return file.getvalue()
