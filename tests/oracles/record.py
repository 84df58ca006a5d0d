"""Writes `tests/fixtures/losses/parity.npz`: small inputs and what the float64 oracle makes of them.

    python -m tests.oracles.record

Keys are `CASE/in/NAME` and `CASE/out/NAME`. Inputs are float32, so that float32 code and the oracle read the
same numbers, but for scalars (mixture, eta, lr, ...), which are float64 as outputs are. Inputs are named as
the oracle's arguments. The cases:

    vanilla neggrad erasediff     in: eps_pred, eps or uniform; out: loss [B], grad
    siss_0 siss_0.1 siss_0.5 siss_1
                                  in: eps_pred, x_t, remain, forget, gamma, sigma, mixture;
                                  out: w_a, w_f, main, correction, main_grad, correction_grad
    siss_no_is                    in: two predictions and their noises; out: as siss, without weights
    retrack retrack_mnist         in: eps_pred, x_t, neighbors, gamma, sigma;
                                  out: p, target, constant, loss, grad
    exact_remain                  in: x_t, remain, gamma, sigma; out: noise, the remain set's posterior mean
    combine_erasediff_active combine_erasediff_idle combine_siss combine_retrack
                                  in: two flat gradients and eta, scale or mixture; out: combined
    clip_above clip_below         in: gradient, max_norm; out: clipped
    adamw                         in: params, gradients [3, P], lr, b1, b2, eps, weight_decay;
                                  out: params, first and second after each of three steps, [3, P]

The batches of siss and retrack span t = 0 to 999 of the linear schedule, and hold near pairs, whose weights
are not trivial at their t, and far ones, whose weights are at their limits at small t.
"""

import pathlib

import numpy as np

from tests.oracles import losses

PATH = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "losses" / "parity.npz"
TIMES = (0, 1, 100, 500, 750, 999)
SHAPE = (4, 4, 2)
MIXTURES = (0.0, 0.1, 0.5, 1.0)
FLAT = 50


def schedule(times):
    """gamma and sigma, float32, of the linear schedule 1e-4 to 0.02 with T = 1000."""
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[list(times)]
    return np.sqrt(alpha_bar).astype(np.float32), np.sqrt(1.0 - alpha_bar).astype(np.float32)


