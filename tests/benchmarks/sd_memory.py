"""Networks of latents at full size: the memory of one forward pass, and of a training step as the compiler plans it.

    python -m tests.benchmarks.sd_memory forward           # initialises 860 M parameters and runs the UNet once, on the CPU
    python -m tests.benchmarks.sd_memory residuals         # what the backward pass keeps, with and without remat; seconds
    python -m tests.benchmarks.sd_memory residuals_xl      # the same of Stable Diffusion XL's adapter, bfloat16 and remat
    python -m tests.benchmarks.sd_memory step [METHOD] [OPTION ...] [--network=sd14] [--tpu=v6e:2x2]   # compiles; runs nothing
    python -m tests.benchmarks.sd_memory arguments         # what a step holds from step to step, trained whole and by an adapter

They are of Stable Diffusion v1.4 but where it says otherwise; `--network` is one of sd14, xl, sd3 (3-medium) and dit_xl (DiT-XL/2
of 256 pixels). `forward` reports the peak resident memory of the process. `residuals` adds up what lives from the forward to the
backward pass for the two latents of a microbatch; it is the same on every backend. `step` reports XLA's buffer assignment for
this backend: arguments (state and batch), temporaries (gradients and activations), and what of the arguments is updated in place;
with `--tpu` for one chip of a TPU, which need not be there (memory.py says what to install). OPTION: float32, bfloat16, remat,
bfloat16+remat; all four where none is named; and any of them with +lora for an adapter of rank 4 to the attention's projections.
"""

import contextlib
import io
import math
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import ad_checkpoint

from retrack_jax.checkpoints.diffusers_import import example_inputs
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.models.dit import DiT
from retrack_jax.models.mmdit import MMDiT
from retrack_jax.models.unet2d_condition import UNet2DCondition
from retrack_jax.train.lora import LoraOptions, adapted, init, merge
from retrack_jax.train.optimizer import make_optimizer
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import get_method
from tests.benchmarks.measure import peak_resident_bytes
from tests.benchmarks.memory import plan_for, too_large
from tests.models.test_text_to_image_networks import SD14_UNET, XL_UNET

GB = 1e9
MOST_GB = 10  # what one forward pass may take
LATENT, PROMPT = (64, 64, 4), (1, 77, 768)
OPTIONS = ("remat", "bfloat16+remat", "float32", "bfloat16")
LORA = LoraOptions()
DIT_XL = {
    "sample_size": 32, "patch_size": 2, "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4,
    "out_channels": 8, "num_embeds_ada_norm": 1000,
}  # fmt: skip
SD3_MEDIUM = {
    "sample_size": 128, "in_channels": 16, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}  # fmt: skip
