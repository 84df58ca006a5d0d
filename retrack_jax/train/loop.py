"""The training loop: it decides when to step, log, save and stop; the mathematics is in step.py.

One call of the compiled program takes one step, or several. It returns the metrics of each of its steps, so the log has the same
lines for any number of them. No call reaches past a save, so the same steps are saved, and a run that is asked to stop does so
after a call. Results are those of single steps up to rounding: often to the bit, but the compiler may order the sums of a loop's
body in another way.

Metrics are read back only when they are logged or saved, or every 10th step without a log, so that the host does not wait for
the device in between. A value that is not finite still names the step at which it appeared, and never reaches a checkpoint.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax import parallel
from retrack_jax.checks import Diverged, Preempted
from retrack_jax.data.in_order import in_order
from retrack_jax.log import Writer, progress
from retrack_jax.notation import PyTree, Rng
from retrack_jax.train.profile import profiled
from retrack_jax.train.run_store import RunStore
from retrack_jax.train.state import TrainState
from retrack_jax.train.step import Shared

log = logging.getLogger(__name__)
# Without a log, metrics are read every so many steps. Several processes ask each other whether to stop at least as often; a
# preemption leaves them minutes.
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
    rate_field: str | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    profile: tuple[object, int] = ("", 0),
    p_steps: Callable | None = None,
    steps_per_call: int = 1,
) -> tuple[TrainState, float]:
    """Trains from `state.step` to `num_steps`; returns the last state and the seconds that the whole run took.

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
      should_stop: called after every call of the program, with several processes at least after every 10th step; if true, saves
        and raises `Preempted`.
      seconds_before: duration of the steps before `state.step`; checkpoints carry the sum, so that a resumed run reports it all.
      on_step: called as `on_step(steps done, metrics)` after every step, which makes the host wait for each.
      profile: a folder, and how many calls of the program jax's profiler records there.
      rate_field: where the user sets the learning rate, for an error's advice; `config.NAME.learning_rate` by default.
      p_steps: the mapped program of several steps (`make_train_step`), if `steps_per_call` is above 1.
      steps_per_call: how many steps it takes. Where fewer are left before a save or the end, `p_step` takes them one by one.

    Raises:
      Diverged: a metric is not finite; names the metric and the step. Earlier checkpoints stay.
      Preempted: `should_stop()` was true.
    """
    start = saved = int(state.step)
    began = time.perf_counter()
    advised_field = rate_field or f"config.{name}.learning_rate"
    unread: list[tuple[range, PyTree]] = []
    due = writer.due if writer is not None else lambda done: done % _ASK_EVERY == 0

    def read_metrics() -> None:
        scalars = {done: values for call, metrics in jax.device_get(unread) for done, values in by_step(call, metrics)}
        unread.clear()
        for done, values in scalars.items():
            _check_finite(name, done, values, store, advised_field)
        if writer is not None:  # on a full disk process 0 alone fails
            named = {done: {f"{name}_{key}": value for key, value in values.items()} for done, values in scalars.items()}
            parallel.on_main(lambda: [writer.scalars(done, values) for done, values in named.items()])
        for done, values in scalars.items() if on_step is not None else ():
            on_step(done, {key: float(value) for key, value in values.items()})

    def save(step: int) -> None:
        nonlocal saved
        read_metrics()
        # The metrics of a step are those of the parameters before its update.
        parameter = 0.0 if _all_finite(state.params) else math.nan
        _check_finite(name, step, {"a parameter": parameter}, store, advised_field)
        if store is not None and step != saved:
            if writer is not None:
                parallel.on_main(writer.flush)  # a restart begins at the checkpoint, so the log must reach it
            # The finished model needs no optimizer. The last full state stays too, so that a damaged model can be trained again
            # from there.
            tree = model_tree(state) if step == num_steps else state_tree(state)
            store.save(step, tree, {"seconds": seconds_before + time.perf_counter() - began})
            saved = step

    main = parallel.is_main_process()
    calls = list(calls_of(start, num_steps, steps_per_call, checkpoint_every))
    if steps_per_call > 1 and all(len(call) == 1 for call in calls):
        log.warning("config.compute.steps_per_call is %d, but %s saves or ends before so many steps", steps_per_call, name)
    prefetched = in_order(lambda call: parallel.to_devices(batch_of(call, batches)), calls, ahead=2)
    shown = progress(num_steps, name, initial=start, is_main=main, unit="step", compiles=True)
    with shown, closing(profiled(calls, *profile)) as profiled_calls:
        try:
            for call in profiled_calls:
                take = p_step if len(call) == 1 else p_steps
                state, metrics = take(state, next(prefetched), shared, rng)
                parallel.block_on_cpu(metrics)
                done = call.stop
                unread.append((call, metrics))
                logs = any(due(step + 1) for step in call)
                if logs or on_step is not None:
                    read_metrics()
                if done == num_steps or (checkpoint_every and done % checkpoint_every == 0):
                    save(done)
                # One process may learn of the preemption first, but all must save the same step, so all ask at the same steps.
                # Asking costs a round trip: several processes ask when metrics are read anyway, and rarely in between.
                asks = jax.process_count() == 1 or logs or any((step + 1) % _ASK_EVERY == 0 for step in call)
                if asks and done < num_steps and parallel.any_process(should_stop()):
                    save(done)
                    raise Preempted(f"{name} stopped at step {done} of {num_steps}")
                shown.update(len(call))
        finally:
            prefetched.close()
    jax.block_until_ready(state.params)
    seconds = seconds_before + time.perf_counter() - began
    if store is not None:
        store.wait()
    return state, seconds


def calls_of(start: int, stop: int, steps_per_call: int, checkpoint_every: int) -> Iterator[range]:
    """Yields the steps of each call from `start` to `stop`, numbered from 0.

    A call takes `steps_per_call` of them. Where fewer are left before the next save or `stop`, calls take one, because any other
    number would be another program to compile. With `checkpoint_every` 0 the only save is at `stop`.
    """
    step = start
    while step < stop:
        seam = min(stop, (step // checkpoint_every + 1) * checkpoint_every) if checkpoint_every else stop
        count = steps_per_call if step + steps_per_call <= seam else 1
        yield range(step, step + count)
        step += count


def batch_of(call: range, batches: Callable[[int], PyTree]) -> PyTree:
    """Returns what a call takes, of `step -> batch`: leaves `[D, b, ...]` for one step, `[D, steps, b, ...]` for several."""
    if len(call) == 1:
        return batches(call.start)
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *map(batches, call))


def by_step(call: range, metrics: dict) -> Iterator[tuple[int, dict]]:
    """Yields the number of steps done and the metrics of that step, for each step of a call that returned `metrics`."""
    for index, step in enumerate(call):
        yield step + 1, metrics if len(call) == 1 else {key: values[index] for key, values in metrics.items()}


def state_tree(state: TrainState) -> dict:
    """Returns the arrays of `state` as the plain tree that checkpoints hold."""
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return tree if state.ema_params is None else {**tree, "ema_params": state.ema_params}


def model_tree(state: TrainState) -> dict:
    """Returns the tree that the checkpoint of a finished run holds: the parameters to sample from."""
    return {"step": state.step, "params": state.eval_params}


def restore(make_state: Callable[[], TrainState], num_steps: int, store: RunStore) -> tuple[TrainState | PyTree, float]:
    """Returns where a run of `num_steps` stands, from its newest whole checkpoint, and the seconds it took so far.

    That is the parameters of a finished run, or a `TrainState` to continue from: `make_state()` if there is no checkpoint yet.
    """
    abstract = jax.eval_shape(make_state)
    restored = store.restore(lambda step: model_tree(abstract) if step == num_steps else state_tree(abstract))
    if restored is None:
        return make_state(), 0.0
    tree, meta = restored
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
        remaining = f"the checkpoint of step {saved} is intact" if saved is not None else "nothing was saved"
        raise Diverged(f"{name}: {bad[0]} is {float(metrics[bad[0]])} at step {step}; {remaining}; try a lower {rate_field}")
