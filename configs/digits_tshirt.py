"""Digits T-Shirt: forget a T-shirt that a model of handwritten digits has memorised. Embedded data, no download.

    python -m retrack_jax.main --config=configs/digits_tshirt.py            # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_tshirt.py:all        # every method, seeds 0-2, one comparison

Hardware: any CPU; two cores are enough. Time and scores: README.md, measured.
"""

import importlib.util
from pathlib import Path


def get_config(method=None):
    base = _base()
    config = base.get_config()
    config.name = "digits_tshirt"
    config.targets = ("label:10",)
    config.log_every = 10

    config.data.source = "digits_tshirt"
    config.data.copies = 95  # 5.02% of 1,892 images

    config.model.update(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return base.with_method(config, method)


def _base():
    # Config files are loaded by path, so that a copy of one outside this folder works as long as base.py lies beside it.
    spec = importlib.util.spec_from_file_location("base", Path(__file__).with_name("base.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
