"""EDM's schedule: its table, the scaling of the network, its config, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion import Schedule, edm, make_eps_fn
from retrack_jax.sampling import make_sampler, num_calls, sample

EULER = {"_class_name": "EDMEulerScheduler"}
STD = 0.3  # of Gaussian data


def exact_output(schedule, std=STD):
    """The network whose denoiser is E[x_0 | x_t] for data N(0, std^2), from what it is given alone, by (2) of edm.py."""
    of, sign = schedule.sigma_data, -1.0 if schedule.prediction_type == "v_prediction" else 1.0

    def apply_fn(variables, x, time):
        sigma = jnp.exp(4 * time).reshape((-1,) + (1,) * (x.ndim - 1))
        s = jnp.sqrt(sigma**2 + of**2)
        gap = (std**2 - of**2) * sigma**2 / ((std**2 + sigma**2) * s**2)  # (D - c_skip x_t)/x_t
        return sign * gap * (x * s) / (sigma * of / s)

    return apply_fn


def test_the_table_is_karras_and_gamma_is_one():
    """By hand in float64; both ends are finite, with r = gamma/sigma up to 500."""
    schedule = Schedule.edm()
    by_hand = [(0.002 ** (1 / 7) + i / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(1000)]
    np.testing.assert_allclose(schedule.sigma, by_hand, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma[jnp.array([0, -1])], [0.002, 80], rtol=1e-6)
    assert (schedule.gamma == 1).all() and schedule.t_end == 1000 and schedule.is_edm and not schedule.has_betas
    np.testing.assert_allclose(schedule.alpha_bar, 1 / (1 + np.square(by_hand)), rtol=1e-6)
    steps = np.diff(np.log(Schedule.edm(sigma_schedule="exponential").sigma))
    np.testing.assert_allclose(steps, np.log(80 / 0.002) / 999, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction", "sigma_data": 1.0}])
def test_the_exact_denoiser_of_gaussian_data_gives_the_known_eps(options):
    """E[eps | x_t] = sigma x_t/(std^2 + sigma^2), at both ends too, whether t is a row or sigma itself."""
    schedule = Schedule.edm(**options)
    eps_fn, rows = make_eps_fn(exact_output(schedule), schedule), jnp.array([0, 1, 300, 700, 998, 999])
    sigma = np.float64(schedule.sigma[rows])[:, None]
    x_t = sigma * np.random.default_rng(0).normal(size=(6, 5)) + 0.2
    expected = sigma * x_t / (STD**2 + sigma**2)
    for t in (rows, schedule.sigma[rows]):
        np.testing.assert_allclose(eps_fn({}, jnp.float32(x_t), t), expected, rtol=1e-4, atol=1e-6)


def test_an_image_alone_in_the_data_has_no_loss_and_the_weight_is_that_of_the_output():
    """D = the image gives eps itself; and ||F - F*||^2 is w ||eps - eps*||^2 for any two outputs."""
    schedule, draw = Schedule.edm(), np.random.default_rng(1)
    rows = jnp.arange(0, 1000, 111)
    x_0, noise, other = (jnp.float32(draw.normal(size=(10, 6))) for _ in range(3))
    sigma = schedule.sigma[rows][:, None]
    s, x_t = jnp.sqrt(sigma**2 + 0.25), x_0 + sigma * noise
    best = (x_0 - 0.25 / s**2 * x_t) / (0.5 * sigma / s)
    eps, off = (np.float64(make_eps_fn(lambda *_, output=output: output, schedule)({}, x_t, rows)) for output in (best, other))
    np.testing.assert_allclose(eps, noise, atol=2e-3)  # x_0 in x_t + sigma eps at sigma = 0.002 is rounded to 6e-8/0.002
    weight = np.float64(edm.loss_weight(schedule.sigma[rows], 0.5))
    np.testing.assert_allclose(np.square(np.float64(best) - other).sum(1), weight * np.square(eps - off).sum(1), rtol=1e-4)


@pytest.mark.parametrize("name", ["euler", "dpm_solver"])
def test_samples_of_the_exact_denoiser_are_the_data(name):
    """The ODE takes x_T to std/sqrt(std^2 + sigma_max^2) x_T; the error falls with the order of the method."""
    schedule, rngs = Schedule.edm(), jax.random.split(jax.random.key(0), 4)
    start = jax.random.normal(jax.random.key(1), (4, 16))
    exact = np.float64(start) * np.sqrt(80**2 + 1) * STD / np.sqrt(STD**2 + 80**2)
    eps_fn = make_eps_fn(exact_output(schedule), schedule)

    def error(num_steps):
        sampler = make_sampler(name, schedule, num_steps)
        assert num_calls(sampler) == num_steps
        return np.abs(np.float64(sample(lambda x, t: eps_fn({}, x, t), start, rngs, sampler)) - exact).max()

    coarse, fine = error(25), error(100)
    assert fine < 0.04 and fine < coarse / (3 if name == "euler" else 8)


def test_draws_are_log_normal_within_their_window():
    sigma, rngs = Schedule.edm().sigma, jax.random.split(jax.random.key(2), 4000)
    drawn = np.log(sigma[jax.vmap(lambda rng: edm.draw_row(rng, sigma, (-1.2, 1.2)))(rngs)])
    assert abs(np.mean(drawn) + 1.2) < 0.06 and abs(np.std(drawn) - 1.2) < 0.05
    rows = jax.vmap(lambda rng: edm.draw_row(rng, sigma[900:903], (-1.2, 1.2)))(rngs[:50])
    assert rows.dtype == jnp.int32 and set(np.asarray(rows).tolist()) <= {0, 1, 2}
    assert edm.draw_row(rngs[0], sigma[:1], (3.0, 0.1)) == 0


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_a_config_is_read_and_written_back(name):
    config = {"sigma_max": 20.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential", "num_train_timesteps": 300}
    read = Schedule.from_config({"_class_name": name, "_diffusers_version": "0.27.0", **config})
    assert read.is_edm and len(read.sigma) == 300
    written = read.to_config()
    assert written["_class_name"] == name and config.items() <= written.items() and "beta_start" not in written
    again = Schedule.from_config(written)
    assert jax.tree.structure(again) == jax.tree.structure(read)
    np.testing.assert_array_equal(again.sigma, read.sigma)


def test_options_of_diffusers_own_solver_are_written_back():
    config = {"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    read = Schedule.from_config(config)
    assert read.solver_order == 2 and read.to_config() == config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EULER | {"sigma_min": 0.0}, r"sigma_min is 0.0; it must be a number in \[1e-06"),
        (EULER | {"sigma_max": 0.001}, r"sigma_max is 0.001; it must be a number in \(0.002"),
        (EULER | {"sigma_data": "0.5"}, "sigma_data is '0.5'"),
        (EULER | {"rho": 1e-6}, "rho is 1e-06; it must be a number in .0.1, 1000"),
        (EULER | {"sigma_schedule": "beta"}, "sigma_schedule is 'beta'; choose one of karras, exponential"),
        (EULER | {"prediction_type": "sample"}, "prediction_type of EDMEulerScheduler is 'sample'"),
        (EULER | {"prediction_type": "flow_prediction"}, "prediction_type is flow_prediction and the scheduler is EDMEuler"),
        (EULER | {"sigma_dat": 1.0}, "unknown key 'sigma_dat'; did you mean 'sigma_data'"),
        (EULER | {"shift": 3.0}, "shift is 3.0, which is for flows"),
        ({"_class_name": "EDMEuler"}, "_class_name is 'EDMEuler'.*did you mean 'EDMEulerScheduler'"),
        ({"sigma_data": 0.5}, "sets sigma_data, which is for EDM, and DDPMScheduler does not read it; give that class"),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(UserError, match=message) as error:
        Schedule.from_config(config)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="sigma_data is 1.0, which is for EDM; DDPMScheduler does not read it"):
        Schedule.create(sigma_data=1.0)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm"])
def test_samplers_of_betas_refuse_edm(name):
    with pytest.raises(UserError, match="this sampler needs betas, and the schedule is EDM's; .* euler or dpm_solver"):
        make_sampler(name, Schedule.edm(), 10)


@pytest.mark.parametrize("name", ["euler", "dpm_solver"])
def test_edm_has_its_own_spacing(name):
    with pytest.raises(UserError, match="the sigmas of EDM are spaced by its sigma_schedule"):
        make_sampler(name, Schedule.edm(), 10, spacing="leading")
    with pytest.raises(UserError, match="the number of sampling steps"):
        make_sampler(name, Schedule.edm(), 1001)
    with pytest.raises(UserError, match="are for flows"):
        make_sampler("flow_euler", Schedule.edm(), 10)
