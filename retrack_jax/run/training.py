"""The stages of one run: pretrain, unlearn, sample, evaluate, report. Each returns what is there already and makes what is not.

A stage's result is a file or a checkpoint in the workdir, so that the same command continues where it was stopped.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from retrack_jax import files, parallel
from retrack_jax.checkpoints.run_store import RunStore, tree_digest
from retrack_jax.checks import Preempted, UserError, check
from retrack_jax.config import build
from retrack_jax.data.batches import Batches
from retrack_jax.log import Writer, progress
from retrack_jax.notation import PyTree
from retrack_jax.problem.experiment import Experiment
from retrack_jax.problem.target import Target
from retrack_jax.run.workdir import Workdir
from retrack_jax.train.loop import restore, train
from retrack_jax.train.state import TrainState, create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS, RETRAIN, Method, get_method

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A network's parameters, replicated, with what training them took."""

    params: PyTree
    steps: int
    seconds: float


@dataclass(frozen=True)
class CompiledStep:
    """An optimizer and the step that is compiled with it; the runs of a sweep share one, so that it is traced once."""

    optimizer: optax.GradientTransformation
    ema_decay: Callable | None
    p_step: Callable


@dataclass(frozen=True)
class TrainInputs:
    """What a step takes beside the state; made only if there is a step left to take."""

    batches: Batches
    shared: Shared


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
      name: what logs call it.
      mode: the `config.mode` that makes it, for advice.
      recipe: its field of the config, `pretrain` or `unlearn`.
      folder: where its checkpoints and log lie.
      seed: decides its data order and noise.
      only_existing: whether it is an error if it is not finished already.
    """

    name: str
    mode: str
    recipe: str
    folder: epath.Path
    seed: int
    only_existing: bool


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What the stages share: config, experiment, workdir, the flag that a preemption sets, and what is compiled already."""

    config: ConfigDict
    experiment: Experiment
    workdir: Workdir
    should_stop: Callable[[], bool]
    steps: dict[str, CompiledStep]

    def pretrain(self, *, only_existing: bool = False) -> Model:
        """The model before unlearning: the config's checkpoint, else trained here from random weights on every image."""
        params = self.experiment.imported_params()
        if params is not None:
            return Model(parallel.replicate(params), 0, 0.0)
        job = Job("pretrain", "pretrain", "pretrain", self.workdir.pretrained, self.config.pretrain.seed, only_existing)
        return self._from_scratch(job, self.experiment.all_rows())

    def retrain(self, target: Target, seed: int, *, only_existing: bool = False) -> Model:
        """The gold standard: trained from random weights without the target's images."""
        job = Job("retrain", "unlearn", "pretrain", self._folder(RETRAIN, target, seed), seed, only_existing)
        return self._from_scratch(job, target.remain)

    def _from_scratch(self, job: Job, rows: np.ndarray) -> Model:
        recipe, experiment = self.config.pretrain, self.experiment
        shard_ema = self.config.compute.shard_ema
        how = build.pretrain_options_from(recipe, experiment.num_timesteps, experiment.has_dropout, shard_ema)
        step = self._compiled_step("from scratch", METHODS["vanilla"], recipe, how, build.ema_decay_from(recipe))

        def make_params() -> PyTree:
            return experiment.init_params(job.seed)

        def make_inputs() -> TrainInputs:
            batches = Batches(
                gather=experiment.gather(rows),
                num_remain=len(rows),
                forget_rows=None,
                remain_size=recipe.batch_size,
                forget_size=0,
                seed=job.seed,
            )
            return TrainInputs(batches, Shared(schedule=experiment.schedule))

        return self._train(job, step, make_params, make_inputs)

    def unlearn(self, method_name: str, target: Target, seed: int, *, only_existing: bool = False) -> Model:
        """The model after `method_name` forgot the target."""
        method, recipe, experiment = get_method(method_name), self.config.unlearn, self.experiment
        if method.from_scratch:
            return self.retrain(target, seed, only_existing=only_existing)
        how = build.unlearn_options_from(recipe, method, experiment.num_timesteps, experiment.has_dropout)
        step = self._compiled_step(method_name, method, recipe, how)

        def make_params() -> PyTree:
            return self.pretrain(only_existing=True).params

        def make_inputs() -> TrainInputs:
            num_neighbors = recipe.num_neighbors if "neighbors" in method.streams else 0
            # Of one process: an approximate index of each host could find others, and steps average what should be one gradient.
            data = parallel.from_main(lambda: experiment.forget_data(target, num_neighbors, recipe.neighbor_backend))
            shared = Shared(
                schedule=experiment.schedule,
                forget=data.forget,
                neighbors=data.neighbors,
                neighbor_rows=data.neighbor_rows,
                # The step donates its state, so the frozen reference is made once more.
                reference=make_params() if recipe.retain_loss == "distillation" else None,
                condition=experiment.condition(target),
            )
            batches = Batches(
                gather=experiment.gather(target.remain),
                num_remain=len(target.remain),
                forget_rows=target.copy_of,
                remain_size=recipe.batch_size if "remain" in method.streams else 0,
                forget_size=build.forget_batch_size(recipe, method),
                seed=seed,
            )
            return TrainInputs(batches, shared)

        job = Job("unlearn", "unlearn", "unlearn", self._folder(method_name, target, seed), seed, only_existing)
        return self._train(job, step, make_params, make_inputs)

    def record(self, method_name: str, target: Target, seed: int) -> tuple[int, float]:
        """Returns the steps that a finished run of a method took, and their seconds."""
        folder = self._folder(method_name, target, seed)
        with RunStore(folder / "checkpoints") as store:
            meta = store.latest_meta()
        if meta is None:  # damaged: made whole again, or explained
            model = self.unlearn(method_name, target, seed, only_existing=True)
            return model.steps, model.seconds
        return meta["step"], meta["seconds"]

    def _folder(self, method_name: str, target: Target, seed: int) -> epath.Path:
        if get_method(method_name).from_scratch:
            return self.workdir.retrained(seed, target.slug)
        return self.workdir.run(method_name, seed, target.slug)

    def _compiled_step(
        self, name: str, method: Method, recipe: ConfigDict, how: StepOptions, ema_decay: Callable | None = None
    ) -> CompiledStep:
        if name not in self.steps:
            p_step = make_train_step(method, self.experiment.eps_fn, how)
            self.steps[name] = CompiledStep(build.optimizer_from(recipe), ema_decay, p_step)
        return self.steps[name]

    def _train(
        self, job: Job, step: CompiledStep, make_params: Callable[[], PyTree], make_inputs: Callable[[], TrainInputs]
    ) -> Model:
        """The finished model of `job`: restored, or trained from where its newest checkpoint stands."""
        num_steps = self.config[job.recipe].num_steps
        with RunStore(job.folder / "checkpoints") as store:
            mend = f"run --config.mode={job.mode} first, or leave config.mode out to run every stage"
            unfinished = UserError(f"{job.folder} has no finished model; {mend}")
            if job.only_existing and store.latest_step() != num_steps:
                raise unfinished
            # A run that goes on from a checkpoint needs the shapes alone; parameters would lie beside the restored ones.
            begun = store.latest_step() is not None
            params = None if begun else make_params()

            def make_state() -> TrainState:
                # `restore` only traces this where there is a checkpoint.
                first = self.experiment.init_params(0) if begun else params
                return create_state(first, step.optimizer, step.ema_decay)

            state, seconds = restore(make_state, num_steps, store)
            if not isinstance(state, TrainState):
                return Model(state, num_steps, seconds)
            if job.only_existing:  # the newest checkpoint was damaged, and the one before is of a step on the way
                raise unfinished
            return self._take_steps(job, step, state, make_inputs(), store, seconds)

    def _take_steps(
        self, job: Job, step: CompiledStep, state: TrainState, inputs: TrainInputs, store: RunStore, seconds: float
    ) -> Model:
        num_steps = self.config[job.recipe].num_steps
        with Writer(job.folder / "log.jsonl", is_main=parallel.is_main_process(), every=self.config.log_every) as writer:
            writer.truncate_after(int(state.step))
            state, seconds = train(
                parallel.replicate(state),
                step.p_step,
                inputs.batches,
                parallel.replicate(inputs.shared),
                jax.random.key(job.seed),
                num_steps=num_steps,
                name=job.name,
                store=store,
                checkpoint_every=self.config.checkpoint_every,
                writer=writer,
                should_stop=self.should_stop,
                seconds_before=seconds,
                shard_ema=self.config.compute.shard_ema,
                rate_field=f"config.{job.recipe}.learning_rate",
            )
        return Model(state.eval_params, num_steps, seconds)

    def sample(self, folder: epath.Path, model: Callable[[], Model], target: Target, name: str) -> None:
        """Makes `folder/samples.npz` from `model()` if it is not there yet."""
        path, total = folder / "samples.npz", self.experiment.num_samples(target)
        parts = folder / "samples-parts"
        if parallel.from_main(path.exists):
            parallel.on_main(lambda: parts.rmtree(missing_ok=True))  # of a run that was killed before it could
            return
        params = model().params
        fingerprint = files.json_digest([tree_digest(params), self.experiment.sampling_digest(target)])
        main = parallel.is_main_process()
        with progress([], f"sample {name}", total=total, is_main=main, unit="img", compiles=True) as bar:

            def advance(done: int, _: int) -> None:
                bar.update(done - bar.n)
                # Every process counts the same batches, so all of them ask here.
                if done < total and parallel.any_process(self.should_stop()):
                    raise Preempted(f"sampling stopped at image {done} of {total}")

            arrays = self.experiment.sample(target, params, out_dir=parts, fingerprint=fingerprint, progress=advance)
        parallel.on_main(lambda: files.write_npz(path, **arrays))
        parallel.on_main(lambda: parts.rmtree(missing_ok=True))


def read_samples_or_explain(folder) -> dict[str, np.ndarray]:
    """Returns the arrays of `folder/samples.npz`; says which stage makes it if it is not there."""
    path = folder / "samples.npz"
    check(path.exists(), f"{path} is not there; run --config.mode=sample first, or leave config.mode out to run every stage")
    return read_samples(path)


def read_samples(path) -> dict[str, np.ndarray]:
    """Returns the arrays of a `samples.npz`. Raises `UserError` if it is damaged."""
    try:
        with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise UserError(f"{path} is damaged ({error}); delete it, and the same command makes it again") from error
