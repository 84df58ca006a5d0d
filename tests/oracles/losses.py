"""Float64 oracle for the losses and updates of data unlearning, in plain loops, from the equations alone.

Conventions. Images are `[B, ...]` (any number of pixel axes), neighbors `[B, K, ...]`, `gamma` and `sigma`
`[B]`; every input is converted to float64 first. A squared norm is a sum over pixels. A per-image loss is
`[B]`, without any mean over the batch, and its gradient with respect to `eps_pred` has the shape of
`eps_pred`: for the gradient of the batch mean, divide by B. Flat vectors are `[P]`.

    x_t = gamma x_0 + sigma eps            the noisy image
    eps_y = (x_t - gamma y) / sigma        the noise that leads from the clean image y to x_t
    d_y = |x_t - gamma y|^2 / (2 sigma^2)  so d_y = |eps_y|^2 / 2, and p(x_t | y) ~ exp(-d_y)

Slow on purpose, and nothing here comes from the package. Sums are `math.fsum`, and the difference of two
distances is summed pixel by pixel: two sums near 1e9, subtracted, would keep 1e-7 only. The `decimal`
functions at the end hold the same equations to 60 digits.
"""

import decimal
import math

import numpy as np

# Images as lists of flat lists of floats: loops over Python floats are faster than over NumPy scalars.


def _images(array):
    """`[B, ...]` -> B flat lists of floats."""
    array = np.asarray(array, dtype=np.float64)
    if array.ndim < 1:
        raise ValueError("expected a batch axis, got a scalar")
    return array.reshape(array.shape[0], math.prod(array.shape[1:])).tolist()


def _neighbors(array):
    """`[B, K, ...]` -> B lists of K flat lists of floats."""
    array = np.asarray(array, dtype=np.float64)
    if array.ndim < 2 or array.shape[1] < 1:
        raise ValueError(f"expected [B, K, ...] with K >= 1, got {array.shape}")
    return array.reshape(*array.shape[:2], math.prod(array.shape[2:])).tolist()


def _vector(array):
    """`[P]` -> a list of P floats."""
    array = np.asarray(array, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"expected a flat vector, got {array.shape}")
    return array.tolist()


def _like(images, template):
    """Lists of flat images -> a float64 array of the template's shape."""
    return np.array(images, dtype=np.float64).reshape(np.shape(template))


def _same_shape(first, *others):
    for other in others:
        if np.shape(other) != np.shape(first):
            raise ValueError(f"shapes differ: {np.shape(first)} and {np.shape(other)}")


def _check_neighbors(x_t, neighbors):
    shape, image = np.shape(neighbors), np.shape(x_t)
    if shape[:1] + shape[2:] != image:
        raise ValueError(f"neighbors {shape} do not fit images {image}")


def _per_image(gamma, sigma, images):
    """gamma and sigma, `[B]` each -> B pairs of floats."""
    batch = np.shape(images)[0]
    if np.shape(gamma) != (batch,) or np.shape(sigma) != (batch,):
        raise ValueError(f"gamma and sigma must be [{batch}], got {np.shape(gamma)} and {np.shape(sigma)}")
    return list(zip(_vector(gamma), _vector(sigma), strict=True))


def _squared_distance(u, v):
    """|u - v|^2 of two flat images."""
    return math.fsum((a - b) * (a - b) for a, b in zip(u, v, strict=True))


def _noise(x, y, gamma, sigma):
    """eps_y = (x - gamma y) / sigma of flat images."""
    return [(x_i - gamma * y_i) / sigma for x_i, y_i in zip(x, y, strict=True)]


def _distance_gap(x, y, z, gamma, sigma):
    """d_y - d_z of flat images, as one sum of the pixels' differences of squares."""
    terms = []
    for x_i, y_i, z_i in zip(x, y, z, strict=True):
        from_y = x_i - gamma * y_i
        from_z = x_i - gamma * z_i
        terms.append((from_y - from_z) * (from_y + from_z))
    return math.fsum(terms) / (2.0 * sigma * sigma)


def _log(value):
    return math.log(value) if value > 0.0 else -math.inf


