"""The training step and the sampler of every config, lowered for GPUs and TPUs: what must stand in the program and what must not.

Nothing is compiled or run, and no weights are made. Widths and batches are the configs' own; networks have fewer layers, because
the time to trace grows with them.
"""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.diffusion import make_eps_fn
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import METHODS
from tests import toys
from tests.benchmarks import programs as of_configs
from tests.benchmarks.programs import KEY, array, options_of, programs
from tests.lowering import convolution_layouts, custom_calls, donated, dtypes, image_transposes, lowered, lowering_for

CONFIGS = sorted(path.stem for path in of_configs.CONFIGS.glob("*.py") if path.stem != "__init__")
PLATFORMS = ("cuda", "tpu")
DOUBLE = {"f64", "i64"}  # jax counts random bits in ui64
BACKWARD = "__cudnn$fmhaSoftmaxBackward"
FLASH = {"cuda": {"__cudnn$fmhaSoftmax", BACKWARD}, "tpu": {"tpu_custom_call"}}
FORWARD, TO_KERNEL = "b01f,01io->b01f", "f01b,i01o->01bf"


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)  # this machine has none to ask
        yield request.param, programs(request.param, shallow=True)


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
    of = programs("cifar10", shallow=True)
    with lowering_for("cpu"):
        text = lowered(of.step, *of.step_arguments)
    assert convolution_layouts(text) == {FORWARD} and "optimization_barrier" in text
    assert image_transposes(text, 2 * of.images)
