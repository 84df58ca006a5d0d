"""The schedule of a rectified flow: its table, its config, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion.conversions import make_eps_fn, to_eps
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.sampling import make_sampler

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_table_is_that_of_the_training_scripts(shift):
    """sigma rises from the shifted 1/T to pure noise, and gamma + sigma is 1."""
    schedule = Schedule.rectified_flow(shift=shift)
    by_hand = [shift * (i / 1000) / (1 + (shift - 1) * (i / 1000)) for i in range(1, 1001)]
    np.testing.assert_allclose(schedule.sigma, by_hand, rtol=1e-6)
    np.testing.assert_allclose(schedule.gamma + schedule.sigma, 1.0, atol=1e-7)
    assert schedule.sigma[-1] == 1 and schedule.gamma[-1] == 0 and schedule.t_end == 1000


def test_the_network_is_called_with_the_time_of_a_row_or_a_time_as_it_is():
    schedule = Schedule.rectified_flow(shift=3.0)
    seen = []

    def apply_fn(variables, x_t, t):
        seen.append(np.asarray(t))
        return 2 * x_t

    eps_fn, x = make_eps_fn(apply_fn, schedule), jnp.ones((2, 1, 1, 1))
    assert np.all(eps_fn({}, x, jnp.array([0, 999])) == 2)  # the velocity as it is
    eps_fn({}, x, jnp.array([12.5, 999.5]))
    np.testing.assert_allclose(seen[0], [3000 / 1002, 1000], rtol=1e-6)
    np.testing.assert_array_equal(seen[1], np.float32([12.5, 999.5]))


def test_eps_of_a_velocity():
    x_0, eps, gamma = jnp.array([[0.5]]), jnp.array([[-2.0]]), jnp.array([0.3])
    x_t = gamma[:, None] * x_0 + (1 - gamma[:, None]) * eps
    np.testing.assert_allclose(to_eps(eps - x_0, x_t, gamma, 1 - gamma, "flow_prediction"), eps, rtol=1e-6)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_config_is_read_and_written_back(name):
    read = Schedule.from_config({"_class_name": name, "_diffusers_version": "0.30.0", "shift": 3.0, "num_train_timesteps": 500})
    assert read.is_flow and read.shift == 3.0
    assert read.to_config() == {"_class_name": name, "shift": 3.0, "num_train_timesteps": 500}
    np.testing.assert_array_equal(Schedule.from_config(read.to_config()).sigma, read.sigma)


def test_stable_diffusion_3s_file_is_read():
    dynamic = {"use_dynamic_shifting": False, "base_image_seq_len": 256, "base_shift": 0.5, "max_shift": 1.15}
    config = EULER | dynamic | {"shift": 3.0, "shift_terminal": None, "time_shift_type": "exponential"}
    assert Schedule.from_config(config).shift == 3.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EULER | {"use_dynamic_shifting": True}, "sets use_dynamic_shifting to True; flows are supported without it"),
        (EULER | {"invert_sigmas": True}, "sets invert_sigmas to True"),
        (EULER | {"shfit": 3.0}, "unknown key 'shfit'.*shift"),
        (EULER | {"shift": 0}, r"shift is 0; it must be a number in \(0"),
        (EULER | {"prediction_type": "epsilon"}, "prediction_type is epsilon and the scheduler is FlowMatchEuler"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is flow_prediction and the scheduler is DDPMScheduler"),
        ({"shift": 3.0}, "shift is 3.0, which is for flows; DDPMScheduler has betas"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "for flows, which are read of FlowMatchEuler"),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(UserError, match=message) as error:
        Schedule.from_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver", "pndm"])
def test_samplers_of_betas_refuse_a_flow(name):
    with pytest.raises(UserError, match="this sampler needs betas.*flow_euler or flow_heun"):
        make_sampler(name, Schedule.rectified_flow(), 10)


@pytest.mark.parametrize("name", ["flow_euler", "flow_heun"])
def test_samplers_of_flows_refuse_betas(name):
    with pytest.raises(UserError, match="are for flows, and this network's schedule has betas"):
        make_sampler(name, Schedule(), 10)
    with pytest.raises(UserError, match="spacing is 'leading'"):
        make_sampler(name, Schedule.rectified_flow(), 10, spacing="leading")
    with pytest.raises(UserError, match="the number of sampling steps"):
        make_sampler(name, Schedule.rectified_flow(), 1001)