def _exp(value):
    """exp, with inf where float64 overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _log_add(u, v):
    """log(exp(u) + exp(v)); either may be -inf."""
    low, high = min(u, v), max(u, v)
    if high == -math.inf:
        return -math.inf
    return high + math.log1p(math.exp(low - high))


def _times(weight, value):
    """weight * value, where an overflowed weight (inf) times an exact 0 is 0."""
    return 0.0 if value == 0.0 else weight * value


def batch_mean(per_image):
    """Mean over the batch of a per-image loss: `[B]` -> float."""
    values = _vector(per_image)
    return math.fsum(values) / len(values)


def implied_noise(x_t, clean, gamma, sigma):
    """eps_y = (x_t - gamma y) / sigma. x_t, clean `[B, ...]`; gamma, sigma `[B]` -> `[B, ...]`."""
    _same_shape(x_t, clean)
    result = []
    for x, y, (g, s) in zip(_images(x_t), _images(clean), _per_image(gamma, sigma, x_t), strict=True):
        result.append(_noise(x, y, g, s))
    return _like(result, x_t)


# The plain losses.


def squared_error(eps_pred, target):
    """|eps_pred - target|^2, summed over pixels: `[B, ...]` twice -> `[B]`."""
    _same_shape(eps_pred, target)
    losses = [_squared_distance(e, u) for e, u in zip(_images(eps_pred), _images(target), strict=True)]
    return np.array(losses, dtype=np.float64)


def squared_error_grad(eps_pred, target):
    """d/d eps_pred of `squared_error`: 2 (eps_pred - target), `[B, ...]`."""
    _same_shape(eps_pred, target)
    grads = []
    for e, u in zip(_images(eps_pred), _images(target), strict=True):
        grads.append([2.0 * (e_i - u_i) for e_i, u_i in zip(e, u, strict=True)])
    return _like(grads, eps_pred)


def vanilla(eps_pred, eps):
    """L_R per image: |eps_pred - eps|^2. `[B, ...]` twice -> `[B]`."""
    return squared_error(eps_pred, eps)


def vanilla_grad(eps_pred, eps):
    """2 (eps_pred - eps), `[B, ...]`."""
    return squared_error_grad(eps_pred, eps)


def neggrad(eps_pred, eps):
    """NegGrad per forget image: -|eps_pred - eps|^2. `[B, ...]` twice -> `[B]`, never positive."""
    return -squared_error(eps_pred, eps)


def neggrad_grad(eps_pred, eps):
    """-2 (eps_pred - eps), `[B, ...]`."""
    return -squared_error_grad(eps_pred, eps)


def erasediff(eps_pred, uniform):
    """EraseDiff's correction per forget image: |eps_pred - u|^2, u ~ U[0, 1). `[B, ...]` twice -> `[B]`."""
    return squared_error(eps_pred, uniform)


def erasediff_grad(eps_pred, uniform):
    """2 (eps_pred - u), `[B, ...]`."""
    return squared_error_grad(eps_pred, uniform)


# SISS.


def siss_log_weights(x_t, remain, forget, gamma, sigma, mixture):
    """(log w_a, log w_f), `[B]` each, finite for every mixture in [0, 1]; see `siss_weights`."""
    _same_shape(x_t, remain, forget)
    if not 0.0 <= mixture <= 1.0:
        raise ValueError(f"mixture must be in [0, 1], got {mixture}")
    log_remain, log_forget = _log(1.0 - mixture), _log(mixture)
    log_w_a, log_w_f = [], []
    batch = zip(_images(x_t), _images(remain), _images(forget), _per_image(gamma, sigma, x_t), strict=True)
    for x, a, f, (g, s) in batch:
        gap = _distance_gap(x, a, f, g, s)  # d_a - d_f
        log_w_a.append(-_log_add(log_remain, log_forget + gap))
        log_w_f.append(-_log_add(log_remain - gap, log_forget))
    return np.array(log_w_a), np.array(log_w_f)


def siss_weights(x_t, remain, forget, gamma, sigma, mixture):
    """Importance weights of SISS, (w_a, w_f), `[B]` each.

        w_a = 1 / ((1 - lambda) + lambda exp(d_a - d_f))
        w_f = 1 / ((1 - lambda) exp(d_f - d_a) + lambda)

    x_t, remain (a), forget (f) `[B, ...]`; gamma, sigma `[B]`; mixture is lambda, a float in [0, 1]. Limits:
    lambda 0 gives w_a = 1, w_f = exp(d_a - d_f); lambda 1 gives w_a = exp(d_f - d_a), w_f = 1. Between them
    the weights are at most 1 / (1 - lambda) and 1 / lambda. Only at lambda 0 or 1 can one exceed
    float64, when the pair is far apart and x_t lies at the image that lambda never noises: it is inf then.
    """
    log_w_a, log_w_f = siss_log_weights(x_t, remain, forget, gamma, sigma, mixture)
    return np.array([_exp(w) for w in log_w_a.tolist()]), np.array([_exp(w) for w in log_w_f.tolist()])


