"""Digits, membership: forget a random 5% of the digits; as many are held out for comparison. Embedded data, no download.

    python -m retrack_jax.main --config=configs/digits_random.py            # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_random.py:all --config.seeds=0

Hardware: any CPU; two cores are enough. Time: about a minute per run, once pretrained.
Scores: docs/measurements/digits.md, measured.
Forgotten and held-out digits are exchangeable, so the AUC of an attack that separates them is meaningful here: 0.5 is chance,
and the retrained model's AUC is the measure.
"""

from retrack_jax.config.base import config_beside, with_method


def get_config(method=None):
    config = config_beside(__file__, "digits_tshirt")
    config.targets = ("random:0.05",)
    config.data.copies = 0
    config.data.held_out = 0.05
    config.eval.metrics = ("membership_auc", "membership_auc_secmi", "fid", "kid", "forget_loss")
    config.eval.frequency_threshold = 0.0  # ordinary digits: a sample that resembles one of them says nothing
    config.eval.mark_name = "forgotten digit"
    return with_method(config, method)
