"""Several steps in one call give what as many calls give: parameters, average, optimizer, log and checkpoints.

With this toy network to the bit; tests/run/test_same_command_again.py has one in which the compiler rounds differently.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax import parallel
from retrack_jax.checks import Diverged
from retrack_jax.config.reading import default_config, read_config
from retrack_jax.data.batches import Batches
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.log import Writer, read_log
from retrack_jax.run.reads import evaluation_reads, model_reads, sample_reads
from retrack_jax.train.loop import Preempted, calls_of, restore, state_tree, train
from retrack_jax.train.lora import LoraOptions, init
from retrack_jax.train.optimizer import make_ema_decay, make_optimizer, make_rate
from retrack_jax.train.run_store import RunStore, tree_digest
from retrack_jax.train.state import TrainState, create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from tests import toys
from tests.lowering import donated, lowered, lowering_for

SCHEDULE, IMAGES, LORA = toys.schedule(), toys.images(40), LoraOptions(rank=2, layers=("Dense_0", "Dense_1"))
ADAMW = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 1e-6, "clip_norm": 1.0}
TX = make_optimizer(learning_rate=make_rate(1e-3, 9, "cosine", 2), **ADAMW)
AVERAGE = make_ema_decay(power=0.75, inv_gamma=1.0, max_decay=0.999)


@dataclasses.dataclass
class Case:
    """A method's programs and what they start from."""

    method: str
    lora: LoraOptions | None = None
    accumulation: int = 1

    def __post_init__(self):
        entry = METHODS[self.method]
        how = StepOptions(options=entry.options(), t_max=1000, lora=self.lora, accumulation=self.accumulation)
        eps_fn = make_eps_fn(toys.ToyNet().apply, SCHEDULE)
        self.one, self.several = (make_train_step(entry, eps_fn, how, several=several) for several in (False, True))
        forgets = "forget" in entry.streams
        self.batches = Batches(
            gather=lambda rows: {"pixels": IMAGES[rows]}, num_remain=40, forget_rows=np.arange(3) if forgets else None,
            remain_size=16, forget_size=16 if forgets else 0, seed=0,
        )  # fmt: skip

    def start(self) -> TrainState:
        params = toys.params() if self.lora is None else init(self.lora, toys.params(), jax.random.key(1))
        return create_state(params, TX, AVERAGE)

    def train(self, steps_per_call, num_steps=7, store=None, state=None, batches=None, **more) -> TrainState:
        shared = Shared(schedule=SCHEDULE, forget={"pixels": IMAGES[:3]}, reference=toys.params() if self.lora else None)
        return train(
            parallel.replicate(self.start() if state is None else state), self.one, batches or self.batches,
            parallel.replicate(shared), jax.random.key(0), num_steps=num_steps, name="unlearn", store=store,
            p_steps=self.several, steps_per_call=steps_per_call, **more,
        )[0]  # fmt: skip

    def run(self, folder, steps_per_call, num_steps=7, **more):
        """Trains in a folder from where its newest checkpoint stands."""
        with RunStore(folder / "checkpoints") as store, Writer(folder / "log.jsonl", every=more.pop("every", 1)) as writer:
            state, _ = restore(self.start, num_steps, store)
            writer.truncate_after(int(state.step))
            return self.train(steps_per_call, num_steps, store, state, writer=writer, **more)


@pytest.fixture(scope="module")
def case():
    return Case("vanilla")


