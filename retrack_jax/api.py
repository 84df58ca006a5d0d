"""The Python door: `run` does what the command does, `unlearn` takes arrays and returns parameters.

    from retrack_jax.api import run, unlearn
    summary = run(config, "runs/mine")
    params = unlearn(module.apply, params, schedule, remain, forget, method="retrack", rng=jax.random.key(0), num_steps=50)

Both raise `UserError` for what the user can fix.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from retrack_jax import parallel
from retrack_jax.checks import UserError, check, suggestion
from retrack_jax.config.devices import check_unlearning_step
from retrack_jax.config.reading import read_config, unlearn_options
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.batches import Batches
from retrack_jax.data.distinct import copies_of, distinct_neighbors, warn_of_copies
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.neighbors.search import nearest
from retrack_jax.notation import PyTree, Rng
from retrack_jax.train.loop import train
from retrack_jax.train.lora import init, merge
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, make_train_step
from retrack_jax.unlearn.methods import METHODS, get_method

log = logging.getLogger(__name__)
# Latents have a standard deviation of 1, so values above 3 are common in them; pixels in [0, 255] are far beyond.
_MAX_FLOAT = 20.0


def run(config: ConfigDict, workdir, *, should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Does what the command does: every stage that is not done yet. Returns `summary.json` as a dict.

    Args:
      config: from `configs/*.py`, for example `configs.digits_tshirt.get_config("retrack")`; fields may be changed.
      workdir: a folder or a `gs://` address.
      should_stop: asked between stages, steps, batches and metrics; true saves and raises `checks.Preempted`.

    Raises:
      UserError (a ValueError): what the user can fix.
    """
    from retrack_jax.run import sweep

    parallel.check_settings()
    return sweep.run(read_config(config), workdir, should_stop=should_stop)


def unlearn(
    apply_fn: Callable,
    params: PyTree,
    schedule: Schedule,
    remain,
    forget,
    *,
    method: str = "retrack",
    rng: Rng,
    labels: tuple[Sequence[int], Sequence[int]] | None = None,
    callback: Callable[[int, dict[str, float]], None] | None = None,
    **options,
) -> PyTree:
    """Returns parameters that have forgotten `forget`; arrays in, parameters out.

    Args:
      apply_fn: `apply_fn({"params": params}, x_t [B, ...], t int32 [B]) -> [B, ...]`, such as a Linen module's `apply`. Of a
        flow t is T sigma, float32; of EDM it is log(sigma)/4, float32, and x_t is scaled (diffusion/edm.py).
      params: the pretrained parameters; they are left as they are.
      schedule: the noise schedule; its `prediction_type` says what the network predicts. `Schedule.rectified_flow()` for a
        network that predicts the velocity eps - x_0, `Schedule.edm()` for one of EDM.
      remain, forget: images `[R, ...]` and `[F, ...]`, of one dtype: floats in the space that the network denoises ([-1, 1] for
        pixels), or uint8.
      method: a name of `unlearn.methods.METHODS` that starts from pretrained parameters.
      rng: a key from `jax.random.key`; decides the data order and all noise.
      labels: `(of remain [R], of forget [F])`, whole numbers, for a network that is called with a third argument, labels int32
        `[B]`. Each image is then noised under its own label, and its neighbors have that label.
      callback: called after every step as `callback(step, metrics)`: the steps done, and the losses and the norm of the gradient
        by name. What it raises ends the training.
      **options: `num_steps`, `batch_size`, `learning_rate`, `num_neighbors` (K) and the other fields of `config.unlearn`, and the
        method's own, such as `lam`. `adapter="lora", lora={"rank": 8}` trains an adapter and returns it merged. `dropout=True`
        trains with the network's dropout on.

    Each call compiles its step anew; `jax.config.update("jax_compilation_cache_dir", DIR)` keeps compiled programs, as the
    command does.

    Raises:
      UserError (a ValueError): an unknown method or option, K larger than the remaining set, a batch that the devices do not
      divide, images of different kinds, floats that neither pixels in [-1, 1] nor latents have, timesteps outside the
      schedule, an argument of another kind.
    """
    entry = get_method(method)
    check(not entry.from_scratch, f"method {method!r} trains from random weights; use train.loop for it")
    dropout = options.pop("dropout", False)
    _check_kinds(params, schedule, rng, callback)
    _check_names(method, options)
    fields = {name: options[name] for name in options if name in _names(UnlearnOptions)}
    recipe = unlearn_options(method, fields, {name: options[name] for name in options if name not in fields}, where="")
    check_unlearning_step(recipe, entry, where="")
    check(not recipe.calibrate, "calibrate: only runs read it; call unlearn.calibration.line_search with a loss of yours")
    unused = recipe.own.only_for("captions") + recipe.own.only_for("labels")
    check(not unused, f"{', '.join(unused)}: only networks with captions or labels have a use for it; leave it out")
    recipe.check_window(schedule.num_train_timesteps, where="")
    recipe.check_draws(schedule, where="")
    recipe.check_adapter(where="")

    remain, forget = np.asarray(remain), np.asarray(forget)
    check(remain.shape[1:] == forget.shape[1:], f"remain {remain.shape} and forget {forget.shape} must be images of one shape")
    check(len(remain) > 0 and len(forget) > 0, f"{len(remain)} images remain and {len(forget)} are forgotten; give some of both")
    name = _kind(remain, forget)
    of_remain, of_forget = _labels(labels, remain, forget)
    warn_of_copies(len(forget), copies_of(forget, remain), lambda row, copy: f"forget[{row}] and remain[{copy}]")
    shared = Shared(schedule=schedule, forget={name: forget, **of_forget})
    if "neighbors" in entry.streams:
        exclude = [np.flatnonzero(of_remain["condition"] != label) for label in of_forget["condition"]] if labels else None
        rows, _ = nearest(forget, remain, recipe.num_neighbors, recipe.neighbor_backend, exclude=exclude)
        distinct, positions = distinct_neighbors(rows)
        shared = dataclasses.replace(shared, neighbors={name: remain[distinct]}, neighbor_rows=positions)  # type: ignore[arg-type]
    if recipe.retain_loss == "distillation" or recipe.has_adapter:
        shared = dataclasses.replace(shared, reference=params)
    how = recipe.step_options(schedule.t_end, dropout)
    order_rng, step_rng = jax.random.split(rng)
    batches = Batches(
        gather=lambda rows: {name: remain[rows]} | {field: each[rows] for field, each in of_remain.items()},
        num_remain=len(remain),
        forget_rows=np.arange(len(forget)),
        remain_size=recipe.remain_size(entry),
        forget_size=recipe.forget_size(entry),
        seed=int(jax.random.bits(order_rng, dtype="uint32")),
    )
    # The step donates its state: it works on a copy, and the caller's parameters stay.
    start = init(recipe.lora, params, rng) if recipe.has_adapter else parallel.copy(params)
    state = create_state(start, recipe.optimizer(), recipe.ema_decay())
    state, _ = train(
        parallel.replicate(state), make_train_step(entry, make_eps_fn(apply_fn, schedule), how), batches,
        parallel.replicate(shared), step_rng, num_steps=recipe.num_steps, name="unlearn", rate_field="learning_rate",
        on_step=callback,
    )  # fmt: skip
    trained = state.eval_params
    return merge(recipe.lora, parallel.replicate(params), trained) if recipe.has_adapter else trained


