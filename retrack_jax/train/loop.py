"""The loop: owns the order of things, not the mathematics.

It reads metrics back only where they are logged or saved, or every 10th step where there is no log, so that the device is not
waited for in between; a value that is not finite still names the step it first appeared at, and never reaches a checkpoint.
"""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from retrack_jax import parallel
from retrack_jax.checkpoints.run_store import RunStore
from retrack_jax.checks import Diverged, Preempted
from retrack_jax.data.batches import prefetch
from retrack_jax.log import Writer, progress
from retrack_jax.notation import PyTree, Rng
from retrack_jax.train.state import TrainState
from retrack_jax.train.step import Shared

# Without a log metrics are read every so many steps. Several processes ask each other whether to stop at least as often: what
# preempts them gives minutes.
_ASK_EVERY = 10


def train(
    state: TrainState,
    p_step: Callable,
    batches: Callable[[int], PyTree],
    shared: Shared,
    rng: Rng,
    *,
    num_steps: int,
    name: str,
    store: RunStore | None = None,
    checkpoint_every: int = 0,
    writer: Writer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    seconds_before: float = 0.0,
    shard_ema: bool = False,
    rate_field: str | None = None,
) -> tuple[TrainState, float]:
    """Trains from `state.step` to `num_steps` and returns the last state and the seconds that all of it took.

    Args:
      state: where to start, replicated.
      p_step: the mapped step of train/step.py.
      batches: `step -> batch`.
      shared: what every device holds.
      rng: the run's base key; the step folds its number in.
      num_steps: where to stop.
      name: `pretrain`, `unlearn`... for the log and the progress line.
      store: where to save, every `checkpoint_every` steps (0: only at the end) and at the end.
      writer: where scalars go, as `NAME_loss` and so on.
      should_stop: asked after every step, of several processes after every 10th at the least; true saves and raises `Preempted`.
      seconds_before: what the steps before `state.step` took; checkpoints carry the sum, so that a resumed run reports all of it.
      shard_ema: whether the moving average lies sharded over the devices meanwhile, as `p_step` must then expect it (step.py
        `StepOptions`). It is saved and returned whole, so another number of devices can go on from there.
      rate_field: where the user sets the learning rate, for an error's advice; `config.NAME.learning_rate` by default.

    Raises:
      Diverged: a metric is not finite; it names the metric and the step. What was saved before stays.
      Preempted: `should_stop` said so.
    """
    start = saved = int(state.step)
    if shard_ema:
        state = state.shard_ema()
    began = time.perf_counter()
    mend = rate_field or f"config.{name}.learning_rate"
    unread: list[tuple[int, PyTree]] = []

    def read_metrics() -> None:
        scalars = {}
        for step, metrics in jax.device_get(unread):
            _check_finite(name, step, metrics, store, mend)
            scalars[step] = {f"{name}_{key}": value for key, value in metrics.items()}
        unread.clear()
        if writer is not None:  # on a full disk process 0 alone fails
            parallel.on_main(lambda: [writer.scalars(step, values) for step, values in scalars.items()])

    def save(step: int) -> None:
        nonlocal saved
        read_metrics()
        # The metrics of a step are those of the parameters before its update.
        _check_finite(name, step, {"a parameter": 0.0 if _all_finite(state.params) else math.nan}, store, mend)
        if store is not None and step != saved:
            if writer is not None:
                parallel.on_main(writer.flush)  # a restart begins at the checkpoint, so the log must reach it
            # The finished model needs no optimizer. The last state saved on the way stays beside it: should the model be damaged,
            # it is made again from there.
            tree = model_tree(state) if step == num_steps else state_tree(state.unshard_ema())
            store.save(step, tree, {"seconds": seconds_before + time.perf_counter() - began})
            saved = step

    main = parallel.is_main_process()
    made = prefetch(batches, start, num_steps)
    options = dict(total=num_steps, initial=start, is_main=main, unit="step", compiles=True)
    with progress(range(start, num_steps), name, **options) as steps:
        try:
            for step in steps:
                state, metrics = p_step(state, next(made), shared, rng)
                parallel.block_on_cpu(metrics)
                done = step + 1
                unread.append((done, metrics))
                due = done % _ASK_EVERY == 0 if writer is None else writer.due(done)
                if due:
                    read_metrics()
                if done == num_steps or (checkpoint_every and done % checkpoint_every == 0):
                    save(done)
                # One process may be told before the others, but all must save the same step, so all ask at the same ones. Asking
                # costs a round trip: several processes do it where the metrics are read anyway, and seldom in between.
                asks = jax.process_count() == 1 or due or done % _ASK_EVERY == 0
                if asks and done < num_steps and parallel.any_process(should_stop()):
                    save(done)
                    raise Preempted(f"{name} stopped at step {done} of {num_steps}")
        finally:
            made.close()
    jax.block_until_ready(state.params)
    seconds = seconds_before + time.perf_counter() - began
    if store is not None:
        store.wait()
    return state.unshard_ema(), seconds


def state_tree(state: TrainState) -> dict:
    """Returns the arrays of `state` as the plain tree that is saved."""
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return tree if state.ema_params is None else {**tree, "ema_params": state.ema_params}


def model_tree(state: TrainState) -> dict:
    """Returns what is kept of a finished run: the parameters to sample from."""
    return {"step": state.step, "params": state.eval_params}


def restore(make_state: Callable[[], TrainState], num_steps: int, store: RunStore) -> tuple[TrainState | PyTree, float]:
    """Returns where a run of `num_steps` stands, from its newest whole checkpoint, and the seconds it took so far.

    That is the finished parameters; or a `TrainState` to go on from, `make_state()` where there is no checkpoint yet.
    """
    abstract = jax.eval_shape(make_state)
    found = store.restore(lambda step: model_tree(abstract) if step == num_steps else state_tree(abstract))
    if found is None:
        return make_state(), 0.0
    tree, meta = found
    if meta["step"] == num_steps:
        return tree["params"], meta["seconds"]
    return abstract.replace(**tree), meta["seconds"]


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _check_finite(name: str, step: int, metrics: PyTree, store: RunStore | None, rate_field: str) -> None:
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if bad:
        saved = store.latest_step() if store is not None else None
        kept = f"the checkpoint of step {saved} is intact" if saved is not None else "nothing was saved"
        raise Diverged(f"{name}: {bad[0]} is {float(metrics[bad[0]])} at step {step}; {kept}; try a lower {rate_field}")
