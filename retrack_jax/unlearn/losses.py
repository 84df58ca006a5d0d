"""Per-image losses of the unlearning methods, as pure functions of arrays.

Every loss returns float32 `[B]`: a squared norm is a *sum* over pixels and channels, and the caller averages over the batch. This
decides what clipping the gradient norm at 1.0 does, so it is part of the method.

With gamma = sqrt(alpha_bar_t), sigma = sqrt(1 - alpha_bar_t), r = gamma / sigma and x_t = gamma x_0 + sigma eps:

  (1) vanilla      ||eps_pred - eps||^2
  (2) neggrad      -||eps_pred - eps||^2
  (3) erasediff    ||eps_pred - u||^2,  u ~ U[0, 1)
  (4) siss         eps_y = (x_t - gamma y)/sigma,  d_y = ||eps_y||^2 / 2,
                   w_a = 1/((1-lambda) + lambda exp(d_a - d_f)),  w_f = 1/((1-lambda) exp(d_f - d_a) + lambda),
                   main = w_a ||eps_pred - eps_a||^2,  correction = w_f ||eps_pred - eps_f||^2
  (5) retrack      v_k = (x_t - gamma a_k)/sigma,  p_k = softmax_k(-||v_k||^2 / 2),  sum_k p_k ||eps_pred - v_k||^2

(1), (3) and (5): ReTrack (arXiv 2509.13007); (4): SISS (arXiv 2503.01034), both with the notation of notation.py.

Squared norms of size D are never subtracted from each other. Differences of them are taken as inner products, which is exact
where the difference is small: with v_0 as the reference,

  (6) log p_k - log p_0 = -(||v_k||^2 - ||v_0||^2)/2 = -(r/2) <a_0 - a_k, v_k + v_0>

and (5) splits into one weighted target and a spread that does not depend on the network, so the gradient needs one target, not K:

  (7) sum_k p_k ||e - v_k||^2 = ||e - v_bar||^2 + r^2 sum_k p_k ||a_k - a_bar||^2,  v_bar = (x_t - gamma a_bar)/sigma,
      a_bar = sum_k p_k a_k

(5)'s target differs from the true noise by r (f - a_bar), so that small t, with r up to 100, decide every clipped step. An option
weights each forgotten example's term as min-SNR (arXiv 2303.09556) weights a loss on eps:

  (8) w = min(1, c / r^2)

With captions c_f of the forgotten image and c_k of its neighbors, the posterior is that of pairs of image and caption:

  (9) p_k = softmax_k(-||v_k||^2 / 2 + b_k),  b_k = beta sim(c_f, c_k)

so that (6) becomes log p_k - log p_0 = -(r/2) <a_0 - a_k, v_k + v_0> + b_k - b_0.

If no remaining image can be a neighbor under the condition c of a forgotten one, such as a label of which nothing remains, or a
caption that is like no other, the target is what the pretrained network, eps_0, predicts at the same point under another
condition c_a, such as the null label or the nearest remaining caption:

  (10) anchor      ||eps_pred(x_t, c) - eps_0(x_t, c_a)||^2

The network of a rectified flow predicts the velocity, whose target at x_t is (x_t - y)/sigma if x_t was noised from y. Its losses
are in its own space, as it was trained: eps_pred is the velocity, and targets are the general

  (11) (x_t - c y)/sigma,   c = gamma for eps, 1 for the velocity,

so that c takes the place of gamma in every target of (4), (5) and (7), and (c/sigma)^2 that of r^2 in the spread of (7). The
weights of (4) and (5) hold x_t alone, so that gamma stays in them. A squared difference in velocity is 1/gamma^2 of that in eps.

On EDM's schedule gamma is 1 and eps_pred is eps, so nothing here changes. The losses of an example, but for (3), are then
multiplied by the weight that makes of them losses in the network's own output: equation 5 of diffusion/edm.py.
"""

import jax
import jax.numpy as jnp

from retrack_jax.diffusion.conversions import expand
from retrack_jax.notation import Array

