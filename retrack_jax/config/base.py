"""What the files in `configs/` start from and end with."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict, config_dict

from retrack_jax.config.reading import default_config


def base_config(name: str, *, pretrained_here: bool = True) -> ConfigDict:
    """Returns every field of options.py with its default, which all of the paper's experiments share.

    `name` is that of the config file. Without `pretrained_here` it has no recipe for pretraining, and needs `config.checkpoint`.
    """
    config = default_config()
    config.name = name
    if not pretrained_here:
        config.pretrain.num_steps = config_dict.placeholder(int)
    return config


def with_method(config: ConfigDict, method: str | None) -> ConfigDict:
    """Returns `config` with `method` chosen and locked: an override of a field that does not exist fails with the nearest name.

    `method` is what follows the colon in `--config=FILE:METHOD`; None or empty keeps the default.
    """
    config.method = method or config.method
    config.lock()
    return config


def config_beside(file: str, name: str) -> ConfigDict:
    """Returns the config of `name`.py, which lies beside `file`, unlocked and renamed to `file`, so that `file` can change it."""
    config = runpy.run_path(str(Path(file).with_name(f"{name}.py")))["get_config"]()
    config.unlock()
    config.name = Path(file).stem
    return config
