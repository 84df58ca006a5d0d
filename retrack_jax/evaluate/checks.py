"""Which values of `config.eval` an evaluation of image models can use: checked before anything is trained."""

from ml_collections import ConfigDict

from retrack_jax import parallel
from retrack_jax.checks import check, check_choice, check_int, check_number
from retrack_jax.evaluate.images import METRIC_NAMES
from retrack_jax.evaluate.networks import NETWORKS
from retrack_jax.metrics.features.resize import RULES


def check_evaluation(evaluation: ConfigDict) -> None:
    """Raises `UserError`, naming the field, its value and the choices, for the first that no evaluation can use."""
    for name in evaluation.metrics:
        check_choice("config.eval.metrics", name, METRIC_NAMES)
    check_choice("config.eval.features", evaluation.features, NETWORKS)
    check_choice("config.eval.fid_resize", evaluation.fid_resize, RULES)
    check_choice("config.eval.fid_reference", evaluation.fid_reference, ("remain", "all"))
    check_number("config.eval.frequency_threshold", evaluation.frequency_threshold, 0.0)
    check_int("config.eval.nll_probes", evaluation.nll_probes)
    steps = evaluation.relearning.steps
    rise = all(isinstance(b, int) and a < b for a, b in zip((0, *steps), steps, strict=False))
    wrong = f"config.eval.relearning.steps is {tuple(steps)}; give whole numbers that rise from above 0"
    check(rise and len(steps) > 0, wrong)
    check_number("config.eval.relearning.learning_rate", evaluation.relearning.learning_rate, 0.0, above=True)
    check_int("config.eval.relearning.batch_size", evaluation.relearning.batch_size)
    if {"relearning_steps", "relearning_steps_remain"} & {*evaluation.metrics}:
        parallel.check_divisible("config.eval.relearning.batch_size", evaluation.relearning.batch_size)
