"""The training step and the sampler of every config, lowered for GPUs and TPUs: what must stand in the program and what must not.

Nothing is compiled or run, and no weights are made. Widths and batches are the configs' own; networks have fewer layers, because
the time to trace grows with them.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.models.dit import DiT
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.problem.codec import decode_fn
from retrack_jax.sampling import SAMPLERS
from retrack_jax.sampling.generate import make_sample_fn, pmap_sample_fn
from retrack_jax.sampling.guided import GuidedParams, make_guided_sample_fn
from retrack_jax.train.lora import init
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from tests import toys
from tests.benchmarks.full_size import NETWORKS
from tests.benchmarks.memory import array, options_of
from tests.lowering import convolution_layouts, custom_calls, donated, dtypes, image_transposes, lowered, lowering_for
from tests.models.test_text_to_image_networks import SD14_UNET, SD_VAE, XL_UNET

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.stem != "__init__")
PLATFORMS = ("cuda", "tpu")
DOUBLE = {"f64", "i64"}  # jax counts random bits in ui64
KEY = jax.eval_shape(lambda: jax.random.key(0))
SHALLOW = {"layers_per_block": 1}
# What the configs leave to a user's checkpoint and data: here Stable Diffusion XL and its adapter, in half precision.
CUSTOM = {"num_steps": 40, "batch_size": 16, "accumulation": 8, "num_neighbors": 10, "learning_rate": 1e-4, "adapter": "lora"}
BACKWARD = "__cudnn$fmhaSoftmaxBackward"
FLASH = {"cuda": {"__cudnn$fmhaSoftmax", BACKWARD}, "tpu": {"tpu_custom_call"}}
FORWARD, TO_KERNEL = "b01f,01io->b01f", "f01b,i01o->01bf"


@dataclasses.dataclass
class Programs:
    """What a config runs: the network, a training step and a sampler, with the shapes of their arguments."""

    module: object
    images: int  # in a microbatch of one stream
    step: object
    step_arguments: tuple
    sampler: object
    sampler_arguments: tuple


def network(name: str, options):
    if name == "stable_diffusion":
        three = {field: SD14_UNET[field][1:] for field in ("block_out_channels", "down_block_types", "up_block_types")}
        return UNet2DCondition.from_config(SD14_UNET | SHALLOW | three, remat=options.compute.remat)
    if name == "custom":
        transformers = {"transformer_layers_per_block": [1, 1, 1]}
        return UNet2DCondition.from_config(XL_UNET | SHALLOW | transformers, dtype=jnp.bfloat16, remat=True)
    if options.network == "dit":
        return DiT.from_config(dataclasses.asdict(options.dit))
    return UNet2D.from_config((NETWORKS.get(name) or dataclasses.asdict(options.model)) | SHALLOW)


def programs(name: str) -> Programs:
    options = options_of(name)
    method, recipe = METHODS[options.method], options.recipe(options.method)
    if name == "custom":
        recipe = dataclasses.replace(recipe, **CUSTOM, own=dataclasses.replace(recipe.own, lam=0.01))
    module, schedule = network(name, options), Schedule.from_config(options.schedule.to_config())
    inputs = example_inputs(module)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    shape = (module.sample_size, module.sample_size, module.in_channels)
    text = len(inputs) > 2 and inputs[2] is not None and name in ("stable_diffusion", "custom")
    shared_prompt = name == "stable_diffusion"

    def examples(*lead: int) -> dict:
        images = {"x_0": array(*lead, *shape, dtype=jnp.float32)} if text else {"pixels": array(*lead, *shape, dtype=jnp.uint8)}
        if len(inputs) == 2 or shared_prompt:
            return images
        return images | {"condition": jax.tree.map(lambda one: array(*lead, *one.shape[1:], dtype=one.dtype), inputs[2])}

    def condition(rows: int):
        return jax.tree.map(lambda one: array(rows, *one.shape[1:], dtype=one.dtype), inputs[2])

    labelled = len(inputs) > 2 and not text
    batch = {"remain": examples(1, recipe.batch_size)}
    batch |= {part: array(1, recipe.batch_size) for part in ("remain_index", "forget_row", "forget_index")}
    neighbors = {field: one for field, one in examples(recipe.num_neighbors).items() if field != "condition"}
    shared = Shared(
        schedule=jax.eval_shape(lambda: schedule),
        forget=examples(3),
        neighbors=neighbors,
        neighbor_rows=array(3, recipe.num_neighbors),
        reference=params if recipe.has_adapter else None,
        conditions=array(1, 77, module.cross_attention_dim, dtype=jnp.float32) if shared_prompt else None,
        null=condition(1) if labelled else None,
    )
    start = (lambda params: init(recipe.lora, params, jax.random.key(0))) if recipe.has_adapter else (lambda params: params)
    state = jax.eval_shape(lambda params: create_state(start(params), recipe.optimizer()), params)
    how = recipe.step_options(schedule.t_end, dropout=False, condition_dropout=0.1 if labelled else 0.0)
    eps_fn = make_eps_fn(module.apply, schedule)

    sampler = SAMPLERS[options.sampling.sampler or "ddim"].create(schedule, options.sampling.num_steps)
    if len(inputs) == 2:
        sample, sampled = pmap_sample_fn(make_sample_fn(eps_fn, sampler, shape), output="uint8"), params
    else:
        vae = AutoencoderKL.from_config(SD_VAE | SHALLOW) if text else None
        vae_params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"] if text else None
        decode = decode_fn(vae) if text else None
        guided = make_guided_sample_fn(eps_fn, decode, sampler, shape, guidance=options.sampling.guidance_scale)
        sample = pmap_sample_fn(guided, output="uint8", of_images=GuidedParams.of_images)
        sampled = GuidedParams(params, vae_params, condition(3), condition(1))
    return Programs(
        module,
        recipe.batch_size // recipe.accumulation,
        make_train_step(method, eps_fn, how),
        (state, batch, shared, KEY),
        sample,
        (sampled, KEY, array(1, 4)),
    )


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)  # this machine has none to ask
        yield request.param, programs(request.param)


def check_program(text: str, images: int, remat: bool) -> None:
    assert not dtypes(text) & DOUBLE
    # Forward; its gradient to the images; its gradient to the kernel. Both platforms' libraries take them as they are.
    assert convolution_layouts(text) <= {FORWARD, "b01f,01oi->b01f", TO_KERNEL}
    assert image_transposes(text, images) == []
    assert remat or "optimization_barrier" not in text  # stands between the steps of models/cpu/winograd.py


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_training_step(config, platform):
    name, of = config
    with lowering_for(platform):
        text = lowered(of.step, *of.step_arguments)
    check_program(text, of.images, of.module.remat)
    trains_convolutions = name not in ("custom", "digits_flow")  # an adapter; a transformer
    assert (TO_KERNEL in convolution_layouts(text)) == trains_convolutions
    state = len(jax.tree.leaves(of.step_arguments[0]))
    assert donated(text)[:state] == [True] * state and not any(donated(text)[state:])
    # Stable Diffusion XL in bfloat16 has 4096 tokens at heads of 64.
    assert custom_calls(text) == (FLASH[platform] if name == "custom" else set())


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_sampler(config, platform):
    name, of = config
    with lowering_for(platform):
        text = lowered(of.sampler, *of.sampler_arguments)
    images = of.sampler_arguments[2].shape[1] * (1 if len(example_inputs(of.module)) == 2 else 2)  # guided: twice as many
    check_program(text, images, of.module.remat)
    assert custom_calls(text) == (FLASH[platform] - {BACKWARD} if name == "custom" else set())


@pytest.mark.parametrize("method", METHODS)
def test_no_method_asks_for_more(method):
    """All methods' losses and combinations, on a toy network."""
    entry, schedule = METHODS[method], toys.schedule()
    batch = {"remain": {"pixels": array(1, 8, *toys.SHAPE, dtype=jnp.uint8)}}
    batch |= {part: array(1, 8) for part in ("remain_index", "forget_row", "forget_index")}
    shared = Shared(
        schedule=schedule,
        forget={"pixels": array(2, *toys.SHAPE, dtype=jnp.uint8)},
        neighbors={"pixels": array(5, *toys.SHAPE, dtype=jnp.uint8)},
        neighbor_rows=array(2, 3),
    )
    state = jax.eval_shape(lambda: create_state(toys.params(), options_of("digits_tshirt").recipe(method).optimizer()))
    step = make_train_step(entry, make_eps_fn(toys.ToyNet().apply, schedule), StepOptions(options=entry.options(), t_max=1000))
    for platform in PLATFORMS:
        with lowering_for(platform):
            text = lowered(step, state, batch, shared, KEY)
        assert not dtypes(text) & DOUBLE and not custom_calls(text)


def test_on_a_cpu_the_same_step_has_what_is_for_cpus():
    """So what `check_program` looks for is there to be seen."""
    of = programs("cifar10")
    with lowering_for("cpu"):
        text = lowered(of.step, *of.step_arguments)
    assert convolution_layouts(text) == {FORWARD} and "optimization_barrier" in text
    assert image_transposes(text, 2 * of.images)
