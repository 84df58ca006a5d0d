"""One training step for pretraining and for every method: accumulate, average, combine, clip, update.

The order is part of the method (see unlearn/combine.py): the gradients of each term are summed over microbatches, averaged over
devices, combined into one, and only then clipped and applied.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import optax

from retrack_jax import parallel
from retrack_jax.checks import check
from retrack_jax.data.dataset import to_x_0
from retrack_jax.diffusion.conversions import expand
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array, ModelEpsFn, PyTree, Rng
from retrack_jax.train.lora import LoraOptions, merge
from retrack_jax.train.packing import pack
from retrack_jax.train.state import TrainState
from retrack_jax.unlearn.methods import Method
from retrack_jax.unlearn.options import MethodOptions
from retrack_jax.unlearn.streams import CONDITION, POSTERIOR, Anchor, Context, Stream

# Folds of a step's key: one per stream, which its examples' keys come from.
_REMAIN, _FORGET = range(2)


@flax.struct.dataclass
class Shared:
    """What every device holds for the whole run.

    Attributes:
      forget: the forgotten examples, as `to_x_0` takes them, leaves `[F, ...]`; or None.
      neighbors: the distinct neighbors of all of them, leaves `[M, ...]`; or None.
      neighbor_rows: int `[F, K]`, rows of `neighbors`; or None.
      null_neighbor_rows: the same for forgotten examples whose condition is dropped; None: as `neighbor_rows`.
      neighbor_bias: float32 `[F, K]`, b_k of equation 9 of unlearn/losses.py; or None.
      anchor: leaves `[F, ...]`: the conditions of equation 10 there, and which forgotten examples use one; or None.
      reference: the frozen pretrained parameters, for the distillation loss, for anchors and below an adapter; or None.
      conditions: what examples' `condition` are rows of, `[P, ...]`, such as embeddings of prompts. A table of one row is passed
        to the network as it is and broadcasts. None: the network takes no condition, or what the examples carry is the
        condition itself (labels; the text states of captions, which are too many for a device).
      null: the condition `[1, ...]` that takes the place of those that are dropped; a dict may leave out entries, such as sizes
        of pictures, which then stay. None: none is.
    """

    schedule: Schedule
    forget: PyTree | None = None
    neighbors: PyTree | None = None
    neighbor_rows: Array | None = None
    null_neighbor_rows: Array | None = None
    neighbor_bias: Array | None = None
    anchor: Anchor | None = None
    reference: PyTree | None = None
    conditions: Array | None = None
    null: PyTree = None


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step runs.

    Attributes:
      num_steps: of the run, which options that change over it follow.
      accumulation: microbatches per step; gradients are averaged over them.
      t_min, t_max, logit_normal, log_normal: which timesteps are drawn, as in `Context`.
      distill: whether the retain loss matches the pretrained network rather than the noise.
      dropout: whether the network has dropout, which is on while training.
      condition_dropout: the probability with which an example's condition is dropped for `Shared.null`.
      lora: the adapter to `Shared.reference` that is trained; None: the network's parameters are.
    """

    options: MethodOptions = MethodOptions()
    num_steps: int = 1
    accumulation: int = 1
    t_min: int = 0
    t_max: int
    logit_normal: tuple[float, float] | None = None
    log_normal: tuple[float, float] | None = None
    distill: bool = False
    dropout: bool = False
    condition_dropout: float = 0.0
    lora: LoraOptions | None = None