# Weights of (4) are at most 1/lambda and 1/(1-lambda), except at lambda 0 or 1 for points that the mixture never draws, where
# they are unbounded. Cutting them at e^60 keeps their product with a squared norm finite in float32.
_MAX_LOG_WEIGHT = 60.0
_FAR = 1e9  # stands for the infinite d_a - d_f of a point that one image of a pair cannot have made


def vanilla(eps_pred: Array, eps: Array) -> Array:
    """Returns the ordinary denoising loss (1), `[B]`, summed over pixels. Arguments are `[B, ...]`."""
    _check_same_shape(eps_pred=eps_pred, eps=eps)
    return _squared_norm(eps_pred - eps)


def neggrad(eps_pred: Array, eps: Array) -> Array:
    """Returns the negative denoising loss (2), `[B]`, summed over pixels: descending it forgets by gradient ascent."""
    return -vanilla(eps_pred, eps)


def erasediff(eps_pred: Array, uniform: Array) -> Array:
    """Returns EraseDiff's correction term (3), `[B]`, summed over pixels; `uniform` `[B, ...]` is drawn from U[0, 1)."""
    _check_same_shape(eps_pred=eps_pred, uniform=uniform)
    return _squared_norm(eps_pred - uniform)


def siss(
    eps_pred: Array,
    x_t: Array,
    remain: Array,
    forget: Array,
    gamma: Array,
    sigma: Array,
    mixture: float | Array,
    source: Array | None = None,
    c: Array | None = None,
) -> tuple[Array, Array]:
    """Returns SISS's importance-weighted terms (4): `(main [B], correction [B])`, each summed over pixels.

    Args:
      eps_pred: the prediction at `x_t`, `[B, ...]`.
      x_t: noised from `forget` with probability `mixture`, else from `remain`, `[B, ...]`.
      remain, forget: the clean pair a, f, `[B, ...]`.
      gamma, sigma: `[B]`.
      mixture: lambda in [0, 1], a scalar.
      source: float `[B]`, 1 where `x_t` can only come from `forget`, because it is under a condition that `remain` does not
        have, -1 where only from `remain`, else 0. None: 0 everywhere.
      c: of (11), `[B]`; None: gamma.
    """
    _check_same_shape(eps_pred=eps_pred, x_t=x_t, remain=remain, forget=forget)
    weight_remain, weight_forget = siss_weights(x_t, remain, forget, gamma, sigma, mixture, source)
    c = gamma if c is None else c
    main = weight_remain * _squared_norm(eps_pred - _noise_from(remain, x_t, c, sigma))
    correction = weight_forget * _squared_norm(eps_pred - _noise_from(forget, x_t, c, sigma))
    return main, correction


def siss_weights(
    x_t: Array,
    remain: Array,
    forget: Array,
    gamma: Array,
    sigma: Array,
    mixture: float | Array,
    source: Array | None = None,
) -> tuple[Array, Array]:
    """Returns the importance weights `(w_a [B], w_f [B])` of (4), in log space and without gradient."""
    # d_a - d_f by the same inner product as (6).
    noise_sum = _noise_from(remain, x_t, gamma, sigma) + _noise_from(forget, x_t, gamma, sigma)
    gap = 0.5 * (gamma / sigma) * _inner(forget - remain, noise_sum)
    if source is not None:
        gap = jnp.where(source == 0, gap, _FAR * source)
    log_forget = jnp.log(jnp.full_like(gap, mixture))
    log_remain = jnp.log(jnp.full_like(gap, 1 - mixture))
    log_weights = -jnp.logaddexp(log_remain, log_forget + gap), -jnp.logaddexp(log_remain - gap, log_forget)
    return tuple(jax.lax.stop_gradient(jnp.exp(jnp.minimum(weight, _MAX_LOG_WEIGHT))) for weight in log_weights)


