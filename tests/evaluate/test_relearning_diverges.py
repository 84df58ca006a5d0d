"""A fine-tuning that diverges costs its own curve alone: the other one, and the run, go on."""

from types import SimpleNamespace

import jax
import numpy as np

from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.evaluate.finetune import make_finetune
from retrack_jax.evaluate.memory import relearning
from retrack_jax.evaluate.results import Evaluator, evaluate
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.step import StepOptions
from tests import toys

RECIPE = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}


def test_one_curve_diverges(tmp_path):
    schedule, forgotten, remain = toys.schedule(), toys.images(2, seed=1), toys.images(8)
    eps_fn = make_eps_fn(toys.ToyNet().apply, schedule)

    def finetune(params, with_forgotten):
        rate = 1e30 if with_forgotten else 1e-3
        optimizer = make_optimizer(learning_rate=rate, **RECIPE)
        start = make_finetune(eps_fn, schedule, StepOptions(t_max=1000), optimizer, batch_size=4)
        return start(params, lambda rows: {"pixels": remain[rows]}, len(remain))

    task = SimpleNamespace(
        condition=None,
        forgotten=forgotten, clean=lambda: pixels_to_model(forgotten), schedule=schedule, eps_fn=eps_fn, rng=jax.random.key(0),
        pretrained=toys.params, finetune=finetune, relearning=(2, 4),
    )  # fmt: skip
    names = ("relearning_steps", "relearning_steps_remain")
    evaluators, subject = [Evaluator(names=names, compute=relearning)], SimpleNamespace(params=toys.params(1))
    found = evaluate(evaluators, names, task, subject, tmp_path / "evaluation.json")
    assert set(found.values) == {"relearning_steps_remain"} and found.final == ["relearning_steps"]
    assert "config.eval.relearning.learning_rate" in found.absent["relearning_steps"]
    assert np.isfinite(found.notes["relearning_steps_remain"]["relearning_steps_remain"]["values"]).all()
