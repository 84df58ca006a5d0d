"""The diffusion process: noise schedules and the conversions between x_0, eps and v."""

from retrack_jax.diffusion.conversions import add_noise, eps_to_x0, expand, make_eps_fn, to_eps
from retrack_jax.diffusion.schedule import Schedule

__all__ = ["Schedule", "add_noise", "eps_to_x0", "expand", "make_eps_fn", "to_eps"]
