"""Digits, class deletion: forget all sevens. Embedded data, no download.

    python -m retrack_jax.main --config=configs/digits_class.py            # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_class.py:all --config.seeds=0

Hardware: any CPU; two cores are enough. Time: about a minute per run, once pretrained. Scores: docs/comparison.md, measured.
`label_share` is the share of samples that a small classifier, trained on all digits, takes for a seven.
"""

import importlib.util
from pathlib import Path


def get_config(method=None):
    base = _load("base")
    config = _load("digits_tshirt").get_config()
    config.unlock()
    config.name = "digits_class"
    config.targets = ("label:7",)
    config.data.copies = 0
    # Ten times the single image's lambda: of 0.005 and 0.05, on seed 100, the one that ends the sevens.
    config.unlearn.lam = 0.05
    config.eval.metrics = ("label_share", "fid", "kid", "precision", "recall", "forget_loss")
    config.eval.frequency_threshold = 0.0  # a class is no single image
    config.eval.mark_name = "seven"
    return base.with_method(config, method, recipes=config.recipes.to_dict())


def _load(name):
    # Config files are loaded by path, so that a copy of one outside this folder works as long as the others lie beside it.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
