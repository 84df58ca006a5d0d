"""Schedules and samplers against the real diffusers, live: tables, add_noise, every step of a chain, and whole loops.

The same inputs, the same noise and the same network output go to both. Tolerance: relative norm 1e-5, per step and for a whole
loop, without exception; what varies is the precision that diffusers computes in.

diffusers keeps alpha_bar in float32. Where t is small and steps are short that is too little for it to agree with itself:
1 - alpha_bar_t / alpha_bar_{t-1} is 1e-4 of two numbers near 1, so it carries an error of 3e-4 of itself; ours comes from
float64. So every DDPM and DDIM case also runs diffusers' own code with tables in float64, and is matched there to 1e-5. Three
cases (`ROUNDED_STEP`; two of them, `ROUNDED_LOOP`, also over a whole loop) are matched there alone, because diffusers in float32
is farther than 1e-5 from diffusers in float64; `test_what_differs_is_diffusers_own_rounding` shows that this is all of it.
"""

import inspect
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import diffusers.schedulers.scheduling_ddpm as diffusers_ddpm  # noqa: E402

from retrack_jax.checkpoints import export_diffusers  # noqa: E402
from retrack_jax.diffusion import Schedule, add_noise, edm, flow, make_eps_fn  # noqa: E402
from retrack_jax.diffusion.scheduler_config import CLASS_DEFAULTS  # noqa: E402
from retrack_jax.models.unet2d import UNet2D  # noqa: E402
from retrack_jax.sampling import initial_noise, make_sampler, sample, step_noise  # noqa: E402

TOLERANCE = 1e-5
SHAPE = (4, 4, 2)
BATCH = 3

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
BETAS = [0.01 + 0.0004 * i for i in range(100)]
CASES = {
    "ddpm": ("DDPMScheduler", "ddpm", 50, dict()),
    "ddpm-large-unclipped": ("DDPMScheduler", "ddpm", 50, dict(variance_type="fixed_large", clip_sample=False)),
    "ddpm-range": ("DDPMScheduler", "ddpm", 40, dict(clip_sample_range=0.6)),
    "ddpm-1000": ("DDPMScheduler", "ddpm", 1000, dict()),
    "ddpm-1000-unclipped": ("DDPMScheduler", "ddpm", 1000, dict(clip_sample=False)),
    "ddpm-sd-offset": ("DDPMScheduler", "ddpm", 50, dict(**SD, steps_offset=1, clip_sample=False)),
    "ddpm-sd-offset-large": ("DDPMScheduler", "ddpm", 50, dict(**SD, steps_offset=1, variance_type="fixed_large")),
    "ddpm-v-trailing": ("DDPMScheduler", "ddpm", 25, dict(prediction_type="v_prediction", timestep_spacing="trailing")),
    "ddpm-sample-linspace": ("DDPMScheduler", "ddpm", 30, dict(prediction_type="sample", timestep_spacing="linspace")),
    "ddpm-cosine-v": ("DDPMScheduler", "ddpm", 50, dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")),
    "ddpm-zero-snr": ("DDPMScheduler", "ddpm", 25, dict(**ZERO_SNR, clip_sample=False)),
    "ddpm-trained-betas": ("DDPMScheduler", "ddpm", 20, dict(num_train_timesteps=100, trained_betas=BETAS)),
    "ddpm-trailing-uneven": ("DDPMScheduler", "ddpm", 37, dict(timestep_spacing="trailing")),
    "ddim": ("DDIMScheduler", "ddim", 50, dict()),
    "ddim-unclipped": ("DDIMScheduler", "ddim", 20, dict(clip_sample=False)),
    "ddim-sd": ("DDIMScheduler", "ddim", 50, dict(**SD, steps_offset=1, clip_sample=False, set_alpha_to_one=False)),
    "ddim-v-trailing": ("DDIMScheduler", "ddim", 25, dict(prediction_type="v_prediction", timestep_spacing="trailing")),
    "ddim-sample-linspace": ("DDIMScheduler", "ddim", 40, dict(prediction_type="sample", timestep_spacing="linspace")),
    "ddim-zero-snr": ("DDIMScheduler", "ddim", 25, dict(**SD, **ZERO_SNR, clip_sample=False, set_alpha_to_one=False)),
    "ddim-zero-snr-sample": ("DDIMScheduler", "ddim", 20, dict(**(ZERO_SNR | dict(prediction_type="sample")), clip_sample=False)),
    "pndm-sd": ("PNDMScheduler", "pndm", 50, dict(**SD, steps_offset=1, skip_prk_steps=True)),
    "pndm-to-one": ("PNDMScheduler", "pndm", 20, dict(skip_prk_steps=True, set_alpha_to_one=True)),
    "pndm-v": ("PNDMScheduler", "pndm", 25, dict(**SD, steps_offset=1, skip_prk_steps=True, prediction_type="v_prediction")),
    "pndm-linspace": ("PNDMScheduler", "pndm", 10, dict(**SD, skip_prk_steps=True, timestep_spacing="linspace")),
    "dpm": ("DPMSolverMultistepScheduler", "dpm_solver", 20, dict()),
    "dpm-few": ("DPMSolverMultistepScheduler", "dpm_solver", 10, dict()),
    "dpm-leading": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, timestep_spacing="leading", steps_offset=1)),
    "dpm-trailing": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(timestep_spacing="trailing")),
    "dpm-heun": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, solver_type="heun")),
    "dpm-sigma-min": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, final_sigmas_type="sigma_min")),
    "dpm-sigma-min-few": (
        "DPMSolverMultistepScheduler", "dpm_solver", 12, dict(**SD, final_sigmas_type="sigma_min", solver_type="heun"),
    ),
    "dpm-euler-at-final": (
        "DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, final_sigmas_type="sigma_min", euler_at_final=True),
    ),
    "dpm-first-order": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, solver_order=1)),
    "dpm-v": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, prediction_type="v_prediction")),
    "dpm-zero-snr": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, **ZERO_SNR)),
    "dpm-sample": ("DPMSolverMultistepScheduler", "dpm_solver", 25, dict(**SD, prediction_type="sample")),
}  # fmt: skip

