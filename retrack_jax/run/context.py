"""What all runs of one command share."""

from collections.abc import Callable
from dataclasses import dataclass

from retrack_jax.config.options import Options
from retrack_jax.problem.problem import Problem
from retrack_jax.problem.target import Target
from retrack_jax.run.workdir import Workdir


@dataclass(frozen=True, eq=False)
class RunContext:
    """What all runs of one command share.

    Attributes:
      problem: data, network and how both meet.
      targets: every target of the command by its spec, resolved before the first run starts.
      workdir: where results lie.
      should_stop: asked between stages, steps, batches and metrics; true saves and raises `Preempted`.
    """

    problem: Problem
    targets: dict[str, Target]
    workdir: Workdir
    should_stop: Callable[[], bool]

    @property
    def options(self) -> Options:
        """The config."""
        return self.problem.options
