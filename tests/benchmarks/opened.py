"""A workdir that a command has filled, opened to be measured."""

from collections.abc import Sequence

from retrack_jax.checks import UserError
from retrack_jax.cli import flags as command_line
from retrack_jax.cli.process import set_up_jax
from retrack_jax.config.reading import read_config
from retrack_jax.notation import PyTree
from retrack_jax.problem.problem import build_problem
from retrack_jax.run.context import RunContext
from retrack_jax.run.training import load, pretrained
from retrack_jax.run.workdir import Workdir


def opened(flags: Sequence[str]) -> tuple[RunContext, PyTree]:
    """Returns what the runs of a command with these flags share, with its first target, and the pretrained parameters.

    Ends in one line if there is no such model.
    """
    try:
        config, root = command_line.parse(["", *flags])
        set_up_jax(config.compute.cpu_devices)
        problem = build_problem(read_config(config))
        spec = problem.options.target_specs[0]
        context = RunContext(problem, {spec: problem.target(spec)}, Workdir(root), lambda: False)
        return context, pretrained(context, load).params
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