def make_train_step(method: Method, eps_fn: ModelEpsFn, how: StepOptions, *, several: bool = False) -> Callable:
    """Returns the step, mapped over devices: `(state, batch, shared, rng) -> (state, metrics)`.

    Args:
      method: an entry of the table of methods.
      eps_fn: `(params, x_t, t, *condition, **kwargs) -> eps_pred`; it is given a condition if the examples have one.
      how: how the step runs.
      several: whether one call takes several steps. Leaves of the batch are then `[D, steps, b, ...]` and metrics `[steps]`. The
        host starts one program and not one a step, which small networks on an accelerator may otherwise wait for.

    The step takes a batch with a device axis: `remain`, examples as `to_x_0` takes them, with their `condition` if they have
    one, and `remain_index` `[D, b]`, their global indices in the batch; `forget_row` `[D, b']`, rows of `shared.forget`, and
    `forget_index`. `rng` is the run's base key. The step donates the state. Metrics are float32 scalars, means over the batch
    of sums over pixels.
    """

    def step(state: TrainState, batch: PyTree, shared: Shared, rng: Rng):
        step_rng = jax.random.fold_in(rng, state.step)
        options = how.options.at(state.step, how.num_steps)

        def terms(trained: PyTree, microbatch: PyTree):
            params = trained if how.lora is None else merge(how.lora, shared.reference, trained)
            context = Context(
                schedule=shared.schedule,
                eps_fn=_close(eps_fn, params, shared.conditions, how.dropout),
                reference_fn=None if shared.reference is None else _close(eps_fn, shared.reference, shared.conditions),
                distill=how.distill,
                options=options,
                t_min=how.t_min,
                t_max=how.t_max,
                logit_normal=how.logit_normal,
                log_normal=how.log_normal,
            )
            return method.terms(context, *_streams(method, microbatch, shared, step_rng, how.condition_dropout))

        def gradients(microbatch: PyTree):
            def losses(params):
                loss = terms(params, microbatch)
                logs = {"loss": loss.main, **loss.logs}
                if loss.correction is not None:
                    logs["correction"] = loss.correction
                for value in (loss.main, loss.correction):
                    check(value is None or value.ndim == 0, "a method's terms must be scalars, means over the batch")
                return (loss.main, loss.correction), logs

            # One forward pass for both gradients; each goes back only through what its term depends on.
            values, tangents, logs = jax.linearize(losses, state.params, has_aux=True)

            def gradient(term: int):
                return jax.linear_transpose(lambda params: tangents(params)[term], state.params)(jnp.ones_like(values[term]))[0]

            return (gradient(0), None if method.combine is None else gradient(1)), logs

        zeros = jax.tree.map(jnp.zeros_like, (state.params, None if method.combine is None else state.params))
        # Small leaves are averaged as one vector (packing.py); accelerators' compilers do the same by themselves.
        packed, unpack = pack(_accumulate(gradients, zeros, batch, how.accumulation))
        (main_grad, correction_grad), logs = unpack(parallel.pmean(packed))
        grad = main_grad if method.combine is None else method.combine(main_grad, correction_grad, options)
        # Packed as the optimizer packs it, so that the compiler computes the norm once for this and for the clipping.
        metrics = {**logs, "grad_norm": optax.tree.norm(pack(grad)[0])}
        return state.apply_gradients(grad), metrics

    def steps(state: TrainState, batches: PyTree, shared: Shared, rng: Rng):
        return jax.lax.scan(lambda state, batch: step(state, batch, shared, rng), state, batches)

    return parallel.pmap(steps if several else step, in_axes=(None, 0, None, None), donate_argnums=(0,))


def _close(eps_fn: ModelEpsFn, params: PyTree, conditions: Array | None, dropout: bool = False) -> Callable:
    """Returns `(x_t, t, condition, rngs) -> eps_pred`, all else closed over; `condition` are rows of `conditions`."""

    def arguments(condition: Array | None) -> tuple[Array, ...]:
        if conditions is None:
            return () if condition is None else (condition,)
        return (conditions if conditions.shape[0] == 1 else conditions[condition],)

    if not dropout:
        return lambda x_t, t, condition=None, rngs=None: eps_fn(params, x_t, t, *arguments(condition))

    # One example at a time, so that its masks depend on its own key and not on what shares its device; compiled as one batch.
    def predict(x_t, t, condition, rng):
        x_t, t, condition = jax.tree.map(lambda leaf: leaf[None], (x_t, t, condition))
        return eps_fn(params, x_t, t, *arguments(condition), deterministic=False, rngs={"dropout": rng})[0]

    return jax.vmap(predict)


