"""What all runs of one command share, and one of them."""

from collections.abc import Callable
from dataclasses import dataclass

from etils import epath

from retrack_jax.config.options import Options
from retrack_jax.problem.problem import Problem
from retrack_jax.problem.target import Target
from retrack_jax.run.workdir import Workdir


@dataclass(frozen=True, eq=False)
class RunContext:
    """What all runs of one command share.

    Attributes:
      targets: every target of the command by its spec, resolved before the first run starts.
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


@dataclass(frozen=True, eq=False)
class Run:
    """One (method, target, seed).

    Attributes:
      folder: where its results lie.
      before: where the pretrained model's samples and metrics lie, which all runs on the same conditions share.
    """

    context: RunContext
    method: str
    target: Target
    seed: int

    @property
    def folder(self) -> epath.Path:
        return self.context.workdir.run(self.method, self.seed, self.target.slug)

    @property
    def before(self) -> epath.Path:
        shared = self.context.workdir.pretrained
        return shared / self.target.slug if self.context.problem.conditioning.of_target else shared
