"""Samplers on Gaussian data, whose score is exact: distributions with error bars, closed forms, and orders of convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion import Schedule, expand
from retrack_jax.sampling import (
    DDIM,
    DDPM,
    SAMPLERS,
    DPMSolver,
    initial_noise,
    make_sampler,
    num_calls,
    sample,
    start_at,
    step_noise,
)

MEAN, STD = 0.3, 0.5
OF_BETAS = [name for name in SAMPLERS if not name.startswith("flow_")]


def gaussian_eps_fn(schedule, mean=MEAN, std=STD):
    """Returns the exact eps for data N(mean, std²): sigma (x - gamma mean) / (gamma² std² + sigma²)."""

    def eps_fn(x, t):
        gamma, sigma = expand(schedule.gamma[t], x), expand(schedule.sigma[t], x)
        return sigma * (x - gamma * mean) / (gamma**2 * std**2 + sigma**2)

    return eps_fn


@jax.jit
def _sample_gaussian(schedule, sampler, rngs, mean, std):
    return sample(gaussian_eps_fn(schedule, mean, std), initial_noise(rngs, (16,)), rngs, sampler)


def sample_gaussian(schedule, sampler, count, mean=MEAN, std=STD):
    return np.asarray(_sample_gaussian(schedule, sampler, jax.random.split(jax.random.key(0), count), mean, std), np.float64)


def exact_flow(x, start, end, mean=MEAN, std=STD):
    """Returns where the probability-flow ODE takes x from alpha_bar = start to end: the map between the two Gaussian
    marginals.
    """
    scale = np.sqrt((end * std**2 + 1 - end) / (start * std**2 + 1 - start))
    return np.sqrt(end) * mean + scale * (np.float64(x) - np.sqrt(start) * mean)


def standard_errors(samples, mean, std):
    """Returns by how many standard errors the mean and the std of independent normal samples miss."""
    count = samples.size
    return abs(samples.mean() - mean) / (std / np.sqrt(count)), abs(samples.std() - std) / (std / np.sqrt(2 * count))


def test_ddpm_on_the_full_schedule_draws_the_data_distribution():
    """Over 1000 steps the discrete chain's own bias is below 1% of std; 4 standard errors of 32,768 values are 0.011 and
    0.008.
    """
    schedule = Schedule.create(clip_sample=False)
    samples = sample_gaussian(schedule, DDPM.create(schedule), 2048)
    assert abs(samples.mean() - MEAN) < 4 * STD / np.sqrt(samples.size)
    assert abs(samples.std() - STD) < 0.01 * STD + 4 * STD / np.sqrt(2 * samples.size)


def test_ddpm_fixed_large_is_exact_on_unit_gaussian_data():
    """For N(0, 1) data the reverse variance is beta itself, so any number of steps is exact but for t = 0, which adds no
    noise.
    """
    schedule = Schedule.create(clip_sample=False, variance_type="fixed_large")
    for num_steps in (10, 50):
        samples = sample_gaussian(schedule, DDPM.create(schedule, num_steps), 4096, mean=0.0, std=1.0)
        assert max(standard_errors(samples, 0.0, float(schedule.gamma[0]))) < 4


def test_ddpm_fixed_small_is_the_posterior_of_a_single_image():
    """For data at one point the posterior variance is exact, so x_t of each step has the forward process's mean and std."""
    schedule = Schedule.create(clip_sample=False)
    sampler = DDPM.create(schedule, 20)
    stopped = jax.tree.map(lambda row: row[:12], sampler)
    alpha_bar = schedule.alpha_bar64[sampler.rows["t"][12]]
    samples = sample_gaussian(schedule, stopped, 4096, mean=0.4, std=0.0)
    assert max(standard_errors(samples, 0.4 * np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))) < 4
    np.testing.assert_allclose(sample_gaussian(schedule, sampler, 8, mean=0.4, std=0.0), 0.4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "pndm"])
def test_deterministic_samplers_draw_the_data_distribution(name):
    """At 100 steps the solver's error in std is below 8% (DDIM), 2% (DPM-Solver++) and 1% (PNDM)."""
    schedule = Schedule.create(clip_sample=False)
    samples = sample_gaussian(schedule, make_sampler(name, schedule, 100), 2048)
    bias = {"ddim": 0.08, "dpm_solver": 0.02, "pndm": 0.01}[name]
    assert abs(samples.mean() - MEAN) < 0.001 + 4 * STD / np.sqrt(samples.size)
    assert abs(samples.std() - STD) < bias * STD + 4 * STD / np.sqrt(2 * samples.size)


