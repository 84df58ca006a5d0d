"""Schedules against loops and closed forms, the timesteps that they visit, and diffusers' config files."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.diffusion import Schedule
from retrack_jax.sampling import make_sampler

# Scheduler files in the form of google/ddpm-cifar10-32 (an early version of diffusers) and of Stable Diffusion v1.4.
CIFAR = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "timestep_values": None, "trained_betas": None,
    "variance_type": "fixed_large",
}  # fmt: skip
SD = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip


def loop_alpha_bar(beta_of, total=1000):
    product, table = 1.0, []
    for t in range(total):
        product *= 1 - beta_of(t)
        table.append(product)
    return np.array(table)


def test_tables_are_the_product_of_the_betas():
    linear = loop_alpha_bar(lambda t: 1e-4 + (0.02 - 1e-4) * t / 999)
    scaled = loop_alpha_bar(lambda t: (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2)
    for expected, schedule in ((linear, Schedule.create()), (scaled, Schedule.from_config(SD))):
        np.testing.assert_allclose(schedule.alpha_bar64, expected, rtol=1e-12)
        np.testing.assert_allclose(schedule.alpha_bar, expected, rtol=1e-7)
        np.testing.assert_allclose(schedule.gamma, np.sqrt(expected), rtol=1e-7)
        np.testing.assert_allclose(schedule.sigma, np.sqrt(1 - expected), rtol=1e-7)
    assert schedule.gamma.dtype == schedule.sigma.dtype == jnp.float32


def test_cosine_schedule_telescopes_until_its_cap():
    def f(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = Schedule.create(beta_schedule="squaredcos_cap_v2")
    expected = [f((t + 1) / 1000) / f(0) for t in range(999)]
    np.testing.assert_allclose(schedule.alpha_bar64[:999], expected, rtol=1e-9)
    assert schedule.alpha_bar64[999] == pytest.approx(expected[998] * 0.001, rel=1e-9)  # beta is capped at 0.999


def test_known_values():
    assert Schedule.create().alpha_bar64[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert Schedule.from_config(SD).alpha_bar64[-1] == pytest.approx(0.004660, rel=1e-3)


def test_trained_betas_replace_the_formula():
    betas = [0.1, 0.2, 0.3]
    schedule = Schedule.create(num_train_timesteps=3, trained_betas=betas)
    np.testing.assert_allclose(schedule.alpha_bar64, [0.9, 0.72, 0.504])
    assert Schedule.from_config(schedule.to_config()).trained_betas == tuple(betas)
    with pytest.raises(UserError, match="trained_betas must be a list of num_train_timesteps = 4"):
        Schedule.create(num_train_timesteps=4, trained_betas=betas)


def test_alpha_bar_at_takes_the_final_value_past_the_last_step():
    schedule = Schedule.create()
    np.testing.assert_array_equal(schedule.alpha_bar_at([5, 0, -1, -20], 1.0)[2:], 1.0)
    assert schedule.alpha_bar_at([5])[0] == schedule.alpha_bar64[5]


@pytest.mark.parametrize(
    "num_steps,settings,expected",
    [
        (50, {}, range(980, -1, -20)),
        (1000, {}, range(999, -1, -1)),
        (50, {"steps_offset": 1}, range(981, 0, -20)),
        (50, {"timestep_spacing": "trailing"}, range(999, 18, -20)),
        (5, {"timestep_spacing": "linspace"}, [999, 749, 500, 250, 0]),
        (3, {}, [666, 333, 0]),
        (3, {"timestep_spacing": "trailing"}, [999, 666, 332]),
        (1, {}, [0]),
    ],
)
def test_timesteps(num_steps, settings, expected):
    timesteps = Schedule.create(**settings).timesteps(num_steps)
    np.testing.assert_array_equal(timesteps, list(expected))
    assert timesteps.dtype == np.int32


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_number_of_steps_visits_as_many_timesteps_of_the_table(spacing):
    schedule = Schedule.create(timestep_spacing=spacing)
    for num_steps in range(1, 1001):
        timesteps = schedule.timesteps(num_steps)
        assert len(timesteps) == num_steps and timesteps[-1] >= 0 and (np.diff(timesteps) < 0).all(), num_steps
        if spacing == "trailing":
            even = 999 - np.arange(num_steps) * 1000 / num_steps
            assert np.abs(timesteps - even).max() <= 0.5 + 1e-9, num_steps


def test_timesteps_past_the_table_are_refused():
    with pytest.raises(UserError, match="sampling steps is 1001"):
        Schedule.create().timesteps(1001)
    with pytest.raises(UserError, match="start at t = 1000, past 999"):
        Schedule.create(steps_offset=1).timesteps(1000)
    with pytest.raises(UserError, match="timestep_spacing is 'trailling'.*did you mean 'trailing'"):
        Schedule.create().timesteps(10, "trailling")


def test_files_in_published_form():
    cifar = Schedule.from_config(CIFAR)
    assert (cifar.variance_type, cifar.clip_sample, cifar.timestep_spacing) == (
        "fixed_large",
        True,
        "leading",
    )
    sd = Schedule.from_config(SD)
    assert (sd.clip_sample, sd.variance_type, sd.skip_prk_steps, sd.set_alpha_to_one) == (
        False,
        "fixed_small",
        True,
        False,
    )
    ancestral = make_sampler("ddpm", sd, 50)  # what the official code samples Stable Diffusion with
    assert ancestral.clip is None
    np.testing.assert_array_equal(ancestral.rows["t"], range(981, 0, -20))


def test_absent_and_null_keys_take_the_defaults_of_the_class():
    assert Schedule.from_config({}).to_config() == Schedule.create().to_config()
    dpm = Schedule.from_config(
        {"_class_name": "DPMSolverMultistepScheduler", "variance_type": None, "lambda_min_clipped": "-inf"}
    )
    assert (dpm.timestep_spacing, dpm.clip_sample) == ("linspace", False)
    assert Schedule.from_config({"_class_name": "PNDMScheduler"}).set_alpha_to_one is False
    assert Schedule.from_config({"predict_epsilon": False}).prediction_type == "sample"
    assert Schedule.from_config({"predict_epsilon": True, "_use_default_values": ["thresholding"]}).prediction_type == "epsilon"


@pytest.mark.parametrize(
    "config,message",
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr needs prediction_type v_prediction or sample"),
        ({"rescale_betas_zero_snr": "yes", "prediction_type": "sample"}, "rescale_betas_zero_snr is 'yes'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas to True: it is for flows"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"solver_order": 4}, "solver_order is 4"),
        ({"beta_shedule": "linear"}, "unknown key 'beta_shedule'; did you mean 'beta_schedule'"),
        ({"_class_name": "FlowMatchLCMScheduler"}, "'FlowMatchLCMScheduler'.*is for flows"),
        ({"_class_name": "EulerDiscretScheduler"}, "did you mean 'EulerDiscreteScheduler'"),
        ({"_class_name": ["DDPMScheduler"]}, "_class_name is "),
        ({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"}, "beta_schedule is 'exp'"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_end": "0.02"}, "beta_end is '0.02'"),
        ({"beta_start": 0.1, "beta_end": 0.05}, "beta_end is 0.05"),
        ({"clip_sample": "yes"}, "clip_sample is 'yes'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"steps_offset": -1}, "steps_offset is -1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message) as error:
        Schedule.from_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        CIFAR,
        SD,
        {
            "_class_name": "DDIMScheduler",
            "set_alpha_to_one": False,
            "timestep_spacing": "trailing",
            "clip_sample_range": 2.0,
        },
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "solver_type": "heun",
            "final_sigmas_type": "sigma_min",
            "solver_order": 1,
        },
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "num_train_timesteps": 77},
        # Keys of another class, which diffusers keeps when it makes one scheduler of another: ours samples by them.
        {"_class_name": "DDIMScheduler", "variance_type": "fixed_large", "skip_prk_steps": True},
        {"_class_name": "PNDMScheduler", "clip_sample": True, "clip_sample_range": 2.0, "variance_type": "fixed_large"},
        {"_class_name": "DPMSolverMultistepScheduler", "set_alpha_to_one": False, "clip_sample_range": 3.0},
        {"_class_name": "DDPMScheduler", "set_alpha_to_one": False, "solver_order": 1, "euler_at_final": True},
    ],
)
def test_config_round_trip_through_json(config):
    schedule = Schedule.from_config(config)
    written = json.loads(json.dumps(schedule.to_config()))
    assert written["_class_name"] == config.get("_class_name", "DDPMScheduler")
    again = Schedule.from_config(written)
    assert jax.tree.structure(again) == jax.tree.structure(schedule)  # every static setting
    np.testing.assert_array_equal(again.alpha_bar, schedule.alpha_bar)


def test_is_a_pytree_for_jit_and_pmap():
    traces = []

    @jax.jit
    def last_gamma(schedule):
        traces.append(schedule.prediction_type)
        return schedule.gamma[-1]

    assert last_gamma(Schedule.create()) == last_gamma(Schedule.create(beta_end=0.02)) == Schedule.create().gamma[-1]
    assert traces == ["epsilon"]
    last_gamma(Schedule.create(prediction_type="sample"))
    assert traces == ["epsilon", "sample"]
    index = jnp.arange(jax.local_device_count())
    gammas = jax.pmap(lambda schedule, t: schedule.gamma[t], in_axes=(None, 0))(Schedule.create(), index)
    np.testing.assert_array_equal(gammas, Schedule.create().gamma[: len(index)])


def test_a_model_without_a_scheduler_is_told_what_to_do():
    with pytest.raises(UserError, match="Schedule.create"):
        Schedule.from_config(None)


@pytest.mark.parametrize(
    "config, ignored",
    [
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 7.0, "timestep_type": "discrete"}, "EulerDiscreteScheduler"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "lambda_min_clipped": -math.inf}, "DPMSolverSinglestepScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order=3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver"),
        ({"thresholding": True}, "thresholding=True"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped=-5.1"),
    ],
)
def test_options_of_other_samplers_are_named_once_and_written_back(config, ignored, caplog):
    """Training needs betas and prediction type alone; an export must make the same scheduler in diffusers."""
    betas = {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    with caplog.at_level("INFO"):
        schedule = Schedule.from_config({**config, **betas})
    assert len(caplog.messages) == 1 and ignored in caplog.messages[0] and "config.sampling.sampler" in caplog.messages[0]
    plain = Schedule.create(**betas)
    np.testing.assert_array_equal(schedule.alpha_bar, plain.alpha_bar)
    assert schedule.prediction_type == "v_prediction"
    finite = {key: value for key, value in config.items() if value != -math.inf}
    assert json.loads(json.dumps(schedule.to_config(), allow_nan=False)) == {**finite, **betas}


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDIMScheduler", "interpolation_type": "linear"},  # from_single_file of diffusers 0.26 and 0.27
        {"_class_name": "DDPMScheduler", "timestep_type": "discrete", "use_karras_sigmas": False},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "bh2", "predict_x0": True, "disable_corrector": []},
        {"_class_name": "PNDMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0},
    ],
)
def test_what_another_scheduler_left_in_a_config_changes_nothing_and_is_written_back(config, caplog):
    """diffusers keeps the options of one scheduler in the config of another that it makes from it."""
    own = {"_class_name": config["_class_name"]}
    with caplog.at_level("INFO"):
        schedule = Schedule.from_config(config)
    assert not caplog.messages and schedule.to_config() == config
    plain = Schedule.from_config(own)
    for name in ("prediction_type", "solver_type", "set_alpha_to_one", "timestep_spacing", "clip_sample"):
        assert getattr(schedule, name) == getattr(plain, name)
    np.testing.assert_array_equal(schedule.alpha_bar, plain.alpha_bar)


def test_the_end_of_sampling_is_taken_from_the_file_of_any_class():
    """`DDIMScheduler.from_config` of Stable Diffusion XL's Euler config keeps the key, and so does Euler its own."""
    config = {"_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False, "final_sigmas_type": "sigma_min"}
    schedule = Schedule.from_config(config)
    assert (schedule.set_alpha_to_one, schedule.final_sigmas_type) == (False, "sigma_min")
    plain = Schedule.from_config({"_class_name": "EulerDiscreteScheduler"})
    assert (plain.set_alpha_to_one, plain.final_sigmas_type) == (True, "zero")
    unipc = Schedule.from_config({"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "solver_type": "bh1"})
    assert (unipc.solver_order, unipc.solver_type) == (2, "midpoint")


def test_a_schedule_without_arguments_is_ddpms():
    assert Schedule().to_config() == Schedule.create().to_config()
    np.testing.assert_array_equal(Schedule().gamma, Schedule.create().gamma)
    np.testing.assert_array_equal(Schedule(beta_end=0.01).alpha_bar, Schedule.create(beta_end=0.01).alpha_bar)
    doubled = jax.tree.map(lambda table: 2 * table, Schedule())
    np.testing.assert_array_equal(doubled.gamma, 2 * Schedule().gamma)
    with pytest.raises(UserError, match="beta_end is 2"):
        Schedule(beta_end=2.0)


# rescale_betas_zero_snr: the last step is pure noise.
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def test_zero_snr_shifts_and_scales_gamma():
    """Recorded from diffusers 0.42.1's DDIMScheduler in float32: alpha_bar at 0, 500, 998 and 999."""
    schedule = Schedule.create(**ZERO_SNR)
    plain = np.sqrt(Schedule.create().alpha_bar64)
    np.testing.assert_allclose(np.sqrt(schedule.alpha_bar64), (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1]), atol=1e-15)
    recorded = [0.99989998, 0.07524620, 4.2132742e-9, 0.0]
    np.testing.assert_allclose(schedule.alpha_bar[jnp.array([0, 500, 998, 999])], recorded, rtol=1e-4)
    assert (schedule.gamma[-1], schedule.sigma[-1]) == (0.0, 1.0)
    assert schedule.alpha_bar64[0] == pytest.approx(1 - 1e-4, rel=1e-12)
    assert Schedule.from_config(schedule.to_config()).to_config() == schedule.to_config()
    assert Schedule.create(class_name="EulerDiscreteScheduler", **ZERO_SNR).alpha_bar64[-1] == 2.0**-24


def test_zero_snr_recommends_trailing_and_trains_below_the_last_step(caplog):
    assert (Schedule.from_config(ZERO_SNR).t_end, Schedule().t_end) == (999, 1000)
    assert not caplog.messages
    Schedule.from_config({**ZERO_SNR, "timestep_spacing": "leading"})
    assert "trailing is recommended" in caplog.text


def test_null_is_off_where_the_other_values_are_true_and_false():
    """As in diffusers, which keeps None and finds it false; of numbers it is the default."""
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": None, "set_alpha_to_one": None, "beta_end": None}
    schedule = Schedule.from_config(ddim)
    assert (schedule.clip_sample, schedule.set_alpha_to_one) == (False, False)
    assert schedule.to_config()["beta_end"] == 0.02


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_a_schedule_of_another_class_is_written_and_read_back(name):
    made = Schedule.create(class_name=name, beta_end=0.03)
    back = Schedule.from_config(made.to_config())
    assert made.to_config()["_class_name"] == name
    np.testing.assert_array_equal(made.gamma, back.gamma)
