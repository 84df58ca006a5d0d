"""The only table of methods: name -> streams it needs, its terms, how their gradients combine.

To add a method, write one function `(context, remain, forget) -> Terms` from the losses, and one entry in `METHODS`; if it has
options, add a record of them (options.py). A stream that the method does not ask for is None. A method with one term leaves
`correction` out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax

from retrack_jax.checks import check_choice
from retrack_jax.diffusion.conversions import expand
from retrack_jax.notation import Array, PyTree
from retrack_jax.unlearn import combine, losses
from retrack_jax.unlearn.options import EraseDiffOptions, MethodOptions, RetrackOptions, SissNoIsOptions, SissOptions
from retrack_jax.unlearn.streams import Context, Stream


@dataclass(frozen=True)
class Terms:
    """Scalars to differentiate, each a mean over the batch of sums over pixels, and scalars for the log."""

    main: Array
    correction: Array | None = None
    logs: Mapping[str, Array] = field(default_factory=dict)


def vanilla(context: Context, remain: Stream, forget: None) -> Terms:
    """Fine-tunes on the remaining images: L_R."""
    points = context.noise(remain)
    (eps_pred,) = context.predict(points)
    return Terms(main=context.retain_loss(eps_pred, points).mean())


def neggrad(context: Context, remain: None, forget: Stream) -> Terms:
    """Gradient ascent on the forgotten images."""
    points = context.noise(forget)
    (eps_pred,) = context.predict(points)
    return Terms(main=points.weighted(losses.neggrad(eps_pred, points.target)).mean())


def erasediff(context: Context, remain: Stream, forget: Stream) -> Terms:
    """L_R, and the distance to uniform noise at noisy forgotten images as the correction."""
    points_remain, points_forget = context.noise(remain), context.noise(forget)
    # Two passes: each gradient then goes back through its own half of the batch only.
    (eps_remain,) = context.predict(points_remain)
    (eps_forget,) = context.predict(points_forget)
    return Terms(
        main=context.retain_loss(eps_remain, points_remain).mean(),
        # Without a weight: at much noise no output of EDM's network stands for uniform noise.
        correction=losses.erasediff(eps_forget, forget.uniform()).mean(),
    )


def siss(context: Context, remain: Stream, forget: Stream) -> Terms:
    """Both terms from one forward pass at points of the mixture of remaining and forgotten images."""
    mixture = context.options.mixture
    from_forget = remain.bernoulli(mixture)
    # Each point is under the condition of the image that it was noised from.
    x_0 = jnp.where(expand(from_forget, remain.x_0), forget.x_0, remain.x_0)
    condition, source = remain.condition, None
    if condition is not None:
        both = remain.condition, forget.condition
        condition = jax.tree.map(lambda kept, gone: jnp.where(expand(from_forget, kept), gone, kept), *both)
        # A point under a condition that only one image of the pair has was noised from that one.
        same = jax.tree.map(lambda kept, gone: (kept == gone).reshape(len(from_forget), -1).all(axis=1), *both)
        same = jnp.stack(jax.tree.leaves(same)).all(axis=0)
        source = jnp.where(same, 0.0, jnp.where(from_forget, 1.0, -1.0))
    points = context.noise(remain.replace(x_0=x_0, condition=condition))
    (eps_pred,) = context.predict(points)
    pair = points.x_t, remain.x_0, forget.x_0, points.gamma, points.sigma, mixture, source
    main, correction = map(points.weighted, losses.siss(eps_pred, *pair, points.c))
    if context.distill:
        main = losses.siss_weights(*pair)[0] * context.retain_loss(eps_pred, points)
    return Terms(main=main.mean(), correction=correction.mean())


def siss_no_is(context: Context, remain: Stream, forget: Stream) -> Terms:
    """SISS without importance sampling: plain losses from two forward passes."""
    points_remain, points_forget = context.noise(remain), context.noise(forget)
    (eps_remain,) = context.predict(points_remain)
    (eps_forget,) = context.predict(points_forget)
    return Terms(
        main=context.retain_loss(eps_remain, points_remain).mean(),
        correction=points_forget.weighted(losses.vanilla(eps_forget, points_forget.target)).mean(),
    )


def retrack(context: Context, remain: Stream, forget: Stream) -> Terms:
    """lambda L_unlearn + (1 - lambda) L_R: at noisy forgotten images, the noise that leads to their neighbors."""
    points_remain, points_forget = context.noise(remain), context.noise(forget)
    eps_remain, eps_forget = context.predict(points_remain, points_forget)
    retain = context.retain_loss(eps_remain, points_remain).mean()
    lam, cap = context.options.lam, context.options.snr_cap
    gamma, sigma = points_forget.gamma, points_forget.sigma
    given = points_forget.x_t, forget.neighbors, gamma, sigma, forget.neighbor_bias, points_forget.c
    unlearn_B = points_forget.weighted(losses.retrack(eps_forget, *given))
    if forget.anchor is not None:
        to_anchor_B = context.distance_to_reference(eps_forget, points_forget, forget.anchor.condition)
        unlearn_B = jnp.where(forget.anchor.used, to_anchor_B, unlearn_B)
    if cap is not None:
        unlearn_B = losses.snr_weight(gamma, sigma, cap) * unlearn_B
    unlearn = unlearn_B.mean()
    return Terms(main=lam * unlearn + (1 - lam) * retain, logs={"unlearn": unlearn, "retain": retain})


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method trains.

    Attributes:
      streams: of "remain", "forget" and "neighbors", what it needs.
      terms: the function that computes its terms.
      options: the record of its own options, with their defaults.
      combine: `(main gradient, correction gradient, options) -> gradient` for a method with two terms, else None.
      paired: whether remain and forget batches are used in pairs and so must be of one size.
      one_pass: whether all images go through the network as one batch; else one of each pair, or one stream after the other.
      from_scratch: whether training starts from random weights rather than from the pretrained ones.
    """

    streams: frozenset[str]
    terms: Callable[[Context, Stream | None, Stream | None], Terms]
    options: type[MethodOptions] = MethodOptions
    combine: Callable[[PyTree, PyTree, MethodOptions], PyTree] | None = None
    paired: bool = False
    one_pass: bool = True
    from_scratch: bool = False


