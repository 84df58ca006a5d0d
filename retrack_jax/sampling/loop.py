"""The sampling loop: one scan over precomputed rows of coefficients, for every sampler and any trailing shape.

A sampler is a frozen pytree. All that depends only on the schedule and the number of steps is computed on the host, in float64,
when the sampler is created, and stored in `rows`: NumPy arrays of length `num_calls`, one row for each call of the network. A
sampler has

    rows                        a dict of arrays [num_calls] with at least "t"
    stochastic                  whether `step` uses its noise
    init(x)                     -> state, a tuple whose first entry is x_t
    step(state, eps, noise, row) -> the next state; `noise` is standard normal, shaped as x

so the loop need not know which sampler it runs, and a test can feed noise that another library drew.

Each image has its own key in `rngs`: the initial noise is drawn from its fold with 0, the noise of step j from its fold with j +
1. So an image does not depend on the others in its batch.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from retrack_jax.checks import UserError
from retrack_jax.notation import Array, EpsFn, PyTree, Rng

Coefficients = dict[str, np.ndarray]


@struct.dataclass
class Sampler:
    """A sampler without its `step`: deterministic, with x_t alone as its state, unless a class says otherwise."""

    rows: Coefficients
    start: float = struct.field(pytree_node=False, default=1.0)  # what the initial noise is multiplied by
    stochastic = False

    def init(self, x: Array) -> tuple[Array, ...]:
        """Returns the state (x_t,)."""
        return (self.start * x,)


@partial(jax.vmap, in_axes=(0, None, None))
def _normal(rng: Rng, index: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(jax.random.fold_in(rng, index), shape, jnp.float32)


def initial_noise(rngs: Rng, shape: tuple[int, ...]) -> Array:
    """Returns standard normal noise, float32 [B, *shape], one image for each key in `rngs` [B]: where sampling starts."""
    return _normal(rngs, 0, tuple(shape))


def step_noise(rngs: Rng, step: Array, shape: tuple[int, ...]) -> Array:
    """Returns the standard normal noise that `sample` gives to step `step` (int, from 0), float32 [B, *shape]."""
    return _normal(rngs, step + 1, tuple(shape))


def sample(eps_fn: EpsFn, x_init: Array, rngs: Rng, sampler: Sampler) -> Array:
    """Returns samples of x_0 in the space that the network denoises, [B, ...] as `x_init`; traceable, the caller compiles it.

    Args:
      eps_fn: `eps_fn(x_t [B, ...], t [B]) -> eps`, the parameters closed over; wrap it for classifier-free guidance. For the
        samplers of flows it returns the velocity.
      x_init: [B, ...] float32, standard normal noise for a sampler that starts at the end of the schedule (`initial_noise`).
      rngs: one key per image, [B]; unused by deterministic samplers.
      sampler: from `make_sampler`, or `start_at` of one.
    """

    def one_call(state: tuple[Array, ...], step_and_row: PyTree):
        step, row = step_and_row
        x = state[0]
        eps = eps_fn(x, jnp.full(x.shape[:1], row["t"])).astype(x.dtype)
        noise = step_noise(rngs, step, x.shape[1:]).astype(x.dtype) if sampler.stochastic else None
        return sampler.step(state, eps, noise, row), None

    steps = np.arange(num_calls(sampler), dtype=np.int32)
    state, _ = jax.lax.scan(one_call, sampler.init(x_init), (steps, sampler.rows))
    return state[0]


def num_calls(sampler: Sampler) -> int:
    """Returns how many times `sample` calls the network."""
    return sampler.rows["t"].shape[0]


def start_at(sampler: Any, t: int) -> Any:
    """Returns the sampler that starts at timestep `t` instead of the first, for single-step samplers such as DDPM and DDIM.

    Raises:
      UserError: the sampler does not visit `t`.
    """
    visited = np.asarray(sampler.rows["t"])
    first = np.flatnonzero(visited == t)
    if not first.size:
        raise UserError(
            f"the sampler does not visit t = {t}; it visits {len(visited)} timesteps from {visited[0]} to {visited[-1]}"
        )
    return jax.tree.map(lambda row: row[first[0] :], sampler)


def float32_rows(t: np.ndarray, **coefficients: np.ndarray) -> Coefficients:
    """Returns the rows of a sampler: `t` as int32, or float32 if they are floats, and coefficients rounded once to float32."""
    rows = {name: np.broadcast_to(np.float32(value), np.shape(t)) for name, value in coefficients.items()}
    return {"t": np.asarray(t, np.float32 if np.asarray(t).dtype.kind == "f" else np.int32), **rows}


def predict_x0(x: Array, eps: Array, row: dict[str, Array], clip: float | None) -> Array:
    """Returns (x_t - sigma eps) / gamma, clipped to [-clip, clip] unless `clip` is None."""
    x_0 = (x - row["sigma"] * eps) / row["gamma"]
    return x_0 if clip is None else jnp.clip(x_0, -clip, clip)
