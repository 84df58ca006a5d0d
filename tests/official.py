"""The same fifty steps for the official code (tests/parity/record_official.py) and for ours: weights, batches, draws, and what is
compared of the parameters."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from retrack_jax import parallel
from retrack_jax.checkpoints import import_diffusers
from retrack_jax.data.batches import Batches
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.neighbors import nearest
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.unlearn.options import EraseDiffOptions, MethodOptions, RetrackOptions, SissOptions

FIXTURES = Path(__file__).parent / "fixtures"
MODEL, RECORDED = FIXTURES / "diffusers" / "safetensors", FIXTURES / "official" / "trajectories.npz"
# Larger than the official ones, so that on an untrained network every term counts.
OPTIONS = {
    "vanilla": MethodOptions(),
    "neggrad": MethodOptions(),
    "erasediff": EraseDiffOptions(eta=0.5),
    "siss": SissOptions(mixture=0.5, scale=500.0),
    "retrack": RetrackOptions(lam=0.5),
}
STEPS, MEASURED_AT = 50, (1, 5, 20, 50)
# The official optimizer; the gradient's norm is clipped at 1.
RATE, B1, B2, WEIGHT_DECAY, EPS = 5e-5, 0.95, 0.999, 1e-6, 1e-8
BATCH, NEIGHBORS, SEED = 8, 5, 3
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@cache
def start():
    """Returns (module, parameters) of the network that both codes start from."""
    return import_diffusers(MODEL)


@cache
def inputs(method: str) -> tuple[Batches, Shared]:
    """Returns a method's batches, of 24 images that remain and 2 that are forgotten, and what every step holds."""
    channels = start()[0].in_channels
    images = np.random.default_rng(SEED).uniform(-1, 1, (26, 8, 8, channels)).astype(np.float32)
    remain, forget = images[2:], images[:2]
    rows, _ = nearest(forget, remain, NEIGHBORS, "exact")
    streams = METHODS[method].streams
    shared = Shared(
        schedule=Schedule.from_config(SCHEDULE),
        forget={"x_0": forget},
        neighbors={"x_0": remain},
        neighbor_rows=np.asarray(rows),
    )
    batches = Batches(
        gather=lambda rows: {"x_0": remain[rows]},
        num_remain=len(remain),
        forget_rows=np.arange(len(forget)),
        remain_size=BATCH if "remain" in streams else 0,
        forget_size=BATCH if "forget" in streams else 0,
        seed=SEED,
    )
    return batches, shared


def measured(params, first) -> np.ndarray:
    """Returns what is compared: the norm of the parameters, then 24 fixed random projections of how far they moved, float64.

    Biases of attention's keys are left out: they cancel in the softmax, so that their gradient is rounding alone, of which AdamW
    makes steps of full size.
    """
    flat, before = map(_flat, (params, first))
    directions = np.random.default_rng(SEED).standard_normal((24, len(flat))) / np.sqrt(24)
    return np.append(np.linalg.norm(flat), directions @ (flat - before))


def apart(method: str) -> dict[int, float]:
    """Returns, after each of `MEASURED_AT` steps, how far our parameters are from the official ones, over how far those moved.

    Raises AssertionError if their norms differ by more than 1e-6 of it.
    """
    module, params = start()
    batches, shared = inputs(method)
    how = StepOptions(options=OPTIONS[method], num_steps=STEPS, t_max=1000)
    p_step = make_train_step(METHODS[method], make_eps_fn(module.apply, shared.schedule), how)
    optimizer = make_optimizer(learning_rate=RATE, b1=B1, b2=B2, eps=EPS, weight_decay=WEIGHT_DECAY, clip_norm=1.0)
    state, shared = parallel.replicate(create_state(parallel.copy(params), optimizer)), parallel.replicate(shared)
    with np.load(RECORDED) as recorded:
        theirs = dict(zip(MEASURED_AT, recorded[method], strict=True))
    found = {}
    for step in range(STEPS):
        state, _ = p_step(state, batches(step), shared, jax.random.key(SEED))
        parallel.block_on_cpu(state.step)
        if step + 1 in theirs:
            ours, expected = measured(jax.device_get(state.params), params), theirs[step + 1]
            np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
            found[step + 1] = float(np.linalg.norm(ours[1:] - expected[1:]) / np.linalg.norm(expected[1:]))
    return found


def _flat(params) -> np.ndarray:
    leaves = traverse_util.flatten_dict(params, sep="/").items()
    return np.concatenate([np.ravel(leaf) for name, leaf in leaves if not name.endswith("to_k/bias")]).astype(np.float64)