def _siss_targets(x_t, remain, forget, gamma, sigma):
    """The two targets, eps_a and eps_f, `[B, ...]` each."""
    return implied_noise(x_t, remain, gamma, sigma), implied_noise(x_t, forget, gamma, sigma)


def siss(eps_pred, x_t, remain, forget, gamma, sigma, mixture):
    """SISS per image, (main, correction), `[B]` each.

        main = w_a |eps_pred - eps_a|^2,  correction = w_f |eps_pred - eps_f|^2

    eps_pred, x_t, remain, forget `[B, ...]`; gamma, sigma `[B]`; mixture is lambda. Both share one eps_pred.
    """
    _same_shape(eps_pred, x_t)
    weights = siss_weights(x_t, remain, forget, gamma, sigma, mixture)
    targets = _siss_targets(x_t, remain, forget, gamma, sigma)
    losses = []
    for weight, target in zip(weights, targets, strict=True):
        errors = squared_error(eps_pred, target).tolist()
        losses.append(np.array([_times(w, e) for w, e in zip(weight.tolist(), errors, strict=True)]))
    return losses[0], losses[1]


def siss_grad(eps_pred, x_t, remain, forget, gamma, sigma, mixture):
    """Gradients of `siss`: (2 w_a (eps_pred - eps_a), 2 w_f (eps_pred - eps_f)), `[B, ...]` each."""
    _same_shape(eps_pred, x_t)
    weights = siss_weights(x_t, remain, forget, gamma, sigma, mixture)
    targets = _siss_targets(x_t, remain, forget, gamma, sigma)
    grads = []
    for weight, target in zip(weights, targets, strict=True):
        weighted = []
        for w, grad in zip(weight.tolist(), _images(squared_error_grad(eps_pred, target)), strict=True):
            weighted.append([_times(w, g) for g in grad])
        grads.append(_like(weighted, eps_pred))
    return grads[0], grads[1]


def siss_no_is(eps_pred_remain, eps_remain, eps_pred_forget, eps_forget):
    """SISS without importance sampling, (main, correction), `[B]` each.

        main = |eps_pred(x_t(a), t) - eps|^2,  correction = |eps_pred(x_t(f), t') - eps'|^2

    Two forward passes, each with its own noise; all inputs `[B, ...]` (the two streams may differ in B).
    """
    return squared_error(eps_pred_remain, eps_remain), squared_error(eps_pred_forget, eps_forget)


def siss_no_is_grad(eps_pred_remain, eps_remain, eps_pred_forget, eps_forget):
    """Gradients of `siss_no_is`, each by its own prediction: 2 (eps_pred - eps), `[B, ...]` each."""
    return (
        squared_error_grad(eps_pred_remain, eps_remain),
        squared_error_grad(eps_pred_forget, eps_forget),
    )


# ReTrack.


def _posterior(x, neighbors, gamma, sigma):
    """p_k of one image. The gaps are taken to the likeliest neighbor, which keeps the leading terms exact."""
    gaps = [_distance_gap(x, a, neighbors[0], gamma, sigma) for a in neighbors]
    likeliest = neighbors[gaps.index(min(gaps))]
    gaps = [_distance_gap(x, a, likeliest, gamma, sigma) for a in neighbors]
    smallest = min(gaps)  # 0 but for rounding
    weights = [math.exp(smallest - gap) for gap in gaps]
    total = math.fsum(weights)
    return [w / total for w in weights]


def _noises_and_posterior(x_t, neighbors, gamma, sigma):
    """Per image: the K flat noises v_k, and the K weights p_k."""
    _check_neighbors(x_t, neighbors)
    result = []
    batch = zip(_images(x_t), _neighbors(neighbors), _per_image(gamma, sigma, x_t), strict=True)
    for x, around, (g, s) in batch:
        noises = [_noise(x, a, g, s) for a in around]
        result.append((noises, _posterior(x, around, g, s)))
    return result


def _weighted_mean(noises, p):
    """sum_k p_k v_k of one image, flat."""
    mean = []
    for pixel in zip(*noises, strict=True):
        mean.append(math.fsum(p_k * v for p_k, v in zip(p, pixel, strict=True)))
    return mean