ROUNDED_STEP = ("ddpm-1000", "ddpm-1000-unclipped", "ddim-sample-linspace")
ROUNDED_LOOP = ("ddpm-1000", "ddpm-1000-unclipped")
FLOAT64 = [(name, "float64") for name, case in CASES.items() if case[0] in ("DDPMScheduler", "DDIMScheduler")]


def runs(rounded):
    """Returns every case as diffusers is, but for those where it does not agree with itself, and FLOAT64."""
    return [(name, "float32") for name in CASES if name not in rounded] + FLOAT64


def both(name):
    """Returns (diffusers' scheduler with its timesteps set, our schedule read from its config, our sampler)."""
    class_name, sampler_name, num_steps, options = CASES[name]
    theirs = getattr(diffusers, class_name)(**options)
    theirs.set_timesteps(num_steps)
    schedule = Schedule.from_config(json.loads(theirs.to_json_string()))
    return theirs, schedule, make_sampler(sampler_name, schedule, num_steps)


def reference(theirs, precision):
    """Returns (diffusers' scheduler, its dtype), with its tables made anew in float64 if `precision` says so."""
    if precision == "float32":
        return theirs, torch.float32
    config = theirs.config
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float64)
    elif config.beta_schedule == "squaredcos_cap_v2":
        steps = config.num_train_timesteps
        share = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(share)], dtype=torch.float64)
    else:
        power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
        ends = config.beta_start**power, config.beta_end**power
        betas = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64) ** (1 / power)
    if getattr(config, "rescale_betas_zero_snr", False):
        betas = diffusers_ddpm.rescale_zero_terminal_snr(betas)
    theirs.alphas_cumprod = torch.cumprod(1 - betas, 0)
    theirs.one = torch.tensor(1.0, dtype=torch.float64)  # DDPM's alpha_bar past the last step
    if hasattr(theirs, "final_alpha_cumprod"):  # and DDIM's
        theirs.final_alpha_cumprod = theirs.one if config.set_alpha_to_one else theirs.alphas_cumprod[0]
    return theirs, torch.float64


def relative(ours, theirs):
    ours, theirs = np.float64(ours), np.float64(theirs)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def feed_noise(monkeypatch, noises):
    """Makes diffusers' DDPM draw `noises` in order."""
    queue = iter(noises)
    monkeypatch.setattr(
        diffusers_ddpm,
        "randn_tensor",
        lambda shape, dtype, **kwargs: torch.from_numpy(np.array(next(queue))).to(dtype),
    )


def network(schedule, xp):
    """Returns the exact denoiser for data at ±0.7 with std 0.1, as a network of the schedule's prediction type, in NumPy or
    JAX.
    """
    gammas, sigmas = xp.asarray(schedule.gamma), xp.asarray(schedule.sigma)

    def output(x, t):
        gamma, sigma = (table[t].reshape(-1, 1, 1, 1) for table in (gammas, sigmas))
        variance = gamma**2 * 0.01 + sigma**2
        sign = 0.7 * xp.tanh(gamma * 0.7 * x / variance)
        x_0 = sign + gamma * 0.01 / variance * (x - gamma * sign)
        if schedule.prediction_type == "sample":
            return x_0
        eps = (x - gamma * x_0) / sigma
        return eps if schedule.prediction_type == "epsilon" else gamma * eps - sigma * x_0

    return output