def retrack(
    eps_pred: Array,
    x_t: Array,
    neighbors: Array,
    gamma: Array,
    sigma: Array,
    bias: Array | None = None,
    c: Array | None = None,
) -> Array:
    """Returns ReTrack's loss (5), `[B]`, summed over pixels, evaluated by (7).

    The value is the published one, and so is the gradient; only one target per image enters the backward pass.

    Args:
      eps_pred: the prediction at `x_t`, `[B, ...]`.
      x_t: the forgotten images, noised, `[B, ...]`.
      neighbors: the K nearest remaining images of each, clean, in the space that the network denoises, `[B, K, ...]`.
      gamma, sigma: `[B]`.
      bias: b_k of (9), `[B, K]`; -inf leaves a neighbor out, but not the first. None: 0, the published loss.
      c: of (11), `[B]`; None: gamma.
    """
    target, spread = retrack_target(x_t, neighbors, gamma, sigma, bias, c)
    return vanilla(eps_pred, target) + spread


def snr_weight(gamma: Array, sigma: Array, cap: float | Array) -> Array:
    """Returns the weights (8), `[B]` in (0, 1], for gamma and sigma `[B]`; `cap` is c, the largest r^2 that keeps its weight."""
    # (c sigma^2)/gamma^2 rather than c/r^2: finite where sigma is 0, and 1 where gamma is.
    return jnp.minimum(1.0, cap * jnp.square(sigma) / jnp.maximum(jnp.square(gamma), jnp.finfo(gamma.dtype).tiny))


def retrack_target(
    x_t: Array, neighbors: Array, gamma: Array, sigma: Array, bias: Array | None = None, c: Array | None = None
) -> tuple[Array, Array]:
    """Returns `(v_bar [B, ...], spread [B])` of (7): the single weighted target and the constant of the published value."""
    p_BK = retrack_posterior(x_t, neighbors, gamma, sigma, bias)
    p_BK1 = expand(p_BK, neighbors)
    # Around neighbor 0, because the neighbors are close to each other and the weights sum to 1 only up to rounding.
    origin = neighbors[:, :1]
    a_bar = origin + jnp.sum(p_BK1 * (neighbors - origin), axis=1, keepdims=True)
    c = gamma if c is None else c
    spread_B = jnp.square(c / sigma) * jnp.sum(p_BK * _squared_norm(neighbors - a_bar, batch_axes=2), axis=1)
    target = _noise_from(a_bar[:, 0], x_t, c, sigma)
    return jax.lax.stop_gradient(target), jax.lax.stop_gradient(spread_B)


def retrack_posterior(x_t: Array, neighbors: Array, gamma: Array, sigma: Array, bias: Array | None = None) -> Array:
    """Returns `p_k` of (9), `[B, K]`, by (6); no gradient passes through it, because it holds no parameter."""
    if neighbors.ndim != x_t.ndim + 1 or neighbors.shape[0] != x_t.shape[0] or neighbors.shape[2:] != x_t.shape[1:]:
        raise ValueError(f"neighbors {neighbors.shape} must be [B, K, ...] for x_t {x_t.shape}")
    gamma_B1, sigma_B1 = gamma[:, None], sigma[:, None]
    v_BK = _noise_from(neighbors, x_t[:, None], gamma_B1, sigma_B1)
    logits_BK = -0.5 * (gamma_B1 / sigma_B1) * _inner(neighbors[:, :1] - neighbors, v_BK + v_BK[:, :1], batch_axes=2)
    if bias is not None:
        logits_BK += bias - bias[:, :1]
    return jax.lax.stop_gradient(jax.nn.softmax(logits_BK, axis=1))


def _noise_from(clean: Array, x_t: Array, c: Array, sigma: Array) -> Array:
    """Equation (11): with c = gamma the noise that leads from `clean` to `x_t`."""
    return (x_t - expand(c, clean) * clean) / expand(sigma, clean)


def _inner(a: Array, b: Array, batch_axes: int = 1) -> Array:
    # Products and a sum rather than a dot, which a TPU would take in bfloat16.
    return jnp.sum(a * b, axis=tuple(range(batch_axes, a.ndim)))


def _squared_norm(x: Array, batch_axes: int = 1) -> Array:
    return _inner(x, x, batch_axes)


def _check_same_shape(**arrays: Array) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("arrays must have one shape: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