def log_of(folder):
    """The log without the times."""
    return [{name: value for name, value in record.items() if name != "time"} for record in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize(
    ("start", "stop", "size", "every", "expected"),
    [
        (0, 7, 3, 0, [3, 3, 1]),
        (0, 8, 3, 0, [3, 3, 1, 1]),
        (0, 8, 1, 0, [1] * 8),
        (0, 10, 4, 5, [4, 1, 4, 1]),
        (0, 8, 2, 4, [2, 2, 2, 2]),
        (3, 8, 2, 4, [1, 2, 2]),  # a run that continues reaches the next save
        (0, 4, 8, 2, [1] * 4),
        (5, 5, 3, 0, []),
    ],
)
def test_which_steps_a_call_takes(start, stop, size, every, expected):
    calls = list(calls_of(start, stop, size, every))
    assert [len(call) for call in calls] == expected
    assert [step for call in calls for step in call] == list(range(start, stop))


@pytest.mark.parametrize(("method", "lora", "accumulation"), [("vanilla", None, 2), ("erasediff", None, 1), ("siss", LORA, 1)])
def test_calls_of_three_steps_give_the_bits_of_single_ones(method, lora, accumulation):
    """Seven steps are two calls of three and one of one. EraseDiff and SISS combine two gradients."""
    case, seen = Case(method, lora, accumulation), {1: [], 3: []}
    states = [case.train(size, on_step=lambda *one, size=size: seen[size].append(one)) for size in seen]
    assert tree_digest(state_tree(states[0])) == tree_digest(state_tree(states[1]))
    assert toys.relative(states[0].ema_params, states[0].params) > 1e-6 and int(states[1].step) == 7
    assert seen[1] == seen[3] and [step for step, _ in seen[3]] == list(range(1, 8))


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_log_and_the_checkpoints_are_the_same(case, tmp_path, every):
    for size in (1, 2, 3):
        case.run(tmp_path / str(size), size, num_steps=8, checkpoint_every=4, every=every)
    assert log_of(tmp_path / "1") == log_of(tmp_path / "2") == log_of(tmp_path / "3")
    assert [record["step"] for record in log_of(tmp_path / "3")] == [step for step in range(1, 9) if step % every == 0]
    for folder in ("1", "2", "3"):
        assert {path.name for path in (tmp_path / folder / "checkpoints").iterdir() if path.name.isdigit()} == {"4", "8"}


def test_a_number_that_no_call_takes_is_said(case, caplog):
    case.train(8)
    assert "steps_per_call is 8, but unlearn saves or ends before so many steps" in caplog.text


def test_a_run_continues_with_another_number_of_steps_per_call(case, tmp_path):
    """It stops after the call in which it was asked, and ends as a run that was never stopped, with its log."""
    whole = case.run(tmp_path / "whole", 1, checkpoint_every=5)
    asked = iter([False, True])
    with pytest.raises(Preempted, match="step 4 of 7"):  # calls of 3, 1 and 1 steps, up to the save at 5
        case.run(tmp_path / "stopped", 3, checkpoint_every=5, should_stop=lambda: next(asked))
    resumed = case.run(tmp_path / "stopped", 2, checkpoint_every=5)
    assert tree_digest(state_tree(resumed)) == tree_digest(state_tree(whole))
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")


def test_what_is_not_finite_names_its_step_inside_a_call(case, tmp_path):
    def poisoned(step):
        scale = np.float32(np.nan if step == 4 else 1.0)
        batch = case.batches(step)
        return batch | {"remain": {"x_0": scale * batch["remain"]["pixels"].astype(np.float32)}}

    with pytest.raises(Diverged, match=r"is nan at step 5; the checkpoint of step 3 is intact"):
        case.run(tmp_path, 3, checkpoint_every=3, batches=poisoned)


def test_batches_are_on_the_devices_before_the_call(case):
    taken = []

    def step(state, batch, *rest):
        taken.extend(jax.tree.leaves(batch))
        return case.one(state, batch, *rest)

    shared = parallel.replicate(Shared(schedule=SCHEDULE))
    train(parallel.replicate(case.start()), step, case.batches, shared, jax.random.key(0), num_steps=2, name="unlearn")
    assert taken and all(isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(jax.devices()) for leaf in taken)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_one_program_of_several_steps_keeps_one_state(case, platform):
    state = case.start()
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3, axis=1), case.batches(0))
    with lowering_for(platform):
        text = lowered(case.several, state, batch, Shared(schedule=SCHEDULE), jax.random.key(0))
    leaves = len(jax.tree.leaves(state))
    assert "stablehlo.while" in text and donated(text)[:leaves] == [True] * leaves


def test_the_number_is_not_what_a_result_is_made_from():
    config = default_config()
    plain = read_config(config)
    config.compute.steps_per_call = 8
    more = read_config(config)
    assert more.compute.steps_per_call == 8
    for reads in (lambda options: model_reads(options, "retrack"), sample_reads, evaluation_reads):
        assert reads(plain) == reads(more)
