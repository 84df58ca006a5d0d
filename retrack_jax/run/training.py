"""Training runs: a job says what to train, `train` trains it from where its newest checkpoint stands, `load` only reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
import optax
from etils import epath

from retrack_jax import parallel
from retrack_jax.checks import UserError, check
from retrack_jax.config.recipes import TrainingOptions, UnlearnOptions
from retrack_jax.data.batches import Batches
from retrack_jax.log import Writer
from retrack_jax.notation import ModelEpsFn, PyTree
from retrack_jax.run.context import Run, RunContext
from retrack_jax.run.tensorboard import scalars_of_training
from retrack_jax.train import loop
from retrack_jax.train.lora import LoraOptions, init, merge
from retrack_jax.train.run_store import RunStore
from retrack_jax.train.state import TrainState, create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS, Method, get_method


@dataclass(frozen=True)
class Model:
    """A network's parameters, replicated, with what training them took; and the adapter that is merged into them, if one is."""

    params: PyTree
    steps: int
    seconds: float
    adapter: PyTree | None = None


@dataclass(frozen=True)
class CompiledStep:
    """An optimizer, and the programs that are compiled with it when they are first called: of one step, and of several."""

    optimizer: optax.GradientTransformation
    ema_decay: Callable | None
    p_step: Callable
    p_steps: Callable


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
      name: what logs call it: `pretrain`, `retrain` or `unlearn`.
      folder: where its checkpoints and log lie.
      seed: decides its data order and noise.
      start: `() -> parameters` that it starts from.
      inputs: `() -> (batches, shared)`, what a step takes in addition to the state; built only if there is a step left to take.
      lora: the adapter to the pretrained network that it trains; None: it trains a network's parameters.
    """

    name: str
    folder: epath.Path
    seed: int
    recipe: TrainingOptions
    step: CompiledStep
    start: Callable[[], PyTree]
    inputs: Callable[[], tuple[Batches, Shared]]
    lora: LoraOptions | None = None


def pretrained(context: RunContext, make: Callable[[Job, RunContext], Model]) -> Model:
    """Returns the model before unlearning: the config's checkpoint, else trained from random weights on every image.

    Args:
      make: `train`, or `load` to only read it.
    """
    params, options = context.problem.denoiser.params, context.options
    if params is not None:
        return Model(parallel.replicate(params), 0, 0.0)
    images = context.problem.data.images
    rows = np.arange(len(images))
    return make(_from_scratch(context, "pretrain", context.workdir.pretrained, options.pretrain.seed, images, rows), context)


def unlearning(run: Run) -> Job:
    """Returns the job that makes a run's model: for `retrain` from random weights, without the target's images."""
    context, method, target, seed = run.context, run.method, run.target, run.seed
    entry, problem = get_method(method), context.problem
    folder = context.workdir.model(method, seed, target.slug)
    if entry.from_scratch:
        return _from_scratch(context, "retrain", folder, seed, target.images, target.remain)
    recipe, denoiser, lora = context.options.recipe(method), problem.denoiser, context.options.lora(method)
    how = recipe.step_options(denoiser.schedule.t_end, denoiser.has_dropout, problem.conditioning.dropout)
    step = _compiled(entry, denoiser.eps_fn, how, recipe)

    def base() -> PyTree:
        return pretrained(context, load).params

    def adapter() -> PyTree:
        return init(lora, jax.eval_shape(denoiser.init_params, 0), jax.random.key(seed))

    def inputs() -> tuple[Batches, Shared]:
        num_neighbors = recipe.num_neighbors if "neighbors" in entry.streams else 0
        # One process decides: an approximate index of each host could find other neighbors, and steps average their gradients.
        data = parallel.from_main(lambda: problem.forget_data(target, recipe, num_neighbors))
        distils = recipe.retain_loss == "distillation" and "remain" in entry.streams
        frozen = distils or data.anchor is not None or lora is not None
        shared = Shared(
            schedule=denoiser.schedule,
            forget=data.forget,
            neighbors=data.neighbors,
            neighbor_rows=data.neighbor_rows,
            neighbor_bias=data.neighbor_bias,
            null_neighbor_rows=data.null_neighbor_rows,
            anchor=data.anchor,
            # The step donates its state: a reference to what it trains itself must be a second copy.
            reference=base() if frozen else None,
            conditions=problem.conditioning.table(target),
            null=problem.conditioning.dropped,
        )
        batches = Batches(
            gather=problem.gather(target.images, target.remain),
            num_remain=len(target.remain),
            forget_rows=target.copy_of,
            remain_size=recipe.remain_size(entry),
            forget_size=recipe.forget_size(entry),
            seed=seed,
        )
        return batches, shared

    return Job("unlearn", folder, seed, recipe, step, adapter if lora else base, inputs, lora)


def _from_scratch(context: RunContext, name: str, folder: epath.Path, seed: int, images, rows: np.ndarray) -> Job:
    recipe, denoiser = context.options.pretrain, context.problem.denoiser
    check(
        not denoiser.schedule.rescale_betas_zero_snr,
        f"{name} starts from random weights, which is not supported with rescale_betas_zero_snr: the loss is in eps, and at pure "
        "noise eps says nothing about the image; choose a method that starts from the checkpoint",
    )
    how = recipe.step_options(denoiser.schedule.t_end, denoiser.has_dropout, context.problem.conditioning.dropout)
    step = _compiled(METHODS["vanilla"], denoiser.eps_fn, how, recipe)

    def inputs() -> tuple[Batches, Shared]:
        gather = context.problem.gather(images, rows)
        batches = Batches(gather=gather, num_remain=len(rows), remain_size=recipe.batch_size, seed=seed)
        return batches, Shared(schedule=denoiser.schedule, null=context.problem.conditioning.dropped)

    return Job(name, folder, seed, recipe, step, lambda: denoiser.init_params(seed), inputs)


@lru_cache(maxsize=16)
def _compiled(method: Method, eps_fn: ModelEpsFn, how: StepOptions, recipe: TrainingOptions) -> CompiledStep:
    """Runs with the same arguments share one step, in later commands of the process too: it is traced and compiled once."""
    programs = (make_train_step(method, eps_fn, how, several=several) for several in (False, True))
    return CompiledStep(recipe.optimizer(), recipe.ema_decay(), *programs)


def load(job: Job, context: RunContext) -> Model:
    """Returns the finished model of `job`. Raises `UserError`, with the mode that makes it, if the run has not finished."""
    mode = "pretrain" if job.name == "pretrain" else "unlearn"
    advice = f"run --config.mode={mode} first, or leave config.mode out to run every stage"
    unfinished = UserError(f"{job.folder} has no finished model; {advice}")
    checkpoints = job.folder / "checkpoints"
    if not checkpoints.exists():  # a store would make the folder
        raise unfinished
    with RunStore(checkpoints) as store:
        if store.latest_step() != job.recipe.num_steps:
            raise unfinished
        state, seconds = loop.restore(lambda: _state(job, context), job.recipe.num_steps, store)
    if isinstance(state, TrainState):  # the newest checkpoint was damaged, and the one before is of an earlier step
        raise unfinished
    return _model(job, context, state, seconds)


def train(job: Job, context: RunContext) -> Model:
    """Returns the finished model of `job`: restored, or trained from where its newest checkpoint stands."""
    num_steps = job.recipe.num_steps
    with RunStore(job.folder / "checkpoints") as store:
        # A run that continues from a checkpoint needs the shapes alone; parameters would lie in memory with the restored ones.
        params = job.start() if store.latest_step() is None else None
        state, seconds = loop.restore(lambda: _state(job, context, params), num_steps, store)
        if not isinstance(state, TrainState):
            return _model(job, context, state, seconds)
        batches, shared = job.inputs()
        how = {"is_main": parallel.is_main_process(), "every": context.options.log_every}
        shown = scalars_of_training(context.options, job.folder, job.name, job.recipe.rate(), int(state.step))
        with shown as also, Writer(job.folder / "log.jsonl", **how, also=also) as writer:
            writer.truncate_after(int(state.step))
            stage = "unlearn" if isinstance(job.recipe, UnlearnOptions) else "pretrain"
            state, seconds = loop.train(
                parallel.replicate(state),
                job.step.p_step,
                batches,
                parallel.replicate(shared),
                jax.random.key(job.seed),
                num_steps=num_steps,
                name=job.name,
                store=store,
                checkpoint_every=context.options.checkpoint_every,
                writer=writer,
                should_stop=context.should_stop,
                seconds_before=seconds,
                rate_field=f"config.{stage}.learning_rate",
                profile=(job.folder / "profile", context.options.profile),
                p_steps=job.step.p_steps,
                steps_per_call=context.options.compute.steps_per_call,
            )
        return _model(job, context, state.eval_params, seconds)


def _model(job: Job, context: RunContext, trained: PyTree, seconds: float) -> Model:
    """The finished model of what the last step left."""
    trained = parallel.across_processes(trained)  # as the pretrained parameters are
    if job.lora is None:
        return Model(trained, job.recipe.num_steps, seconds)
    params = merge(job.lora, pretrained(context, load).params, trained)
    return Model(params, job.recipe.num_steps, seconds, trained)


def _state(job: Job, context: RunContext, params: PyTree | None = None) -> TrainState:
    """The state at step 0; with no `params`, one to take the shapes of."""
    if params is None:
        params = context.problem.denoiser.init_params(0) if job.lora is None else job.start()
    return create_state(params, job.step.optimizer, job.step.ema_decay)


def record(job: Job, context: RunContext) -> tuple[int, float]:
    """Returns the steps that a finished job took, and their seconds, without reading its parameters."""
    with RunStore(job.folder / "checkpoints") as store:
        meta = store.latest_meta()
    if meta is None:  # damaged: restored from the checkpoint before, or explained
        model = load(job, context)
        return model.steps, model.seconds
    return meta["step"], meta["seconds"]
