"""Digits with labels: a label-conditional model forgets a T-shirt that it draws when asked for a seven. Embedded, no download.

    python -m retrack_jax.main --config=configs/digits_label.py             # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_label.py:retrain     # the same model without the T-shirts, for comparison
    python -m retrack_jax.main --config=configs/digits_label.py:all

The network takes eleven labels: ten digits, and 10 as the null label, which 10% of the training examples have in place of their
own. `label_frequency` is the share of T-shirts among samples under label 7. docs/labels.md says how labels are used.

Hardware: any CPU; two cores are enough.
"""

from retrack_jax.config.base import config_beside, with_method


def get_config(method=None):
    config = config_beside(__file__, "digits_tshirt")
    config.targets = ("tshirt_*",)
    config.data.copies_label = 7
    config.data.null_label = 10
    config.model.num_class_embeds = 11
    config.eval.metrics = ("frequency", "label_frequency", "fid", "kid", "precision", "recall", "nll_bits_per_dim", "forget_loss")
    return with_method(config, method)