def retrack_posterior(x_t, neighbors, gamma, sigma):
    """p_k = softmax_k(-|v_k|^2 / 2), v_k = (x_t - gamma a_k) / sigma.

    x_t `[B, ...]`, neighbors `[B, K, ...]`, gamma, sigma `[B]` -> `[B, K]`, rows sum to 1.
    """
    return np.array([p for _, p in _noises_and_posterior(x_t, neighbors, gamma, sigma)], dtype=np.float64)


def retrack(eps_pred, x_t, neighbors, gamma, sigma):
    """ReTrack's unlearning loss per image: sum_k p_k |eps_pred - v_k|^2.

    eps_pred, x_t `[B, ...]`, neighbors `[B, K, ...]`, gamma, sigma `[B]` -> `[B]`.
    """
    _same_shape(eps_pred, x_t)
    losses = []
    weighted = _noises_and_posterior(x_t, neighbors, gamma, sigma)
    for e, (noises, p) in zip(_images(eps_pred), weighted, strict=True):
        losses.append(math.fsum(p_k * _squared_distance(e, v) for p_k, v in zip(p, noises, strict=True)))
    return np.array(losses, dtype=np.float64)


def retrack_grad(eps_pred, x_t, neighbors, gamma, sigma):
    """Gradient of `retrack`: sum_k p_k 2 (eps_pred - v_k), `[B, ...]`; p_k holds no parameter."""
    _same_shape(eps_pred, x_t)
    grads = []
    weighted = _noises_and_posterior(x_t, neighbors, gamma, sigma)
    for e, (noises, p) in zip(_images(eps_pred), weighted, strict=True):
        grad = []
        for e_i, pixel in zip(e, zip(*noises, strict=True), strict=True):
            grad.append(math.fsum(p_k * 2.0 * (e_i - v) for p_k, v in zip(p, pixel, strict=True)))
        grads.append(grad)
    return _like(grads, eps_pred)


def retrack_target(x_t, neighbors, gamma, sigma):
    """The single weighted target: sum_k p_k v_k. Shapes as in `retrack` -> `[B, ...]`."""
    weighted = _noises_and_posterior(x_t, neighbors, gamma, sigma)
    return _like([_weighted_mean(noises, p) for noises, p in weighted], x_t)


def retrack_constant(x_t, neighbors, gamma, sigma):
    """What `retrack` has beyond the single target's loss, `[B]`, never negative and free of eps_pred.

        sum_k p_k |e - v_k|^2 = |e - v|^2 + constant,  v = sum_k p_k v_k,  constant = sum_k p_k |v_k - v|^2

    The loss with one target per neighbor is the one with their mean, and this.
    """
    constants = []
    for noises, p in _noises_and_posterior(x_t, neighbors, gamma, sigma):
        mean = _weighted_mean(noises, p)
        terms = [p_k * _squared_distance(v, mean) for p_k, v in zip(p, noises, strict=True)]
        constants.append(math.fsum(terms))
    return np.array(constants, dtype=np.float64)


def retrack_objective(unlearn, remain, mixture):
    """lambda mean(L_unlearn) + (1 - lambda) mean(L_R): per-image losses `[B]`, `[B']` -> float."""
    return mixture * batch_mean(unlearn) + (1.0 - mixture) * batch_mean(remain)


# Flat gradients and updates, [P] each.


def _dot(u, v):
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def global_norm(vector):
    """|g| of a flat vector `[P]` -> float."""
    values = _vector(vector)
    return math.sqrt(_dot(values, values))


def combine_retrack(g_unlearn, g_remain, mixture):
    """lambda g_unlearn + (1 - lambda) g_remain, `[P]`."""
    pairs = zip(_vector(g_unlearn), _vector(g_remain), strict=True)
    return np.array([mixture * u + (1.0 - mixture) * r for u, r in pairs])


def combine_erasediff(g_remain, g_correction, eta):
    """g_R + max(eta - <g_R, g_c> / |g_c|^2, 0) g_c, `[P]`; g_R itself where g_c is exactly 0."""
    g_r, g_c = _vector(g_remain), _vector(g_correction)
    inner, square = _dot(g_r, g_c), _dot(g_c, g_c)
    coefficient = max(eta - inner / square, 0.0) if square > 0.0 else 0.0
    return np.array([r + coefficient * c for r, c in zip(g_r, g_c, strict=True)])


def combine_siss(g_main, g_correction, scale):
    """g_main - (s / |g_corr|) g_corr, `[P]`; g_main itself where g_corr is exactly 0."""
    g_m, g_c = _vector(g_main), _vector(g_correction)
    norm = math.sqrt(_dot(g_c, g_c))
    coefficient = scale / norm if norm > 0.0 else 0.0
    return np.array([m - coefficient * c for m, c in zip(g_m, g_c, strict=True)])


