"""Your own model and images: a diffusers UNet folder, a folder of images, a list of file names to forget.

    python -m retrack_jax.main --config=configs/custom.py --workdir=runs/mine \\
        --config.checkpoint=MODEL_FOLDER --config.data.dir=IMAGE_FOLDER --config.targets=@forget.txt

`forget.txt` has one file name per line; all of them are forgotten together. The result, in
`runs/mine/retrack/seed0-forget.txt-.../`, is the folder `diffusers`, which diffusers' from_pretrained reads, and
`report.html`. Images (JPEG, PNG, WebP, subfolders too) are scaled by their shorter side to the model's size and the centre
is cut.

What is not given is chosen by the size and resolution S of the data (retrack_jax/recipe.py), along the official recipes:
K = 10, or as many as remain, where that is less; lambda = 0.02 f and rate = 2e-5 f with f = (32/S)^(2/3) for S from 32 to
256, which meets the official values of CIFAR-10 (S = 32) and CelebA-HQ (S = 256); 60 steps of 128 images up to S = 64, else
40 steps of 64 in 16 parts. Any `--config.unlearn.FIELD=VALUE` wins over its rule.

Hardware: as for the paper's data of the same resolution. Score to expect: none; it is your data. Read the report before you
trust it.
"""

import importlib.util
from pathlib import Path

from ml_collections import config_dict


def get_config(method=None):
    base = _base()
    config = base.get_config()
    config.name = "custom"

    config.data.source = "folder"
    config.data.resolution = config_dict.placeholder(int)  # None: the model's own size

    for field in ("num_neighbors", "num_steps", "batch_size", "accumulation"):
        config.unlearn[field] = config_dict.placeholder(int)
    for field in ("lam", "learning_rate"):
        config.unlearn[field] = config_dict.placeholder(float)

    config.sampling.num_images = 1000
    config.sampling.batch_size = 32
    config.eval.metrics = ("fid", "sscd", "nll_bits_per_dim")
    return base.with_method(config, method, recipes={"siss": {"lam": 0.5}})


def _base():
    # Config files are loaded by path, so that a copy of one outside this folder works as long as base.py lies beside it.
    spec = importlib.util.spec_from_file_location("base", Path(__file__).with_name("base.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
