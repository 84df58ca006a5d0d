"""Our training step and sampler, built as the library builds them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax import parallel
from retrack_jax.checkpoints import export_diffusers, import_diffusers, read_schedule_config
from retrack_jax.config.devices import with_microbatches
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.diffusion import Schedule, make_eps_fn
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.notation import PyTree
from retrack_jax.sampling.ddpm import DDPM
from retrack_jax.sampling.generate import generate, make_sample_fn, pmap_sample_fn
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.state import TrainState, create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import get_method
from tests.benchmarks.networks import BATCH, NUM_NEIGHBORS, RECIPE, SISS_SCALE, config_of


def make_module(network: str, dtype: str = "float32", **fields) -> tuple[UNet2D, PyTree]:
    """Returns the module and random parameters."""
    module = UNet2D.from_config(config_of(network), dtype=jnp.dtype(dtype), **fields)
    size, channels = module.sample_size, module.in_channels
    x, t = jnp.zeros((1, size, size, channels)), jnp.zeros((1,), jnp.int32)
    return module, jax.jit(module.init)(jax.random.key(0), x, t)["params"]


def make_data(network: str, remain: int, forget: int) -> tuple[PyTree, Shared]:
    """Returns a batch over all devices of random uint8 images, and one forgotten image with its neighbors on the devices."""
    config, source = config_of(network), np.random.default_rng(0)
    shape = (config["sample_size"], config["sample_size"], config["in_channels"])

    def pixels(count: int) -> dict:
        return {"pixels": source.integers(0, 256, (count, *shape), np.uint8)}

    batch = {
        "remain": pixels(remain),
        "remain_index": np.arange(remain, dtype=np.int32),
        "forget_row": np.zeros(forget, np.int32),
        "forget_index": np.arange(forget, dtype=np.int32),
    }
    rows = jnp.arange(NUM_NEIGHBORS, dtype=jnp.int32)[None]
    shared = Shared(schedule=Schedule.create(), forget=pixels(1), neighbors=pixels(NUM_NEIGHBORS), neighbor_rows=rows)
    return parallel.shard_batch(batch), parallel.replicate(shared)


def make_step(module: UNet2D, network: str, method: str, accumulation: int = 1) -> Callable:
    """Returns the compiled-on-first-use step `(state, batch, shared, rng) -> (state, metrics)`."""
    entry, scale = get_method(method), {"scale": SISS_SCALE[network]}
    own = {"retrack": {"lam": RECIPE[network][0]}, "siss": scale, "siss_no_is": scale}
    how = StepOptions(options=entry.options(**own.get(method, {})), accumulation=accumulation, t_max=1000)
    return make_train_step(entry, make_eps_fn(module.apply, Schedule.create()), how)


def make_state(network: str, params: PyTree) -> TrainState:
    """Returns the state at step 0 with the official AdamW."""
    tx = make_optimizer(learning_rate=RECIPE[network][1], b1=0.95, b2=0.999, eps=1e-8, weight_decay=1e-6, clip_norm=1.0)
    return parallel.replicate(create_state(params, tx))


def write_checkpoint(network: str, folder) -> None:
    """Writes random weights as a folder that `make_training` and diffusers read."""
    export_diffusers(folder, *make_module(network))


def make_training(
    network: str,
    method: str,
    batch: tuple[int, int] | None = None,
    dtype: str = "float32",
    checkpoint=None,
    accumulation: int | None = None,
    **fields,
) -> Callable:
    """Returns a function of no argument that takes one training step and waits for it.

    `checkpoint` is a folder that the model is read from, in place of random weights. Without `accumulation` a CPU takes the
    microbatches that the command takes.
    """
    module, params = import_diffusers(checkpoint) if checkpoint else make_module(network, dtype, **fields)
    remain, forget = batch or BATCH[network]
    data, shared = make_data(network, remain, forget)
    if accumulation is None:
        entry, recipe = get_method(method), UnlearnOptions(batch_size=remain, forget_batch_size=forget)
        accumulation = with_microbatches(recipe, "unlearn", recipe.images_of_a_pass(entry), config_of(network)).accumulation
    step, state = make_step(module, network, method, accumulation), make_state(network, params)
    rng = parallel.replicate(jax.random.key(1))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, data, shared, rng)
        jax.block_until_ready((state, metrics))

    return run


def make_sampling(network: str, num_images: int, num_steps: int, dtype: str = "float32") -> Callable:
    """Returns a function that draws `num_images` images by ancestral DDPM in `num_steps` calls of the network."""
    module, params = make_module(network, dtype)
    schedule = Schedule.create()
    eps_fn = make_eps_fn(module.apply, schedule)
    shape = (module.sample_size, module.sample_size, module.in_channels)
    p_sample = pmap_sample_fn(make_sample_fn(eps_fn, DDPM.create(schedule, num_steps), shape))
    index = parallel.shard_batch(np.arange(num_images, dtype=np.int32))
    params, rng = parallel.replicate((params, jax.random.key(1)))

    def run() -> None:
        jax.block_until_ready(p_sample(params, rng, index))

    return run


def make_pipeline(folder: str, images: int, batch: int, steps: int) -> Callable:
    """Returns a function that draws images, in batches, from a pipeline that diffusers wrote: NumPy in [0, 1]."""
    module, params = import_diffusers(folder)
    schedule = Schedule.from_config(read_schedule_config(folder))
    shape = (module.sample_size, module.sample_size, module.in_channels)
    p_sample = pmap_sample_fn(make_sample_fn(make_eps_fn(module.apply, schedule), DDPM.create(schedule, steps), shape))
    return lambda: generate(p_sample, params, rng=jax.random.key(0), num_images=images, batch_size=batch)


def make_matmul(size: int, dtype: str = "float32") -> Callable:
    """Returns a function that multiplies two square matrices ten times, one after the other."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda a: a @ a)

    def run() -> None:
        for _ in range(10):
            result = multiply(a)
        jax.block_until_ready(result)

    return run