def clip_global_norm(gradient, max_norm, epsilon=0.0):
    """g min(1, max_norm / (|g| + epsilon)), `[P]`.

    epsilon 0 is the equation, and optax's; torch.nn.utils.clip_grad_norm_ has epsilon 1e-6.
    """
    values = _vector(gradient)
    norm = math.sqrt(_dot(values, values)) + epsilon
    factor = max_norm / norm if norm > max_norm else 1.0
    return np.array([factor * g for g in values])


def adamw_step(params, gradient, first, second, step, *, lr, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6):
    """One AdamW step with decoupled decay, as torch.optim.AdamW -> (params, first, second), `[P]` each.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        p = (1 - lr wd) p - lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)

    first (m) and second (v) are the moments before this step, zeros at the start; step counts from 1.
    """
    b1, b2 = betas
    new_params, new_first, new_second = [], [], []
    vectors = zip(_vector(params), _vector(gradient), _vector(first), _vector(second), strict=True)
    for p, g, m, v in vectors:
        m = b1 * m + (1.0 - b1) * g
        v = b2 * v + (1.0 - b2) * g * g
        unbiased_m = m / (1.0 - b1**step)
        unbiased_v = v / (1.0 - b2**step)
        decayed = p * (1.0 - lr * weight_decay)
        new_params.append(decayed - lr * unbiased_m / (math.sqrt(unbiased_v) + eps))
        new_first.append(m)
        new_second.append(v)
    return np.array(new_params), np.array(new_first), np.array(new_second)


# The exact posterior, to 60 digits: for small sets, and to check the float64 posterior above.


def _decimal_posterior(x, images, gamma, sigma):
    """p_n = exp(-|x - gamma a_n|^2 / (2 sigma^2)) / (the sum over n), as Decimals."""
    x, gamma, sigma = [decimal.Decimal(v) for v in x], decimal.Decimal(gamma), decimal.Decimal(sigma)
    distances = []
    for image in images:
        square = sum((x_i - gamma * decimal.Decimal(a_i)) ** 2 for x_i, a_i in zip(x, image, strict=True))
        distances.append(square / (2 * sigma * sigma))
    nearest = min(distances)
    weights = [(nearest - d).exp() for d in distances]
    total = sum(weights)
    return [w / total for w in weights]


def retrack_posterior_decimal(x_t, neighbors, gamma, sigma):
    """`retrack_posterior` by 60-digit decimal arithmetic, rounded once: `[B, K]`. Some three times slower."""
    _check_neighbors(x_t, neighbors)
    rows = []
    with decimal.localcontext() as context:
        context.prec = 60
        batch = zip(_images(x_t), _neighbors(neighbors), _per_image(gamma, sigma, x_t), strict=True)
        for x, around, (g, s) in batch:
            rows.append([float(p) for p in _decimal_posterior(x, around, g, s)])
    return np.array(rows, dtype=np.float64)


def remain_mean_noise(x_t, remain, gamma, sigma):
    """E[eps | x_t] when x_0 is uniform over a finite remain set: the exact minimiser of L_R at x_t.

        p(a_n | x_t) ~ exp(-|x_t - gamma a_n|^2 / (2 sigma^2))
        E[eps | x_t] = (x_t - gamma E[a | x_t]) / sigma

    x_t `[B, ...]`, remain `[N, ...]` (one set for the whole batch), gamma, sigma `[B]` -> `[B, ...]`. Decimal
    arithmetic, so for small sets. Equals `retrack_target` with all of the remain set as neighbors.
    """
    if np.shape(remain)[1:] != np.shape(x_t)[1:]:
        raise ValueError(f"remain {np.shape(remain)} does not fit images {np.shape(x_t)}")
    images, result = _images(remain), []
    with decimal.localcontext() as context:
        context.prec = 60
        for x, (g, s) in zip(_images(x_t), _per_image(gamma, sigma, x_t), strict=True):
            posterior = _decimal_posterior(x, images, g, s)
            gamma_t, sigma_t = decimal.Decimal(g), decimal.Decimal(s)
            noise = []
            for i, x_i in enumerate(x):
                mean = sum(p * decimal.Decimal(image[i]) for p, image in zip(posterior, images, strict=True))
                noise.append(float((decimal.Decimal(x_i) - gamma_t * mean) / sigma_t))
            result.append(noise)
    return _like(result, x_t)