@pytest.mark.parametrize("name", CASES)
def test_tables_timesteps_and_config(name):
    theirs, schedule, sampler = both(name)
    np.testing.assert_array_equal(sampler.rows["t"], theirs.timesteps.numpy())
    assert relative(schedule.alpha_bar, theirs.alphas_cumprod.numpy()) <= TOLERANCE
    # Their float32 product, at every t; zero SNR subtracts two numbers of 0.07 that agree to 1e-6 of themselves.
    rtol = 1e-4 if "zero-snr" in name else 2e-5
    np.testing.assert_allclose(schedule.alpha_bar, theirs.alphas_cumprod.numpy(), rtol=rtol)
    again = type(theirs).from_config(schedule.to_config())
    changed = {key for key, value in theirs.config.items() if not key.startswith("_") and again.config[key] != value}
    assert not changed


@pytest.mark.parametrize("class_name", [name for name in CLASS_DEFAULTS if name not in (*flow.CLASSES, *edm.CLASSES)])  # no betas
def test_betas_of_every_class_and_the_same_class_back(class_name, tmp_path):
    """From a file with every key, and from one that leaves all to the class's defaults; an export makes the class again."""
    kind = getattr(diffusers, class_name)
    if class_name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    names, cases = inspect.signature(kind.__init__).parameters, [{}, {"beta_schedule": "squaredcos_cap_v2"}]
    cases += [dict(beta_start=0.001, beta_end=0.01, num_train_timesteps=500)]
    cases += [dict(**SD, prediction_type="v_prediction")] * ("prediction_type" in names)
    cases += [dict(**SD, **ZERO_SNR)] * ("rescale_betas_zero_snr" in names)
    cases += [dict(use_karras_sigmas=True)] * ("use_karras_sigmas" in names)
    for options in cases:
        theirs = kind(**options)
        for config in (json.loads(theirs.to_json_string()), {"_class_name": class_name, **options}):
            ours = Schedule.from_config(config)
            np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod.numpy(), rtol=2e-5, atol=2e-9)
            assert ours.prediction_type == theirs.config.get("prediction_type", "epsilon")
        (tmp_path / "scheduler_config.json").write_text(json.dumps(Schedule.from_config(config).to_config(), allow_nan=False))
        again = kind.from_pretrained(tmp_path)
        assert {name: again.config[name] for name in config if name != "_class_name"} == options


def test_a_pipeline_of_another_scheduler_is_exported_with_it(tmp_path):
    theirs = diffusers.UniPCMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True)
    ours = Schedule.from_config(json.loads(theirs.to_json_string()))
    blocks = dict(block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    module = UNet2D(**blocks, attention_head_dim=4, norm_num_groups=2)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1,), jnp.int32))["params"]
    export_diffusers(tmp_path / "model", module, params, schedule=ours)
    again = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "model" / "scheduler")
    assert all(again.config[name] == value for name, value in theirs.config.items() if not name.startswith("_"))


