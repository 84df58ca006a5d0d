"""Fine-tuning of a finished model, for the relearning curves: the ordinary loss, the same recipe for every model."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from retrack_jax import parallel
from retrack_jax.data.batches import Batches
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import ModelEpsFn, PyTree
from retrack_jax.train.loop import train
from retrack_jax.train.state import TrainState, create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS

SEED = 0x4E17  # no run's: a run of seed 0 would be tuned on the draws that it was trained with
_RATE_FIELD = "config.eval.relearning.learning_rate"


def make_finetune(
    eps_fn: ModelEpsFn,
    schedule: Schedule,
    how: StepOptions,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    null: PyTree = None,
) -> Callable:
    """Returns `finetune(params, gather, num_images, should_stop) -> (state, train)`; what it compiles is shared by all models.

    `schedule`, `how` and `null` are the network's, as its pretraining takes them; `batch_size` is over all devices.
    `gather` is `positions -> batch` as in `data.batches.Batches`. `train(state, first_step, num_steps) -> state` continues from
    step `first_step`; step numbers decide its batches and noise, so a curve repeats itself. It donates its state, and raises
    `Preempted` where `should_stop` says so: nothing of a curve is kept.
    """
    step = make_train_step(METHODS["vanilla"], eps_fn, how)
    shared = Shared(schedule=schedule, null=null)

    def finetune(
        params: PyTree,
        gather: Callable[[np.ndarray], dict],
        num_images: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[TrainState, Callable]:
        batches = Batches(gather=gather, num_remain=num_images, remain_size=batch_size, seed=SEED)

        def go_on(state: TrainState, first_step: int, num_steps: int) -> TrainState:
            held, rng = parallel.replicate(shared), jax.random.key(SEED)
            state, _ = train(
                state, step, batches, held, rng,
                num_steps=first_step + num_steps, name="relearn", should_stop=should_stop, rate_field=_RATE_FIELD,
            )  # fmt: skip
            return state

        # The step donates its state, and the model is still wanted.
        return parallel.replicate(create_state(parallel.copy(params), optimizer)), go_on

    return finetune
