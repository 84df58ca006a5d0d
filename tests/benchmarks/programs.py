"""The programs of a config, a training step and a sampler, as functions and the shapes of their arguments: no weights are made.

Networks that a config leaves to a checkpoint are those of the official checkpoints.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.config.options import Options
from retrack_jax.config.reading import read_config
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.models.dit import DiT
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.models.vae import AutoencoderKL
from retrack_jax.notation import PyTree
from retrack_jax.problem.codec import decode_fn
from retrack_jax.sampling import SAMPLERS
from retrack_jax.sampling.generate import make_sample_fn, pmap_sample_fn
from retrack_jax.sampling.guided import GuidedParams, make_guided_sample_fn
from retrack_jax.train.lora import init
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, make_train_step
from retrack_jax.unlearn.methods import METHODS
from tests.benchmarks.networks import config_of
from tests.models.test_text_to_image_networks import SD14_UNET, SD_VAE, XL_UNET

CONFIGS = Path(__file__).parents[2] / "configs"
# What configs/custom.py leaves to a user's checkpoint and data: here Stable Diffusion XL and its adapter, in half precision.
CUSTOM = {"num_steps": 40, "batch_size": 16, "accumulation": 8, "num_neighbors": 10, "learning_rate": 1e-4, "adapter": "lora"}
KEY = jax.eval_shape(lambda: jax.random.key(0))
_SHALLOW = {"layers_per_block": 1}


@dataclasses.dataclass
class Programs:
    """What a config runs on one device, with the shapes of the arguments of each function."""

    module: nn.Module
    images: int  # in a microbatch of one stream
    accumulation: int  # microbatches of a step
    step: Callable
    step_arguments: tuple
    sampler: Callable
    sampler_arguments: tuple


def options_of(name: str) -> Options:
    """Returns the options of `configs/NAME.py`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return read_config(module.get_config())


def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def network_of(name: str, options: Options, *, shallow: bool = False, **own) -> nn.Module:
    """Returns the network of a config.

    Args:
      shallow: one layer at each level, since the time to trace grows with their number; widths are the same.
      own: fields of the module, `dtype` and `remat`, in place of the config's.
    """
    fewer = _SHALLOW if shallow else {}
    if name == "stable_diffusion":
        levels = "block_out_channels", "down_block_types", "up_block_types"
        three = {field: SD14_UNET[field][1:] for field in levels} if shallow else {}
        return UNet2DCondition.from_config(SD14_UNET | fewer | three, **{"remat": options.compute.remat} | own)
    if name == "custom":
        transformers = {"transformer_layers_per_block": [1, 1, 1]} if shallow else {}
        return UNet2DCondition.from_config(XL_UNET | fewer | transformers, **{"dtype": jnp.bfloat16, "remat": True} | own)
    if options.network == "dit":
        return DiT.from_config(dataclasses.asdict(options.dit), **own)
    return UNet2D.from_config(config_of(name) | fewer, **own)


def programs(
    name: str, *, shallow: bool = False, accumulation: int | None = None, steps: int = 1, sampled: int = 4, calls=None, **own
) -> Programs:
    """Returns the programs of `configs/NAME.py`.

    Args:
      shallow, own: as `network_of` takes them.
      accumulation: microbatches of a step; None: the config's.
      steps: how many one call of the training step takes.
      sampled: how many images one call of the sampler draws.
      calls: steps of the sampler; None: the config's.
    """
    options = options_of(name)
    method, recipe = METHODS[options.method], options.recipe(options.method)
    if name == "custom":
        recipe = dataclasses.replace(recipe, **CUSTOM, own=dataclasses.replace(recipe.own, lam=0.01))
    recipe = dataclasses.replace(recipe, accumulation=accumulation or recipe.accumulation)
    module, schedule = network_of(name, options, shallow=shallow, **own), Schedule.from_config(options.schedule.to_config())
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
    lead = (1, recipe.batch_size) if steps == 1 else (1, steps, recipe.batch_size)
    batch = {"remain": examples(*lead)} | {part: array(*lead) for part in ("remain_index", "forget_row", "forget_index")}
    neighbors = {field: one for field, one in examples(recipe.num_neighbors).items() if field != "condition"}
    shared = Shared(
        schedule=schedule,
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

    sampler = SAMPLERS[options.sampling.sampler or "ddim"].create(schedule, calls or options.sampling.num_steps)
    if len(inputs) == 2:
        sample, sample_params = pmap_sample_fn(make_sample_fn(eps_fn, sampler, shape), output="uint8"), params
    else:
        vae = AutoencoderKL.from_config(SD_VAE | (_SHALLOW if shallow else {})) if text else None
        vae_params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"] if text else None
        decode = decode_fn(vae) if text else None
        guided = make_guided_sample_fn(eps_fn, decode, sampler, shape, guidance=options.sampling.guidance_scale)
        sample = pmap_sample_fn(guided, output="uint8", of_images=GuidedParams.of_images)
        sample_params = GuidedParams(params, vae_params, condition(3), condition(1))
    return Programs(
        module,
        recipe.batch_size // recipe.accumulation,
        recipe.accumulation,
        make_train_step(method, eps_fn, how, several=steps > 1),
        (state, batch, shared, KEY),
        sample,
        (sample_params, KEY, array(1, sampled)),
    )


def forward_flops(module: nn.Module) -> float:
    """Returns the FLOPs of one forward pass of one image, counted over the operations before any compiler changes them.

    The program is that of a GPU, whose convolutions are direct, with plain attention: a kernel's operations are not counted.
    """
    _, t, *condition = example_inputs(module)
    x = array(1, module.sample_size, module.sample_size, module.in_channels, dtype=jnp.float32)
    condition = [array(1, 77, *one.shape[2:], dtype=one.dtype) if one.ndim == 3 else one for one in jax.tree.leaves(condition)]
    inputs = x, t, *condition
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    with mock.patch.dict(os.environ, RETRACK_ATTENTION="xla"):
        traced = jax.jit(module.apply).trace(params, *inputs)
        return traced.lower(lowering_platforms=("cuda",)).cost_analysis()["flops"]


def random_arrays(shapes: PyTree) -> PyTree:
    """Returns arrays of these shapes, on the host: pixels, row numbers below 3, floats near 0 but norms' scales near 1."""
    source = np.random.default_rng(0)
    floats = source.standard_normal(1_000_003, np.float32) * np.float32(0.02)  # repeated: a billion draws would take a minute

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if leaf.dtype == jnp.uint8:
            return source.integers(0, 256, leaf.shape, np.uint8)
        if leaf.dtype == jnp.int32:
            return np.resize(np.arange(3, dtype=np.int32), leaf.shape)
        # Without a scale of 1 attention's queries and keys get no gradient worth the name.
        center = np.float32(getattr(path[-1], "key", None) == "scale")
        return center + np.resize(floats, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