def _rescale(main: PyTree, correction: PyTree, options: SissNoIsOptions) -> PyTree:
    # The norm of the main gradient estimates that of the vanilla one, of which SISS takes a tenth.
    return combine.siss(main, correction, options.scale or options.share * optax.tree.norm(main))


def _erase(main: PyTree, correction: PyTree, options: EraseDiffOptions) -> PyTree:
    return combine.erasediff(main, correction, options.eta)


_BOTH = frozenset({"remain", "forget"})

METHODS: dict[str, Method] = {
    "retrack": Method(streams=_BOTH | {"neighbors"}, terms=retrack, options=RetrackOptions),
    "siss": Method(streams=_BOTH, terms=siss, options=SissOptions, combine=_rescale, paired=True, one_pass=False),
    "siss_no_is": Method(streams=_BOTH, terms=siss_no_is, options=SissNoIsOptions, combine=_rescale, one_pass=False),
    "erasediff": Method(streams=_BOTH, terms=erasediff, options=EraseDiffOptions, combine=_erase, one_pass=False),
    "neggrad": Method(streams=frozenset({"forget"}), terms=neggrad),
    "vanilla": Method(streams=frozenset({"remain"}), terms=vanilla),
    "retrain": Method(streams=frozenset({"remain"}), terms=vanilla, from_scratch=True),
}

# The model before unlearning is a row of every table, but takes no step.
PRETRAINED, RETRAIN = "pretrained", "retrain"
ALL = "all"


def get_method(name: str) -> Method:
    """Returns the entry of `METHODS`, or raises `UserError` with the nearest right name."""
    check_choice("method", name, METHODS)
    return METHODS[name]