@pytest.mark.parametrize(
    "name,order,steps,settings",
    [
        ("ddim", 1, (20, 40, 80, 160), {}),
        ("euler", 1, (20, 40, 80, 160), {}),
        # Ending at t = 0 and not at sigma = 0, where the last step is of first order.
        ("dpm_solver", 2, (40, 80, 160), {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_order_of_convergence(name, order, steps, settings):
    schedule = Schedule.create(clip_sample=False, **settings)
    errors = []
    for num_steps in steps:
        sampler = make_sampler(name, schedule, num_steps, spacing="leading")
        x = initial_noise(jax.random.split(jax.random.key(0), 8), (16,))
        end = schedule.alpha_bar64[0] if settings else 1.0
        expected = exact_flow(x, schedule.alpha_bar64[sampler.rows["t"][0]], end)
        errors.append(np.abs(sample_gaussian(schedule, sampler, 8) - expected).max())
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.15 < slope < order + 0.25, (errors, slope)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_pndm_equals_the_algorithm_in_plain_loops(prediction_type):
    """Float64, lists and ifs, from the paper's equations, on a network that is not linear."""
    settings = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
    )
    schedule = Schedule.create(prediction_type=prediction_type, **settings)
    table, num_steps, stride = schedule.alpha_bar64, 10, 100

    def eps_of(x, t, xp=np):
        return xp.tanh(x + t / 1000.0)

    def transfer(x, t, t_next, output):
        now, then = table[t], table[t_next] if t_next >= 0 else table[0]
        eps = output if prediction_type == "epsilon" else np.sqrt(now) * output + np.sqrt(1 - now) * x
        return np.sqrt(then / now) * x - (then - now) * eps / (now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then))

    def network(x, t):
        eps = eps_of(x, t)
        return eps if prediction_type == "epsilon" else (eps - np.sqrt(1 - table[t]) * x) / np.sqrt(table[t])

    rngs = jax.random.split(jax.random.key(4), 3)
    x_init = initial_noise(rngs, (5,))
    x, history = np.float64(x_init), []
    for t in range((num_steps - 1) * stride + 1, 0, -stride):
        history.append(network(x, t))
        if len(history) == 1:
            trial = transfer(x, t, t - stride, history[0])
            x = transfer(x, t, t - stride, (history[0] + network(trial, t - stride)) / 2)
            continue
        weights = {2: (3, -1), 3: (23, -16, 5)}.get(len(history), (55, -59, 37, -9))
        output = sum(weight * past for weight, past in zip(weights, history[::-1], strict=False)) / sum(weights)
        x = transfer(x, t, t - stride, output)

    def eps_fn(x, t):
        return eps_of(x, expand(t.astype(jnp.float32), x), jnp)

    ours = sample(eps_fn, x_init, rngs, make_sampler("pndm", schedule, num_steps))
    np.testing.assert_allclose(ours, x, rtol=2e-5, atol=2e-5)


def test_pndm_beats_ddim_at_equal_steps():
    schedule = Schedule.create(clip_sample=False)
    errors = {}
    for name in ("ddim", "pndm"):
        sampler = make_sampler(name, schedule, 40)
        x = initial_noise(jax.random.split(jax.random.key(0), 8), (16,))
        expected = exact_flow(x, schedule.alpha_bar64[sampler.rows["t"][0]], 1.0)
        errors[name] = np.abs(sample_gaussian(schedule, sampler, 8) - expected).max()
    assert errors["pndm"] < 0.1 * errors["ddim"]


def test_calls_of_the_network_and_timesteps():
    """Counts the calls and records t from inside the compiled loop."""
    schedule = Schedule.create(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    expected = {
        "ddpm": list(range(981, 0, -20)),
        "ddim": list(range(981, 0, -20)),
        "dpm_solver": list(np.linspace(0, 999, 51).round().astype(int)[:0:-1]),
        "euler": list(range(981, 0, -20)),
        "pndm": [981, 961, *range(961, 0, -20)],
    }
    for name in OF_BETAS:
        seen = []

        def eps_fn(x, t, seen=seen):
            jax.debug.callback(lambda t: seen.append(int(t)), t[0], ordered=True)
            return x * 0.1

        sampler = make_sampler(name, schedule, 50)
        jax.block_until_ready(sample(eps_fn, jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2), sampler))
        jax.effects_barrier()
        assert seen == expected[name]
        assert num_calls(sampler) == len(seen)


def test_clipping_follows_the_schedule():
    """A network that claims x_0 = 3 everywhere: clipped samplers end within ±clip_sample_range, the others near 3."""
    for clip_range, settings in (
        (1.0, {}),
        (0.5, {"clip_sample_range": 0.5}),
        (None, {"clip_sample": False}),
    ):
        schedule = Schedule.create(**settings)
        for name in ("ddpm", "ddim"):
            samples = sample_gaussian(schedule, make_sampler(name, schedule, 50), 4, mean=3.0, std=0.0)
            np.testing.assert_allclose(samples, clip_range or 3.0, atol=0.15 if name == "ddim" else 0.01)


def test_one_compilation_serves_schedules_and_samplers_of_one_shape():
    traces = []

    @jax.jit
    def run(sampler, x, rngs):
        traces.append(1)
        return sample(lambda x, t: 0.1 * x, x, rngs, sampler)

    x, rngs = jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)
    for schedule in (
        Schedule.create(),
        Schedule.create(beta_end=0.01),
        Schedule.create(variance_type="fixed_large"),
    ):
        run(DDPM.create(schedule, 10), x, rngs)
    assert len(traces) == 1


def test_noise_depends_on_the_key_and_the_step_alone():
    rngs = jax.random.split(jax.random.key(3), 5)
    np.testing.assert_array_equal(initial_noise(rngs, (4,))[2:4], initial_noise(rngs[2:4], (4,)))
    noises = [initial_noise(rngs, (4,)), *(step_noise(rngs, jnp.int32(j), (4,)) for j in range(3))]
    flat = np.concatenate(noises).ravel()
    assert len(np.unique(flat)) == flat.size  # initial and step noise never coincide


def test_start_at():
    schedule = Schedule.create()
    sampler = start_at(DDPM.create(schedule), 250)
    np.testing.assert_array_equal(sampler.rows["t"], range(250, -1, -1))
    with pytest.raises(UserError, match="does not visit t = 251"):
        start_at(DDIM.create(schedule, 50), 251)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: make_sampler("dpmsolver", Schedule.create(), 10), "did you mean 'dpm_solver'"),
        (lambda: make_sampler("ddpm", Schedule.create(), 0), "sampling steps is 0"),
        (lambda: make_sampler("ddim", Schedule.create(), 50, spacing="even"), "timestep_spacing is 'even'"),
        (lambda: DPMSolver.create(Schedule.create(), 1000), "DPM-Solver.* steps is 1000"),
        (lambda: DPMSolver.create(Schedule.create(steps_offset=1), 999, spacing="leading"), "start at t = 1000, past 999"),
        (lambda: make_sampler("pndm", Schedule.create(), 1), "PNDM steps is 1"),
        (lambda: make_sampler("pndm", Schedule.create(class_name="PNDMScheduler"), 50), "skip_prk_steps"),
    ],
)
def test_bad_requests(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", OF_BETAS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_sampler_is_finite_at_few_steps_of_every_schedule(name, prediction_type):
    for beta_schedule in ("linear", "squaredcos_cap_v2"):
        schedule = Schedule.create(prediction_type=prediction_type, beta_schedule=beta_schedule)
        assert np.isfinite(sample_gaussian(schedule, make_sampler(name, schedule, 5), 2)).all()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("name", OF_BETAS)
def test_every_sampler_starts_at_pure_noise(name, prediction_type):
    """With zero SNR the first x_t holds nothing of the image, and eps is x_t whatever the network says."""
    schedule = Schedule.create(prediction_type=prediction_type, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    sampler = make_sampler(name, schedule, 5, spacing="linspace" if name == "pndm" else "trailing")
    samples = sample_gaussian(schedule, sampler, 2)
    assert np.isfinite(samples).all() and (name == "pndm" or sampler.rows["t"][0] == 999)
