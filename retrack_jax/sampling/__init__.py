"""Samplers: one loop, one step rule a file, and the generation of many images."""

from retrack_jax.checks import check_choice
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.sampling.ddim import DDIM
from retrack_jax.sampling.ddpm import DDPM
from retrack_jax.sampling.dpm_solver import DPMSolver
from retrack_jax.sampling.euler import Euler
from retrack_jax.sampling.flow_euler import FlowEuler
from retrack_jax.sampling.flow_heun import FlowHeun
from retrack_jax.sampling.generate import generate, make_sample_fn, pmap_sample_fn
from retrack_jax.sampling.inject import inject
from retrack_jax.sampling.loop import Sampler, initial_noise, num_calls, sample, start_at, step_noise
from retrack_jax.sampling.pndm import PNDM

SAMPLERS = {
    "ddpm": DDPM, "ddim": DDIM, "dpm_solver": DPMSolver, "pndm": PNDM, "euler": Euler, "flow_euler": FlowEuler,
    "flow_heun": FlowHeun,
}  # fmt: skip


def make_sampler(name: str, schedule: Schedule, num_steps: int, *, spacing: str | None = None) -> Sampler:
    """Returns the sampler `name`, one of `SAMPLERS`, over `num_steps` steps of `schedule`.

    Args:
      spacing: `leading`, `trailing` or `linspace`; by default the schedule's own, but `linspace` for DPM-Solver++, as in
        diffusers. Flows have none.

    Raises:
      UserError: an unknown name or spacing, a number of steps that the sampler cannot make, or a sampler that is for flows with
        a schedule of betas, or the reverse.
    """
    check_choice("sampler", name, SAMPLERS)
    return SAMPLERS[name].create(schedule, num_steps, spacing=spacing)


__all__ = [
    "DDIM", "DDPM", "DPMSolver", "Euler", "FlowEuler", "FlowHeun", "PNDM", "SAMPLERS", "Sampler", "generate", "initial_noise",
    "inject", "make_sample_fn", "make_sampler", "num_calls", "pmap_sample_fn", "sample", "start_at", "step_noise",
]  # fmt: skip