def _names(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)} - {"own"}


def _check_names(method: str, options: dict) -> None:
    """Raises `UserError` for a keyword that is no option, or only another method's."""
    known = _names(UnlearnOptions) | _names(METHODS[method].options) | {"dropout"}
    for name in options:
        if name not in known:
            others = {option for other in METHODS.values() for option in _names(other.options)}
            check(name not in others, f"method {method!r} does not read the option {name!r}")
            raise UserError(f"there is no option {name!r}{suggestion(name, known)}")


def _kind(remain: np.ndarray, forget: np.ndarray) -> str:
    """Returns under which name `data.dataset.to_x_0` takes images of this dtype; pixels are scaled and floats are not."""
    advice = "give both as uint8 pixels, or both as float32 in the space that the network denoises ([-1, 1] for pixels)"
    check(remain.dtype == forget.dtype, f"remain is {remain.dtype} and forget is {forget.dtype}; {advice}")
    if remain.dtype == np.uint8:
        return "pixels"
    check(jax.numpy.issubdtype(remain.dtype, np.floating), f"remain and forget are {remain.dtype}; {advice}")
    low, high = (float(extreme([extreme(remain), extreme(forget)])) for extreme in (np.min, np.max))
    check(np.isfinite(low) and np.isfinite(high), f"remain and forget hold NaN or infinity; {advice}")
    check(max(-low, high) <= _MAX_FLOAT, f"remain and forget hold floats from {low:g} to {high:g}; {advice}")
    if low >= 0:
        log.warning(
            "remain and forget hold floats from %g to %g; a network of pixels takes them in [-1, 1], or as uint8", low, high
        )
    return "x_0"


def _labels(labels, remain: np.ndarray, forget: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the labels of both as examples carry them, int32; nothing if there are none."""
    if labels is None:
        return {}, {}
    check(len(labels) == 2, "labels must be a pair: those of remain, and those of forget")
    both = [np.asarray(each) for each in labels]
    for what, each, images in zip(("remain", "forget"), both, (remain, forget), strict=True):
        fits = each.shape == (len(images),) and each.dtype.kind in "iu" and bool((each >= 0).all())
        advice = f"give a whole number from 0 on for each of {len(images)} images"
        check(fits, f"the labels of {what} are {each.dtype} {each.shape}; {advice}")
    gone = sorted(set(both[1].tolist()) - set(both[0].tolist()))
    check(not gone, f"no image of label {', '.join(map(str, gone))} remains, so under it there is nothing to lead to")
    return {"condition": both[0].astype(np.int32)}, {"condition": both[1].astype(np.int32)}


def _check_kinds(params, schedule, rng, callback) -> None:
    """Raises `UserError` for an argument that is not what its name says."""
    is_key = isinstance(rng, jax.Array) and jax.numpy.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.shape == ()
    what = f"{rng.dtype}{list(rng.shape)}" if hasattr(rng, "dtype") else repr(rng)
    check(is_key, f"rng is {what}; it must be one key as jax.random.key(0) makes it (not jax.random.PRNGKey)")
    kind = type(schedule).__name__
    check(isinstance(schedule, Schedule), f"schedule is a {kind}; make one with Schedule.from_config or Schedule()")
    leaves = jax.tree.leaves(params)
    arrays = bool(leaves) and all(hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves)
    check(arrays, "params must be a tree of arrays, as import_diffusers returns it")
    others = {str(leaf.dtype) for leaf in leaves} - {"float32", "float64"}
    check(
        not others,
        f"params are {' and '.join(sorted(others))}: training rounds small steps away in less than float32; pass "
        "jax.tree.map(lambda leaf: leaf.astype('float32'), params), and convert the result",
    )
    check(
        not (isinstance(params, Mapping) and set(params) == {"params"}),
        "params is the dict of variables, {'params': ...}; pass what is below 'params'",
    )
    check(callback is None or callable(callback), f"callback is {callback!r}; it must be a function of (step, metrics)")