@pytest.mark.parametrize("class_name", ["DDPMScheduler", "DDIMScheduler"])
def test_trailing_timesteps_of_every_number_of_steps(class_name):
    """For 62 of 1 to 1000 diffusers makes one step too many, at t = -1: its own rounding. Without that one, all are the same."""
    theirs = getattr(diffusers, class_name)(timestep_spacing="trailing")
    ours, surplus = Schedule.from_config(dict(theirs.config)), []
    for num_steps in range(1, 1001):
        theirs.set_timesteps(num_steps)
        visited = theirs.timesteps.numpy()
        if len(visited) > num_steps:
            assert visited[num_steps:].tolist() == [-1]
            surplus.append(num_steps)
        np.testing.assert_array_equal(ours.timesteps(num_steps), visited[:num_steps])
    assert len(surplus) == 62


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0] != "DPMSolverMultistepScheduler"])
def test_add_noise(name):
    theirs, schedule, _ = both(name)
    last = schedule.num_train_timesteps - 1
    t = np.array([0, 1, last // 2, last - 1, last], np.int32)
    x_0, eps = np.random.default_rng(0).standard_normal((2, 5, *SHAPE)).astype(np.float32)
    ours = add_noise(jnp.asarray(x_0), jnp.asarray(eps), schedule.gamma[t], schedule.sigma[t])
    expected = theirs.add_noise(torch.from_numpy(x_0), torch.from_numpy(eps), torch.from_numpy(t).long()).numpy()
    for one, other in zip(ours, expected, strict=True):
        assert relative(one, other) <= TOLERANCE


@pytest.mark.parametrize("name,precision", runs(ROUNDED_STEP))
def test_each_step(name, precision, monkeypatch):
    """Feeds arbitrary samples and outputs, and their state of multistep methods, to every step of the chain."""
    theirs, schedule, sampler = both(name)
    theirs, dtype = reference(theirs, precision)
    worst = 0.0
    for _, ours, x_theirs in steps_of_a_chain(schedule, sampler, [(theirs, dtype)], monkeypatch):
        worst = max(worst, relative(ours, x_theirs))
    print(f"{name}, {precision}: worst step {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("name", ROUNDED_STEP)
def test_what_differs_is_diffusers_own_rounding(name, monkeypatch):
    """From the same sample, output and noise our distance to diffusers in float32 is that of diffusers in float64, to 1e-5."""
    single, schedule, sampler = both(name)
    double, dtype = reference(both(name)[0], "float64")
    ours_off, theirs_off = [], []
    for _, ours, x_double, x_single in steps_of_a_chain(
        schedule, sampler, [(double, dtype), (single, torch.float32)], monkeypatch
    ):
        ours_off.append(relative(ours, x_single))
        theirs_off.append(relative(x_double, x_single))
    print(f"{name}: from diffusers in float32 at worst ours {max(ours_off):.1e}, diffusers in float64 {max(theirs_off):.1e}")
    assert max(theirs_off) > TOLERANCE  # else the case needs no place in ROUNDED_STEP
    np.testing.assert_allclose(ours_off, theirs_off, rtol=0, atol=TOLERANCE)


def steps_of_a_chain(schedule, sampler, references, monkeypatch):
    """Yields (t, our next sample, each reference's next sample) for every step; all start from the first reference's sample."""
    generator = np.random.default_rng(1)
    calls = len(sampler.rows["t"])
    x = generator.standard_normal((BATCH, *SHAPE)).astype(np.float32)
    noises = generator.standard_normal((calls, BATCH, *SHAPE)).astype(np.float32)
    feed_noise(monkeypatch, np.repeat(noises, len(references), axis=0))
    state, x_theirs = sampler.init(jnp.asarray(x)), torch.from_numpy(x).to(references[0][1])
    step = jax.jit(sampler.step)
    eps_of = jax.jit(lambda output, x, t: make_eps_fn(lambda params, x, t: output, schedule)({}, x, t))
    for j, t in enumerate(sampler.rows["t"]):
        output = generator.standard_normal((BATCH, *SHAPE)).astype(np.float32)
        row = {key: value[j] for key, value in sampler.rows.items()}
        state = (jnp.asarray(x_theirs.float().numpy()), *state[1:])
        eps = eps_of(jnp.asarray(output), state[0], jnp.full((BATCH,), t))
        state = step(state, eps, jnp.asarray(noises[j]), row)
        after = [
            theirs.step(torch.from_numpy(output).to(dtype), int(t), x_theirs.to(dtype), return_dict=False)[0]
            for theirs, dtype in references
        ]
        yield t, state[0], *(x.numpy() for x in after)
        x_theirs = torch.clamp(after[0], -10, 10)  # arbitrary outputs make some unclipped chains grow without bound


@pytest.mark.parametrize("name,precision", runs(ROUNDED_LOOP))
def test_whole_loop(name, precision, monkeypatch):
    theirs, schedule, sampler = both(name)
    theirs, dtype = reference(theirs, precision)
    rngs = jax.random.split(jax.random.key(2), BATCH)
    x_init = initial_noise(rngs, SHAPE)
    calls = len(sampler.rows["t"])
    noises = jax.jit(jax.vmap(lambda j: step_noise(rngs, j, SHAPE)))(jnp.arange(calls))
    feed_noise(monkeypatch, np.asarray(noises))
    eps_fn = make_eps_fn(lambda variables, x, t: network(schedule, jnp)(x, t), schedule)
    ours = jax.jit(lambda x, rngs: sample(lambda x, t: eps_fn({}, x, t), x, rngs, sampler))(x_init, rngs)
    output = network(schedule, np)
    x = torch.from_numpy(np.array(x_init)).to(dtype)
    for t in theirs.timesteps:
        y = torch.from_numpy(output(x.float().numpy(), np.full(BATCH, int(t)))).to(dtype)
        x = theirs.step(y, int(t), x, return_dict=False)[0]
    error = relative(ours, x.numpy())
    print(f"{name}, {precision}: whole loop {error:.1e}")
    assert 0.5 < np.abs(x.numpy()).mean() < 0.9  # the loop does sample the two modes
    assert error <= TOLERANCE