def _streams(
    method: Method, microbatch: PyTree, shared: Shared, step_rng: Rng, condition_dropout: float
) -> tuple[Stream | None, Stream | None]:
    """Returns the remain and forget streams that `method` needs."""
    remain = forget = None
    if "remain" in method.streams:
        rngs, posterior_rngs = _stream_rngs(step_rng, _REMAIN, microbatch["remain_index"])
        remain, _ = _stream(microbatch["remain"], rngs, posterior_rngs, shared.null, condition_dropout)
    if "forget" in method.streams:
        rngs, posterior_rngs = _stream_rngs(step_rng, _FORGET, microbatch["forget_index"])
        rows = microbatch["forget_row"]
        forget, dropped = _stream(_take(shared.forget, rows), rngs, posterior_rngs, shared.null, condition_dropout)
        if "neighbors" in method.streams:
            neighbors, bias = _neighbors(shared, rows, dropped), _bias(shared, rows, dropped)
            forget = forget.replace(neighbors=neighbors, neighbor_bias=bias, anchor=_anchor(shared, rows, dropped))
    return remain, forget


def _stream(
    examples: PyTree, rngs: Rng, posterior_rngs: Rng, null: PyTree, condition_dropout: float
) -> tuple[Stream, Array | None]:
    """Returns a stream, and bool `[B]`: whose conditions are dropped, or None if none can be."""
    condition, dropped = examples.get("condition"), None
    if condition is not None and condition_dropout:
        draw = jax.vmap(lambda rng: jax.random.bernoulli(jax.random.fold_in(rng, CONDITION), condition_dropout))
        dropped = draw(rngs)
        null = {**condition, **null} if isinstance(condition, dict) else null
        condition = jax.tree.map(lambda own, none: jnp.where(expand(dropped, own), none, own), condition, null)
    return Stream(x_0=to_x_0(examples, posterior_rngs), rngs=rngs, condition=condition), dropped


def _bias(shared: Shared, rows: Array, dropped: Array | None) -> Array | None:
    """Returns the bias of each neighbor; nothing is compared with a caption that is dropped."""
    if shared.neighbor_bias is None or dropped is None:
        return _take(shared.neighbor_bias, rows)
    bias = shared.neighbor_bias[rows]
    return jnp.where(dropped[:, None] & jnp.isfinite(bias), 0.0, bias)


def _anchor(shared: Shared, rows: Array, dropped: Array | None) -> Anchor | None:
    """Returns the anchors of forgotten examples; under the null condition every remaining image can be a neighbor."""
    if shared.anchor is None:
        return None
    anchor = _take(shared.anchor, rows)
    return anchor if dropped is None else anchor.replace(used=anchor.used & ~dropped)


def _neighbors(shared: Shared, rows: Array, dropped: Array | None = None) -> Array:
    rows_BK = shared.neighbor_rows[rows]
    if dropped is not None and shared.null_neighbor_rows is not None:
        rows_BK = jnp.where(dropped[:, None], shared.null_neighbor_rows[rows], rows_BK)
    x_0 = to_x_0(_take(shared.neighbors, rows_BK.reshape(-1)), None)
    return x_0.reshape(rows_BK.shape + x_0.shape[1:])


def _take(tree: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def _stream_rngs(step_rng: Rng, stream: int, index: Array) -> tuple[Rng, Rng]:
    """Returns two keys per example, for the method's draws and for the latent posterior, from its global index."""
    rngs = parallel.example_rngs(jax.random.fold_in(step_rng, stream), index)
    return rngs, jax.vmap(lambda rng: jax.random.fold_in(rng, POSTERIOR))(rngs)


def _accumulate(gradients: Callable, zeros: PyTree, batch: PyTree, accumulation: int) -> tuple[PyTree, PyTree]:
    """Averages the gradients, like `zeros`, and the logs of `accumulation` equal microbatches of `batch`, in one loop."""
    if accumulation == 1:
        return gradients(batch)

    def body(total, microbatch):
        grads, logs = gradients(microbatch)
        return jax.tree.map(jnp.add, total, grads), logs

    split = jax.tree.map(lambda leaf: leaf.reshape((accumulation, -1) + leaf.shape[1:]), batch)
    total, logs = jax.lax.scan(body, zeros, split)
    return jax.tree.map(lambda leaf: leaf / accumulation, total), jax.tree.map(jnp.mean, logs)
