"""What the command does: checks, then every method, target and seed, then the summary."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flax.traverse_util import flatten_dict

from retrack_jax import files, parallel
from retrack_jax.checks import Diverged, check
from retrack_jax.config.devices import fit_to_devices
from retrack_jax.config.options import Options
from retrack_jax.config.presets import with_preset
from retrack_jax.config.rules import IMAGES, chosen_by_kind, complete, kind_of, open_fields, unset
from retrack_jax.problem.problem import build_problem, check_problem
from retrack_jax.run.context import RunContext
from retrack_jax.run.export import check_export
from retrack_jax.run.one_run import run_one
from retrack_jax.run.summary import summarize_workdir
from retrack_jax.run.tensorboard import check_tensorboard
from retrack_jax.run.workdir import Workdir
from retrack_jax.unlearn.methods import METHODS
from retrack_jax.weights.hub import is_id
from retrack_jax.weights.kinds import check_supported

log = logging.getLogger(__name__)
_FOLDERS = {"data.dir", "data.cache_dir", "eval.weights_dir"}


def run(options: Options, workdir, *, should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Runs every stage of every method, target and seed that is not done yet; arguments, result and errors as `api.run`'s."""
    if options.mode == "check":
        check_needs(options)
        return {}
    # Hosts may keep the same files in different folders: what is in them is compared once it is read.
    fields = flatten_dict(dataclasses.asdict(options), sep=".")
    texts = {f"config.{name}": json.dumps(value) for name, value in fields.items() if name not in _FOLDERS}
    parallel.check_same_everywhere("the config", texts)
    options = fit_to_devices(parallel.together(lambda: _checked(options)))
    check_problem(options)
    workdir = Workdir(workdir)
    check_export(options, workdir.root)
    parallel.together(lambda: check_tensorboard(options, workdir.root))
    files.sweep_temporaries(Path(options.data.cache_dir).expanduser(), untouched_seconds=600)
    with workdir.alone():
        problem = parallel.together(lambda: build_problem(options))
        targets = {spec: parallel.together(lambda spec=spec: problem.target(spec)) for spec in options.target_specs}
        for target in targets.values():
            parallel.check_same_everywhere("the files", problem.digests(target))
        context = RunContext(problem, targets, workdir, should_stop)
        _prepare(context)
        return _sweep(context)


def _checked(options: Options) -> Options:
    """Returns `options` with every number chosen, once the checkpoint is known to be of a kind that is supported."""
    if options.checkpoint:
        check_supported(options.checkpoint)
    return complete(options)


def _sweep(context: RunContext) -> dict:
    """Runs every method, target and seed, and returns the summary. A run that diverges does not end the others.

    Raises:
      UserError: something that the user can mend; what diverged, only after everything else is done.
    """
    options, diverged = context.options, []
    sweep = list(itertools.product(options.method_names, options.target_specs, options.seeds))
    for method, spec, seed in sweep:
        try:
            run_one(context, method, spec, seed)
        except Diverged as error:
            log.error("%s, target %s, seed %d: %s", method, spec, seed, error)
            diverged.append(f"{method}, target {spec}, seed {seed}: {error}")
    summary = summarize_workdir(context, sweep)
    check(not diverged, "; ".join(diverged))
    return summary


def _prepare(context: RunContext) -> None:
    """Finds the neighbors of all targets of a sweep in one pass over the images."""
    options, problem = context.options, context.problem
    methods = [name for name in options.method_names if name in METHODS and "neighbors" in METHODS[name].streams]
    if options.mode not in ("run", "unlearn") or len(context.targets) == 1:
        return
    recipes, targets = [options.recipe(name) for name in methods], list(context.targets.values())
    for search in {(recipe.num_neighbors, recipe.neighbor_backend) for recipe in recipes}:
        parallel.on_main(partial(problem.codec.prepare, targets, *search))


def check_needs(options: Options) -> None:
    """Lists what the config needs, found or missing, then checks its values, except those that depend on what is missing.

    Raises:
      UserError: a value that no run can use, or something is missing without which no run is possible.
    """
    from retrack_jax.data.checklist import print_requirements

    on_hub = is_id(options.checkpoint)  # what is there only a run looks into
    if options.checkpoint and not on_hub:
        check_supported(options.checkpoint)
    options = options if on_hub or is_id(options.pipeline) else with_preset(options)
    named = chosen_by_kind(options, IMAGES if on_hub else kind_of(options.checkpoint))  # the metrics need networks
    needed = print_requirements(dataclasses.asdict(named), unset(options))
    missing = [item for item in needed if not (item.found or item.without)]
    if not (missing or on_hub):
        options = _checked(options)
    if not (on_hub or open_fields(options)):
        check_problem(fit_to_devices(options))
    what = ", ".join(dict.fromkeys(item.description for item in missing))
    check(not missing, f"{len(missing)} of what {options.name} needs is missing: {what}; the list says what to do")
