"""How near the official likelihood ODE's limit our solver (diffrax) and the official one (scipy's RK45) end, in bits/dim.

    python -m tests.benchmarks.likelihood_solvers [--images 20] [--results=docs/results]

Data of 64 values with a standard deviation of 0.5, 0.1 and 0.02. The network is the exact denoiser of such data plus a small
smooth bend. Both solvers have a tolerance of 1e-5 and the same probe. The limit is integrated in float64 from jump to jump of the
table of noise, at a tolerance of 1e-9. Prints the mean (largest) error over the images; 20 seconds.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

from retrack_jax.diffusion import Schedule
from retrack_jax.metrics.likelihood import BETA_MAX, BETA_MIN, OFFSET, START, nll_bits_per_dim
from tests.benchmarks.measure import Table, parser_of

SIDE, BEND, TOLERANCE = 8, 0.05, 1e-5
DIM = SIDE * SIDE
SCHEDULE = Schedule()


def eps_fn(params, x_t, t):
    """The noise that leads to data N(0, std^2), and a bend."""
    std, mixing = params
    gamma, sigma = SCHEDULE.gamma[t], SCHEDULE.sigma[t]
    flat = x_t.reshape(len(x_t), -1) * (sigma / (gamma**2 * std**2 + sigma**2))[:, None]
    return (flat + BEND * jnp.tanh(flat @ mixing)).reshape(x_t.shape)


def field(std: float, mixing: np.ndarray, probe: np.ndarray):
    """Returns `f(s, (x, divergence))` of the same ODE in float64."""
    alpha_bar = SCHEDULE.alpha_bar64

    def value(s, state):
        row = min(int(np.floor((len(alpha_bar) - 1) * s)), len(alpha_bar) - 1)
        gamma, sigma = np.sqrt(alpha_bar[row]), np.sqrt(1 - alpha_bar[row])
        scale = sigma / (gamma**2 * std**2 + sigma**2)
        bent = np.tanh(scale * state[:DIM] @ mixing)
        eps = scale * state[:DIM] + BEND * bent
        along = scale * probe + BEND * (1 - bent**2) * (scale * probe @ mixing)
        beta = BETA_MIN + (BETA_MAX - BETA_MIN) * s
        drift, tangent = (-0.5 * beta * (x - e / sigma) for x, e in ((state[:DIM], eps), (probe, along)))
        return np.append(drift, tangent @ probe)

    return value


def bits(state: np.ndarray) -> float:
    log_p = -0.5 * (np.sum(state[:DIM] ** 2) + DIM * np.log(2 * np.pi)) + state[DIM]
    return -log_p / (DIM * np.log(2)) + OFFSET


def limit(value, start: np.ndarray) -> float:
    """Integrates each stretch between two jumps by itself."""
    edges, state = [START, *(row / 999 for row in range(1, 1000))], start
    for left, right in zip(edges, edges[1:], strict=False):
        inside = lambda s, y, left=left, right=right: value(np.clip(s, left + 1e-15, right - 1e-12), y)  # noqa: E731
        state = solve_ivp(inside, (left, right), state, rtol=1e-9, atol=1e-10).y[:, -1]
    return bits(state)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=20)
    options = parser.parse_args()
    table, count = Table("likelihood_solvers", "data's std", "scipy", "ours", "the two apart, at most"), options.images
    for std in (0.5, 0.1, 0.02):
        order = np.random.default_rng(0)
        images, mixing = order.normal(size=(count, DIM)) * std, order.normal(size=(DIM, DIM)) / np.sqrt(DIM)
        rng = jax.random.key(0)
        params = jnp.float32(std), jnp.asarray(mixing, jnp.float32)
        pixels, how = images.reshape(-1, SIDE, SIDE, 1), {"rtol": TOLERANCE, "atol": TOLERANCE}
        ours, _ = nll_bits_per_dim(eps_fn, params, SCHEDULE, pixels, rng, **how)
        theirs, exact = [], []
        for number, image in enumerate(images.astype(np.float32).astype(np.float64)):
            probe_rng = jax.random.fold_in(jax.random.fold_in(rng, number), 0)
            probe = np.asarray(jax.random.rademacher(probe_rng, (SIDE, SIDE, 1), jnp.float32), np.float64).ravel()
            value, start = field(std, mixing, probe), np.append(image, 0.0)
            theirs.append(bits(solve_ivp(value, (START, 1.0), start, rtol=TOLERANCE, atol=TOLERANCE).y[:, -1]))
            exact.append(limit(value, start))
        errors = [np.abs(np.array(found) - exact) for found in (theirs, ours)]
        cells = [f"{error.mean():.5f} ({error.max():.5f})" for error in errors]
        table.add(f"{std}", *cells, f"{np.abs(np.array(theirs) - ours).max():.5f}")
    table.write(options.results, "python -m tests.benchmarks.likelihood_solvers")


if __name__ == "__main__":
    main()
