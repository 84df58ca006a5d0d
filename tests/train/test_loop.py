"""The loop and its checkpoints: resume is bit-identical, damage is noticed, what is not finite stops the run."""

import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax import parallel
from retrack_jax.checks import UserError
from retrack_jax.data.batches import Batches
from retrack_jax.data.in_order import in_order
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.log import Writer, read_log
from retrack_jax.train import loop
from retrack_jax.train.loop import Preempted, restore, train
from retrack_jax.train.optimizer import make_ema_decay, make_optimizer
from retrack_jax.train.run_store import RunStore, tree_digest
from retrack_jax.train.state import TrainState, create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from tests import toys

SCHEDULE, IMAGES = toys.schedule(), toys.images(40)
STEP = make_train_step(METHODS["vanilla"], make_eps_fn(toys.ToyNet().apply, SCHEDULE), StepOptions(t_max=1000))
TX = make_optimizer(learning_rate=1e-3, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
BATCHES = Batches(
    gather=lambda rows: {"pixels": IMAGES[rows]}, num_remain=40, forget_rows=None, remain_size=8, forget_size=0, seed=0
)


def go(folder, num_steps=9, batches=BATCHES, **kwargs):
    with RunStore(folder / "checkpoints") as store, Writer(folder / "log.jsonl") as writer:
        state, seconds = restore(lambda: create_state(toys.params(), TX), num_steps, store)
        if not isinstance(state, TrainState):
            return state
        writer.truncate_after(int(state.step))
        state, _ = train(
            parallel.replicate(state), STEP, batches, parallel.replicate(Shared(schedule=SCHEDULE)), jax.random.key(0),
            num_steps=num_steps, name="unlearn", store=store, writer=writer, seconds_before=seconds,
            **{"checkpoint_every": 2, **kwargs},
        )  # fmt: skip
    return state.params


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return go(folder), folder


def test_a_stopped_run_ends_bit_identical(tmp_path, undisturbed):
    asked = iter([False, False, False, False, True])
    with pytest.raises(Preempted, match="step 5 of 9"):
        go(tmp_path, should_stop=lambda: next(asked))
    state = go(tmp_path)
    assert tree_digest(state) == tree_digest(undisturbed[0])
    # The log holds each step once, in order.
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == list(range(1, 10))


def test_several_processes_ask_at_steps_that_all_know(tmp_path, monkeypatch):
    """Every 10th step at the least, however seldom the log is written: a stop must not wait for step 1000."""

    class AsOneOfTwo:
        def __getattr__(self, name):
            return (lambda: 2) if name == "process_count" else getattr(jax, name)

    monkeypatch.setattr(loop, "jax", AsOneOfTwo())
    taken, asked = [], []

    def step(state, *rest):
        taken.append(None)
        return STEP(state, *rest)

    def ask():
        asked.append(len(taken))
        return len(asked) == 3

    state, shared = parallel.replicate((create_state(toys.params(), TX), Shared(schedule=SCHEDULE)))
    with Writer(tmp_path / "log.jsonl", every=1000) as writer, pytest.raises(Preempted, match="at step 30 of 40"):
        train(state, step, BATCHES, shared, jax.random.key(0), num_steps=40, name="unlearn", writer=writer, should_stop=ask)
    assert asked == [10, 20, 30]


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_resumed_moving_average_is_the_same(tmp_path):
    """A run that was stopped continues with the moving average that its checkpoint holds, to the bit."""
    decay = make_ema_decay(power=0.75, inv_gamma=1.0, max_decay=0.999)

    def run(folder, **kwargs):
        with RunStore(folder / "checkpoints") as store:
            state, _ = restore(lambda: create_state(toys.params(), TX, decay), 9, store)
            return train(
                parallel.replicate(state), step, BATCHES, parallel.replicate(Shared(schedule=SCHEDULE)), jax.random.key(0),
                num_steps=9, name="pretrain", store=store, checkpoint_every=2, **kwargs,
            )[0]  # fmt: skip

    step = make_train_step(METHODS["vanilla"], make_eps_fn(toys.ToyNet().apply, SCHEDULE), StepOptions(t_max=1000))
    whole = run(tmp_path / "whole")
    asked = iter([False, False, True])
    with pytest.raises(Preempted, match="step 3 of 9"):
        run(tmp_path / "stopped", should_stop=lambda: next(asked))
    resumed = run(tmp_path / "stopped")
    assert tree_digest(resumed.ema_params) == tree_digest(whole.ema_params)
    assert toys.relative(whole.params, whole.ema_params) > 1e-4


def test_damage_to_any_file_is_never_used(tmp_path, undisturbed, caplog):
    """Each file of the newest checkpoint is damaged in turn: the run takes the one before, with a warning, and ends the same."""
    state, source = undisturbed
    caplog.set_level(logging.WARNING)
    names = [path.relative_to(source) for path in files_of(source / "checkpoints" / "9")]
    harmless = 0
    for index, name in enumerate(names):
        folder = tmp_path / str(index)
        shutil.copytree(source, folder)
        content = bytearray((folder / name).read_bytes())
        kind = index % 3
        if kind == 0 and content:
            content[len(content) // 2] ^= 0x40
            (folder / name).write_bytes(bytes(content))
        elif kind == 1:
            (folder / name).write_bytes(bytes(content[: len(content) // 2]))
        else:
            (folder / name).unlink()
        caplog.clear()
        again = go(folder)
        assert tree_digest(again) == tree_digest(state), name
        harmless += not caplog.records
    assert harmless < len(names)  # some files do matter, and were noticed


def test_no_whole_checkpoint_is_an_error_that_names_them(tmp_path, undisturbed):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    for path in files_of(tmp_path / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        go(tmp_path)


@pytest.mark.parametrize("error", [RuntimeError("UNAVAILABLE: connection reset"), MemoryError(), PermissionError(13, "denied")])
def test_a_checkpoint_that_cannot_be_read_now_is_left_as_it_is(error, tmp_path, undisturbed, monkeypatch):
    """The network's or the machine's fault is no damage: nothing older is used, and nothing deleted."""
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    before = files_of(tmp_path / "checkpoints")

    def fail(*args, **kwargs):
        raise error

    with RunStore(tmp_path / "checkpoints") as store:
        monkeypatch.setattr(store._manager, "restore", fail)
        with pytest.raises(UserError, match="cannot read the checkpoint .*/9 now .*try again"):
            store.restore(lambda step: undisturbed[0])
    assert files_of(tmp_path / "checkpoints") == before


def test_only_errors_of_the_disk_ask_for_space(tmp_path, monkeypatch):
    """A device that fails while its arrays are saved raises a RuntimeError too."""
    with RunStore(tmp_path) as store:
        for error, raised in ((OSError(28, "No space left on device"), UserError), (jax.errors.JaxRuntimeError("lost"), None)):

            def fail(*args, error=error, **kwargs):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(store._manager, "save", fail)
                with pytest.raises(raised or type(error), match="free some space" if raised else "lost"):
                    store.save(1, {"a": jnp.ones(2)})


def test_a_disk_that_is_full_when_the_store_closes_asks_for_space_too(tmp_path, monkeypatch):
    """Closing writes what was put off, so a disk may be full only then."""

    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=f"cannot save a checkpoint in {tmp_path}: No space left on device; free some space"):
        with RunStore(tmp_path) as store:
            close = store._manager.close
            monkeypatch.setattr(store._manager, "close", fail)
    close()


def test_the_log_reaches_the_checkpoint(tmp_path, monkeypatch):
    """A bucket's log is written whole by `flush` alone: a kill after a save loses no record of the steps before it."""
    flushed, real = [], RunStore.save
    monkeypatch.setattr(Writer, "flush", lambda writer: flushed.append([record["step"] for record in read_log(writer._path)]))
    monkeypatch.setattr(RunStore, "save", lambda *args: (flushed.append("saved"), real(*args)))
    go(tmp_path, num_steps=4)
    assert flushed[:4] == [[1, 2], "saved", [1, 2, 3, 4], "saved"]


def test_wrong_values_with_whole_files_are_noticed(tmp_path, undisturbed, monkeypatch):
    """A checkpoint that restores without complaint, but not to what was saved."""
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    with RunStore(tmp_path / "wrong") as store:
        digest = tree_digest
        monkeypatch.setattr("retrack_jax.train.run_store.tree_digest", lambda tree: digest(tree)[::-1])
        store.save(1, {"a": jnp.arange(3.0)})
    monkeypatch.undo()
    with RunStore(tmp_path / "wrong") as store, pytest.raises(UserError, match="digest"):
        store.restore(lambda step: {"a": jnp.zeros(3)})


def test_what_is_not_finite_names_the_quantity_and_the_step(tmp_path):
    def poisoned(step):
        batch = BATCHES(step)
        if step == 6:
            batch["remain"] = {"x_0": np.full((4, 2, *toys.SHAPE), np.nan, np.float32)}
        else:
            batch["remain"] = {"x_0": batch["remain"]["pixels"].astype(np.float32) / 127.5 - 1}
        return batch

    wanted = r"(grad_norm|loss) is nan at step 7; the checkpoint of step 6 is intact; try a lower config.unlearn.learning_rate$"
    with pytest.raises(UserError, match=wanted):
        go(tmp_path, batches=poisoned)
    with RunStore(tmp_path / "checkpoints") as store:
        assert store.latest_step() == 6


def test_the_advice_names_the_field_that_is_passed_in(tmp_path):
    def poisoned(step):
        return BATCHES(step) | {"remain": {"x_0": np.full((4, 2, *toys.SHAPE), np.nan, np.float32)}}

    with pytest.raises(UserError, match="try a lower config.pretrain.learning_rate$"):
        go(tmp_path, batches=poisoned, rate_field="config.pretrain.learning_rate")


def test_work_ahead_keeps_order_and_passes_errors_on():
    assert list(in_order(lambda step: step, range(3, 9), ahead=2, workers=2)) == list(range(3, 9))

    def broken(step):
        if step == 2:
            raise OSError("gone")
        return step

    with pytest.raises(OSError, match="gone"):
        list(in_order(broken, range(5), ahead=2))
