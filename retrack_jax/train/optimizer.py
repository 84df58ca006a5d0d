"""The optimizer and the schedules that depend on the step: learning rate, moving average."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from retrack_jax.checks import check_choice
from retrack_jax.notation import Array, PyTree
from retrack_jax.train.packing import pack

LEARNING_RATE_SCHEDULES = ("constant", "cosine")


def make_rate(learning_rate: float, num_steps: int, schedule: str = "constant", warmup_steps: int = 0) -> optax.Schedule:
    """Returns `step -> learning rate`.

    `cosine` rises linearly over `warmup_steps` and falls to 0 at `num_steps` along half a cosine; `constant` may warm up as well.
    """
    check_choice("schedule", schedule, LEARNING_RATE_SCHEDULES)
    if schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1))
    if warmup_steps:
        return optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps)
    return optax.constant_schedule(learning_rate)


def make_optimizer(
    *, learning_rate: float | optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Returns AdamW with decoupled weight decay after clipping the global gradient norm at `clip_norm` (0: no clipping)."""
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _packed(optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw)


def _packed(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `optimizer` with its state and updates on packed trees (packing.py); it must treat all values alike."""

    def init(params: PyTree) -> PyTree:
        return optimizer.init(pack(params)[0])

    def update(grad: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        packed, unpack = pack(grad)
        packed, state = optimizer.update(packed, state, pack(params)[0])
        return unpack(packed), state

    return optax.GradientTransformation(init, update)


def make_ema_decay(*, power: float, inv_gamma: float, max_decay: float) -> Callable[[Array], Array]:
    """Returns `step -> min(1 - (1 + step/inv_gamma)^-power, max_decay)`, diffusers' warm-up of the moving average."""

    def decay(step: Array) -> Array:
        grown = 1.0 - (1.0 + step.astype(jnp.float32) / inv_gamma) ** -power
        return jnp.minimum(grown, max_decay)

    return decay