# Name -> family, config, tokens of a prompt, and images of a microbatch in each stream.
NETWORKS = {
    "sd14": (UNet2DCondition, SD14_UNET, 77, 1), "xl": (UNet2DCondition, XL_UNET, 77, 1), "dit_xl": (DiT, DIT_XL, 0, 8),
    "sd3": (MMDiT, SD3_MEDIUM, 77 + 256, 1),
}  # fmt: skip


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def forward() -> None:
    """Runs the UNet once on one latent."""
    unet = UNet2DCondition.from_config(SD14_UNET)
    x, t, prompt = jnp.ones((1, *LATENT)), jnp.array([500], jnp.int32), jnp.ones(PROMPT)
    shapes = jax.eval_shape(unet.init, jax.random.key(0), x, t, prompt)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    began = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # Leaf by leaf: one compiled `init` would hold every draw at once.
    params = tree.unflatten([0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / GB
    print(f"parameters: {sum(leaf.size for leaf in leaves):,} = {size:.2f} GB, made in {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    y = jax.jit(unet.apply)({"params": params}, x, t, prompt).block_until_ready()
    print(
        f"forward with compilation: {time.perf_counter() - began:.0f} s; output {y.shape}, finite {bool(jnp.isfinite(y).all())}"
    )
    peak = peak_resident_bytes() / GB
    print(f"peak resident memory: {peak:.2f} GB")
    if peak > MOST_GB:
        raise SystemExit(f"more than {MOST_GB} GB")


def residuals(remat: bool, lora: bool, config: dict = SD14_UNET, dtype=jnp.float32) -> None:
    """Adds up the arrays that the gradient keeps from the forward pass, arguments left out; of an adapter, merged kernels too."""
    unet = UNet2DCondition.from_config(config, remat=remat, dtype=dtype)
    side = unet.sample_size
    shapes = jax.tree.map(lambda leaf: (1, 77, leaf.shape[2]) if leaf.ndim == 3 else leaf.shape, unet.smallest_condition)
    condition = jax.tree.map(jnp.ones, shapes, is_leaf=_is_shape)
    inputs = jnp.ones((2, side, side, 4)), jnp.array([500, 3], jnp.int32), condition
    params = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]

    def listed(base):
        def loss(trained, *inputs):
            network = merge(LORA, base, trained) if lora else trained
            return jnp.square(unet.apply({"params": network}, *inputs)).sum()

        trained = jax.eval_shape(lambda: init(LORA, params, jax.random.key(0))) if lora else params
        ad_checkpoint.print_saved_residuals(loss, trained, *inputs)

    listing = io.StringIO()
    with contextlib.redirect_stdout(listing):
        jax.eval_shape(listed, params)
    total = 0
    for line in listing.getvalue().splitlines():
        if found := re.match(r"([a-z]+)(\d+)\[([\d,]*)\] (?!from )", line):
            total += int(found[2]) // 8 * math.prod(int(side) for side in found[3].split(",") if side)
    print(f"remat {remat}, lora {lora}: {total / GB:.2f} GB kept for the backward pass of two latents")


def trained_state(option: str, params, optimizer):
    """Returns the shapes of a training state: of the whole network, or of an adapter to it."""
    if "lora" not in option:
        return jax.eval_shape(lambda params: create_state(params, optimizer), params)
    return jax.eval_shape(lambda params: create_state(init(LORA, params, jax.random.key(0)), optimizer), params)


def arguments() -> None:
    """Adds up parameters and optimizer of a step, and the frozen base of an adapter; compiles nothing."""
    inputs = jnp.ones((1, *LATENT)), jnp.array([500], jnp.int32), jnp.ones(PROMPT)
    params = jax.eval_shape(UNet2DCondition.from_config(SD14_UNET).init, jax.random.key(0), *inputs)["params"]
    optimizer = make_optimizer(learning_rate=1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip_norm=1.0)

    def size(tree) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    whole, adapter = (size(trained_state(option, params, optimizer)) for option in ("", "lora"))
    base, layers = size(params), adapted(LORA, params)
    flat = traverse_util.flatten_dict(params)
    merged = size([flat[*path, "kernel"] for path in layers.values()])
    print(f"full: {whole / GB:.2f} GB, with distillation {(whole + base) / GB:.2f} GB, a finished checkpoint {base / GB:.2f} GB")
    print(f"adapter of rank {LORA.rank}: {(adapter + base) / GB:.2f} GB with distillation or without; A and B with their moments")
    print(f"are {adapter / GB:.4f} GB of that; the merged kernels of its {len(layers)} layers have {merged / GB:.2f} GB")


def step(name: str, method_name: str, option: str) -> None:
    """Compiles a training step of 16 microbatches."""
    own = {"dtype": jnp.bfloat16 if "bfloat16" in option else jnp.float32, "remat": "remat" in option}
    family, config, tokens, size = NETWORKS[name]
    module, side = family.from_config(config, **own), config["sample_size"]
    latent = side, side, config.get("in_channels", 4)
    schedule = Schedule.create(class_name="PNDMScheduler", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    inputs = example_inputs(module)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    optimizer = make_optimizer(learning_rate=1e-5, b1=0.9, b2=0.999, eps=1e-8, weight_decay=1e-2, clip_norm=1.0)
    state = trained_state(option, params, optimizer)
    method, accumulation = get_method(method_name), 16
    count = accumulation * size

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def examples(*lead: int, **latents) -> dict:
        """Latents with a condition each, as batches and `Shared` hold them."""
        sides = jax.tree.map(lambda leaf: (tokens, leaf.shape[2]) if leaf.ndim == 3 else leaf.shape[1:], inputs[2])
        leaves = jax.tree.map(lambda side, leaf: array(*lead, *side, dtype=leaf.dtype), sides, inputs[2], is_leaf=_is_shape)
        return {**latents, "condition": leaves}

    batch = {}
    if "remain" in method.streams:
        batch["remain"] = examples(1, count, mean=array(1, count, *latent), std=array(1, count, *latent))
        batch["remain_index"] = array(1, count, dtype=jnp.int32)
    if "forget" in method.streams:
        batch |= {row: array(1, count, dtype=jnp.int32) for row in ("forget_row", "forget_index")}
    shared = Shared(schedule=schedule, reference=params if "lora" in option else None)
    if "neighbors" in method.streams:
        shared = shared.replace(
            forget=examples(50, x_0=array(50, *latent)),
            neighbors={"x_0": array(200, *latent)},
            neighbor_rows=array(50, 10, dtype=jnp.int32),
        )
    elif "forget" in method.streams:
        shared = shared.replace(forget=examples(50, mean=array(50, *latent), std=array(50, *latent)))
    lora = LORA if "lora" in option else None
    how = StepOptions(options=method.options(), accumulation=accumulation, t_max=1000, lora=lora)
    p_step = make_train_step(method, make_eps_fn(module.apply, schedule), how)
    began = time.perf_counter()
    lowered = p_step.lower(state, batch, shared, jax.eval_shape(lambda: jax.random.key(0)))
    try:
        plan = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not (used := too_large(error)):
            raise
        print(f"{name}, {method_name}, {option}: does not fit: {used}", flush=True)
        return
    arguments, temporaries = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    total = arguments + temporaries + plan.output_size_in_bytes - plan.alias_size_in_bytes
    print(
        f"{name}, {method_name}, {option}: arguments {arguments / GB:.2f} GB, temporaries {temporaries / GB:.2f} GB, "
        f"total {total / GB:.2f} GB (compiled in {time.perf_counter() - began:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["forward"]:
        forward()
    elif sys.argv[1:2] == ["residuals"]:
        for remat in (True, False):
            for lora in (False, True):
                residuals(remat, lora)
    elif sys.argv[1:2] == ["residuals_xl"]:
        residuals(True, True, XL_UNET, jnp.bfloat16)
    elif sys.argv[1:2] == ["arguments"]:
        arguments()
    elif sys.argv[1:2] == ["step"]:
        flags = dict(word.removeprefix("--").split("=") for word in sys.argv[2:] if word.startswith("--"))
        if unknown := set(flags) - {"network", "tpu"}:
            sys.exit(f"unknown: {', '.join(sorted(unknown))}\n{__doc__}")
        if "tpu" in flags:
            plan_for(flags["tpu"])
        words = [word for word in sys.argv[2:] if not word.startswith("--")]
        named = [word for word in words if word.removesuffix("+lora") in OPTIONS]
        chosen = next((word for word in words if word not in named), "retrack")
        for each in named or OPTIONS:
            step(flags.get("network", "sd14"), chosen, each)
    else:
        sys.exit(__doc__)
