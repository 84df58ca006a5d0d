"""PNDM's pseudo linear multistep method (PLMS), as Stable Diffusion uses it.

Source: "Pseudo Numerical Methods for Diffusion Models" (arXiv 2202.09778). Each step combines the predictions that there are, e_0
of now and up to three earlier ones e_1, e_2, e_3, and moves by the paper's equation (9):

    (1) e = e_0                                                  the first step
        e = (e_0 + e_1) / 2                                      the first step again, see below
        e = (3 e_0 - e_1) / 2                                    with one earlier prediction
        e = (23 e_0 - 16 e_1 + 5 e_2) / 12                       with two
        e = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24              with three
    (2) x' = sqrt(a'/a) x - (a' - a) e / (a sqrt(1 - a') + sqrt(a (1 - a) a'))

There is no Runge-Kutta warm-up, as in diffusers with `skip_prk_steps`. Instead, the first step is made twice: after the plain
step the network is called at the next timestep, and the step is repeated from its start with the mean of both predictions. So
there are num_steps + 1 calls, and the second timestep is visited twice. The history holds what the network predicts: a
`v_prediction` network's v are combined first and converted to eps after.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct

from retrack_jax.checks import UserError, check_int
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array
from retrack_jax.sampling.loop import Sampler, float32_rows

_WEIGHTS = np.array([[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0],
                     [55 / 24, -59 / 24, 37 / 24, -9 / 24]])  # fmt: skip


@struct.dataclass
class PNDM(Sampler):
    """PLMS; `num_steps` + 1 calls of the network."""

    combines_v: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> "PNDM":
        """Returns the sampler.

        Raises:
          UserError: fewer than 2 steps, or a schedule read from a PNDMScheduler that asks for the Runge-Kutta warm-up.
        """
        check_int("the number of PNDM steps", num_steps, 2)
        if schedule.class_name == "PNDMScheduler" and not schedule.skip_prk_steps:
            raise UserError(
                "the scheduler config sets skip_prk_steps to false, which pndm does not support; use ddim or dpm_solver"
            )
        visited = schedule.timesteps(num_steps, spacing)
        stride = schedule.num_train_timesteps // num_steps
        t = np.insert(visited, 1, visited[1])  # the second call is at the timestep after the first
        start, end = t.copy(), t - stride
        start[1], end[1] = t[1] + stride, t[1]  # it repeats the first step
        if start[1] >= schedule.num_train_timesteps:
            raise UserError(
                f"{num_steps} PNDM steps start at t = {start[1]}, past {schedule.num_train_timesteps - 1}; use another number"
            )
        repeats = np.arange(len(t)) == 1
        final = 1.0 if schedule.set_alpha_to_one else schedule.alpha_bar64[0]
        now, then, called = schedule.alpha_bar_at(start), schedule.alpha_bar_at(end, final), schedule.alpha_bar_at(t)
        weights = _WEIGHTS[np.minimum(np.arange(len(t)), 4)]
        rows = float32_rows(
            t,
            gamma=np.sqrt(called),
            sigma=np.sqrt(1 - called),
            start_gamma=np.sqrt(now),
            start_sigma=np.sqrt(1 - now),
            from_x=np.sqrt(then / now),
            from_e=-(then - now) / (now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then)),
            **{f"weight_{k}": weights[:, k] for k in range(4)},
        )
        return cls(rows={**rows, "repeats": repeats}, combines_v=schedule.prediction_type == "v_prediction")

    def init(self, x: Array) -> tuple[Array, ...]:
        """Returns the state (x_t, where the first step started, e_1, e_2, e_3); predictions not yet made have no weight."""
        return (x, x, *(jnp.zeros_like(x),) * 3)

    def step(self, state: tuple[Array, ...], eps: Array, noise: None, row: dict[str, Array]) -> tuple[Array, ...]:
        """Returns the state at the next timestep: equations (1) and (2); `noise` is not used."""
        x, x_first, e_1, e_2, e_3 = state
        e_0 = (eps - row["sigma"] * x) / row["gamma"] if self.combines_v else eps
        e = row["weight_0"] * e_0 + row["weight_1"] * e_1 + row["weight_2"] * e_2 + row["weight_3"] * e_3
        start = jnp.where(row["repeats"], x_first, x)
        if self.combines_v:
            e = row["start_gamma"] * e + row["start_sigma"] * start
        x_next = row["from_x"] * start + row["from_e"] * e
        history = tuple(jnp.where(row["repeats"], old, new) for old, new in ((e_1, e_0), (e_2, e_1), (e_3, e_2)))
        return (x_next, x_first, *history)