def _column(values, images):
    """`[B]` -> `[B, 1, ...]`, to multiply images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def _images(rng, count, shape):
    return rng.uniform(-1.0, 1.0, (count, *shape)).astype(np.float32)


def _normal(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


def _near(rng, images, gamma, sigma):
    """Images whose noise at x_t is about 1 from that of `images`, less at large t, so that weights vary."""
    spread = np.minimum(_column(sigma / gamma, images), 1.0) / np.sqrt(np.prod(images.shape[1:]))
    return (images + spread * rng.standard_normal(images.shape)).astype(np.float32)


def _noisy(rng, images, gamma, sigma):
    noise = rng.standard_normal(images.shape)
    return (_column(gamma, images) * images + _column(sigma, images) * noise).astype(np.float32)


def _siss_inputs(rng, mixture):
    """One near and one far pair at each t; each image is noised from the stream that the mixture allows."""
    gamma, sigma = schedule(TIMES * 2)
    forget = _images(rng, len(gamma), SHAPE)
    near = _near(rng, forget, gamma, sigma)
    far = _images(rng, len(gamma), SHAPE)
    is_near = _column(np.arange(len(gamma)) < len(TIMES), forget)
    remain = np.where(is_near, near, far)
    from_forget = rng.random(len(gamma)) < mixture
    x_t = _noisy(rng, np.where(_column(from_forget, forget), forget, remain), gamma, sigma)
    return {
        "eps_pred": _normal(rng, x_t.shape),
        "x_t": x_t,
        "remain": remain,
        "forget": forget,
        "gamma": gamma,
        "sigma": sigma,
        "mixture": np.float64(mixture),
    }


def _retrack_inputs(rng, times, shape, near, far):
    """Neighbors of each forget image: some near for its t, the others far."""
    gamma, sigma = schedule(times)
    forget = _images(rng, len(times), shape)
    around = [_near(rng, forget, gamma, sigma) for _ in range(near)]
    around += [_images(rng, len(times), shape) for _ in range(far)]
    return {
        "eps_pred": _normal(rng, forget.shape),
        "x_t": _noisy(rng, forget, gamma, sigma),
        "neighbors": np.stack(around, axis=1),
        "gamma": gamma,
        "sigma": sigma,
    }


def _gradients(rng, inner):
    """Two flat gradients with <first, second> / |second|^2 equal to inner."""
    first, second = rng.standard_normal(FLAT), 0.3 * rng.standard_normal(FLAT)
    first = first + (inner - (first @ second) / (second @ second)) * second
    return first.astype(np.float32), second.astype(np.float32)


def make_inputs(seed=0):
    """CASE -> NAME -> array, from a fixed seed."""
    rng = np.random.default_rng(seed)
    images = (len(TIMES), *SHAPE)
    cases = {
        "vanilla": {"eps_pred": _normal(rng, images), "eps": _normal(rng, images)},
        "neggrad": {"eps_pred": _normal(rng, images), "eps": _normal(rng, images)},
        "erasediff": {
            "eps_pred": _normal(rng, images),
            "uniform": rng.uniform(0.0, 1.0, images).astype(np.float32),
        },
        "siss_no_is": {
            "eps_pred_remain": _normal(rng, images),
            "eps_remain": _normal(rng, images),
            "eps_pred_forget": _normal(rng, images),
            "eps_forget": _normal(rng, images),
        },
    }
    for mixture in MIXTURES:
        cases[f"siss_{mixture:g}"] = _siss_inputs(rng, mixture)
    cases["retrack"] = _retrack_inputs(rng, TIMES, SHAPE, near=3, far=1)
    cases["retrack_mnist"] = _retrack_inputs(rng, (0, 999), (28, 28, 1), near=2, far=1)

    gamma, sigma = schedule((300, 750, 999))
    remain = _images(rng, 12, SHAPE)
    cases["exact_remain"] = {
        "x_t": _noisy(rng, remain[:3], gamma, sigma),
        "remain": remain,
        "gamma": gamma,
        "sigma": sigma,
    }

    for name, inner in (("active", -0.8), ("idle", 0.8)):
        g_remain, g_correction = _gradients(rng, inner)
        cases[f"combine_erasediff_{name}"] = {
            "g_remain": g_remain,
            "g_correction": g_correction,
            "eta": np.float64(1e-3),
        }
    g_main, g_correction = _gradients(rng, 0.2)
    cases["combine_siss"] = {"g_main": g_main, "g_correction": g_correction, "scale": np.float64(5.0)}
    g_unlearn, g_remain = _gradients(rng, 0.2)
    cases["combine_retrack"] = {"g_unlearn": g_unlearn, "g_remain": g_remain, "mixture": np.float64(0.02)}

    cases["clip_above"] = {"gradient": _normal(rng, FLAT), "max_norm": np.float64(1.0)}
    cases["clip_below"] = {"gradient": 0.01 * _normal(rng, FLAT), "max_norm": np.float64(1.0)}
    cases["adamw"] = {
        "params": _normal(rng, FLAT),
        "gradients": _normal(rng, (3, FLAT)),
        "lr": np.float64(1e-2),
        "b1": np.float64(0.95),
        "b2": np.float64(0.999),
        "eps": np.float64(1e-8),
        "weight_decay": np.float64(1e-2),
    }
    return cases


def _plain_outputs(name, inputs):
    function, gradient = getattr(losses, name), getattr(losses, f"{name}_grad")
    return {"loss": function(**inputs), "grad": gradient(**inputs)}


def _siss_outputs(inputs):
    arguments = dict(inputs, mixture=float(inputs["mixture"]))
    main, correction = losses.siss(**arguments)
    main_grad, correction_grad = losses.siss_grad(**arguments)
    w_a, w_f = losses.siss_weights(**{k: v for k, v in arguments.items() if k != "eps_pred"})
    return {
        "w_a": w_a,
        "w_f": w_f,
        "main": main,
        "correction": correction,
        "main_grad": main_grad,
        "correction_grad": correction_grad,
    }


def _siss_no_is_outputs(inputs):
    main, correction = losses.siss_no_is(**inputs)
    main_grad, correction_grad = losses.siss_no_is_grad(**inputs)
    return {
        "main": main,
        "correction": correction,
        "main_grad": main_grad,
        "correction_grad": correction_grad,
    }


def _retrack_outputs(inputs):
    without_prediction = {k: v for k, v in inputs.items() if k != "eps_pred"}
    return {
        "p": losses.retrack_posterior(**without_prediction),
        "target": losses.retrack_target(**without_prediction),
        "constant": losses.retrack_constant(**without_prediction),
        "loss": losses.retrack(**inputs),
        "grad": losses.retrack_grad(**inputs),
    }


def _adamw_outputs(inputs):
    params = inputs["params"]
    first, second = np.zeros(len(params)), np.zeros(len(params))
    history = []
    for step, gradient in enumerate(inputs["gradients"], start=1):
        params, first, second = losses.adamw_step(
            params,
            gradient,
            first,
            second,
            step,
            lr=float(inputs["lr"]),
            betas=(float(inputs["b1"]), float(inputs["b2"])),
            eps=float(inputs["eps"]),
            weight_decay=float(inputs["weight_decay"]),
        )
        history.append((params, first, second))
    stacked = [np.stack(arrays) for arrays in zip(*history, strict=True)]
    return dict(zip(("params", "first", "second"), stacked, strict=True))


def outputs(name, inputs):
    """NAME -> float64 array: what the oracle makes of one case's inputs."""
    if name in ("vanilla", "neggrad", "erasediff"):
        return _plain_outputs(name, inputs)
    if name == "siss_no_is":
        return _siss_no_is_outputs(inputs)
    if name.startswith("siss_"):
        return _siss_outputs(inputs)
    if name.startswith("retrack"):
        return _retrack_outputs(inputs)
    if name == "exact_remain":
        return {"noise": losses.remain_mean_noise(**inputs)}
    if name.startswith("combine_"):
        function = getattr(losses, "_".join(name.split("_")[:2]))
        return {"combined": function(**inputs)}
    if name.startswith("clip_"):
        return {"clipped": losses.clip_global_norm(**inputs)}
    if name == "adamw":
        return _adamw_outputs(inputs)
    raise KeyError(name)


def load(path=PATH):
    """The recorded file -> CASE -> "in" or "out" -> NAME -> array."""
    cases = {}
    with np.load(path) as recorded:
        for key in recorded.files:
            case, side, name = key.split("/")
            cases.setdefault(case, {"in": {}, "out": {}})[side][name] = recorded[key]
    return cases


def main():
    arrays = {}
    for case, inputs in make_inputs().items():
        for name, value in inputs.items():
            arrays[f"{case}/in/{name}"] = value
        for name, value in outputs(case, inputs).items():
            arrays[f"{case}/out/{name}"] = value
    PATH.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(PATH, **arrays)
    print(f"{PATH}: {len(arrays)} arrays, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
