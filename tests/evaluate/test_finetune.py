"""Fine-tuning for the relearning curves: a stop is answered between two steps, and advice names a field that there is."""

import operator

import numpy as np
import pytest

from retrack_jax.checks import Preempted, UserError
from retrack_jax.config.reading import default_config
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.evaluate.finetune import make_finetune
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.step import StepOptions
from tests import toys

SCHEDULE, IMAGES = toys.schedule(), toys.images(40)
TX = make_optimizer(learning_rate=1e-3, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
FINETUNE = make_finetune(make_eps_fn(toys.ToyNet().apply, SCHEDULE), SCHEDULE, StepOptions(t_max=1000), TX, batch_size=8)


def pixels(rows):
    return {"pixels": IMAGES[rows]}


def test_it_stops_between_two_steps():
    asked = iter([False, False, True])
    state, train = FINETUNE(toys.params(), pixels, 40, lambda: next(asked))
    with pytest.raises(Preempted, match="relearn stopped at step 3 of 9"):
        train(state, 0, 9)


def test_it_goes_on_from_a_step_without_being_asked():
    state, train = FINETUNE(toys.params(), pixels, 40)
    assert int(train(train(state, 0, 2), 2, 3).step) == 5


def test_a_rate_that_diverges_names_a_field_of_the_config():
    field = "config.eval.relearning.learning_rate"
    state, train = FINETUNE(toys.params(), lambda rows: {"x_0": np.full((len(rows), *toys.SHAPE), np.nan, np.float32)}, 40)
    with pytest.raises(UserError, match=f"try a lower {field}$"):
        train(state, 0, 1)
    assert operator.attrgetter(field.removeprefix("config."))(default_config()) > 0
