"""The same fifty steps for the official code (tests/parity/record_official.py) and for ours: weights, batches, draws, and what is
compared of the parameters."""

from functools import cache
from pathlib import Path

import numpy as np
from flax import traverse_util

from retrack_jax.checkpoints import import_diffusers
from retrack_jax.data.batches import Batches
from retrack_jax.diffusion import Schedule
from retrack_jax.neighbors import nearest
from retrack_jax.train.step import Shared
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


def _flat(params) -> np.ndarray:
    leaves = traverse_util.flatten_dict(params, sep="/").items()
    return np.concatenate([np.ravel(leaf) for name, leaf in leaves if not name.endswith("to_k/bias")]).astype(np.float64)
