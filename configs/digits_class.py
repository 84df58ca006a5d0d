"""Digits, class deletion: forget all sevens. Embedded data, no download.

    python -m retrack_jax.main --config=configs/digits_class.py            # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_class.py:all --config.seeds=0

Hardware: any CPU; two cores are enough. Time: about a minute per run, once pretrained.
Scores: docs/measurements/digits.md, measured.
`label_share` is the share of samples that a small classifier, trained on all digits, calls a seven.
"""

from retrack_jax.config.base import config_beside, with_method


def get_config(method=None):
    config = config_beside(__file__, "digits_tshirt")
    config.targets = ("label:7",)
    config.data.copies = 0
    # Ten times the single image's lambda: of 0.005 and 0.05 on seed 100, the one with which the sevens disappear.
    config.unlearn.retrack.lam = 0.05
    config.eval.metrics = ("label_share", "fid", "kid", "precision", "recall", "forget_loss")
    config.eval.frequency_threshold = 0.0  # a class is no single image
    config.eval.mark_name = "seven"
    return with_method(config, method)
