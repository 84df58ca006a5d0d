"""What the command does: checks, then every method, target and seed, then the summary."""

import logging
from collections.abc import Callable

from ml_collections import ConfigDict

from retrack_jax.checks import Diverged, check
from retrack_jax.config import build
from retrack_jax.config import rules as recipe
from retrack_jax.problem.kinds import check_experiment
from retrack_jax.run.one_run import Runner, methods_of
from retrack_jax.run.workdir import Workdir

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir, *, should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Runs every stage of every method, target and seed that is not done yet, and returns `summary.json`.

    Args:
      config: as from `configs/*.py`.
      workdir: a folder or a `gs://` address.
      should_stop: asked between stages, steps, batches and metrics; true saves and raises `checks.Preempted`.

    Raises:
      UserError: something that the user can mend.
    """
    if config.mode == "check":
        check_needs(config)
        return {}
    config = recipe.complete(config)
    config = build.fit_to_devices(config)
    check_experiment(config)
    for method in methods_of(config):  # each has its own recipe: all are told wrong before the first one runs
        build.check_config(build.effective_config(config, method))
    workdir = Workdir(workdir)
    with workdir.alone():
        return sweep(Runner(config, workdir, should_stop))


def sweep(runner: Runner) -> dict:
    """Runs every method, target and seed, and returns the summary. One that diverges says nothing on the others, which go on.

    Raises:
      UserError: something that the user can mend; what diverged only once all is done that can be.
    """
    config, diverged = runner.config, []
    for method in methods_of(config):
        for spec in build.target_specs(config):
            for seed in config.seeds:
                try:
                    runner.run_one(method, spec, seed)
                except Diverged as error:
                    log.error("%s, target %s, seed %d: %s", method, spec, seed, error)
                    diverged.append(f"{method}, target {spec}, seed {seed}: {error}")
    summary = runner.finish()
    check(not diverged, "; ".join(diverged))
    return summary


def check_needs(config: ConfigDict) -> None:
    """Lists what the config needs, found or missing, then checks its values, except those that depend on what is missing."""
    from retrack_jax.data.checklist import print_requirements

    needed = print_requirements(config.to_dict(), recipe.unset(config))
    if all(item.found or item.optional for item in needed):
        config = recipe.complete(config)
    if not recipe.open_fields(config):
        check_experiment(config)
        for method in methods_of(config):
            build.check_config(build.effective_config(config, method))
