"""Low-rank adapters beside full fine-tuning on the digits: one grid of rates on seed 100, then seeds 0, 1 and 2.

    python -m tests.benchmarks.adapters --workdir=runs/digits_tshirt --out=runs/adapters
    python -m tests.benchmarks.adapters --seconds          # processor time of a ReTrack step on one device, and what is trained

`--workdir` is a finished digits run, whose pretrained model is used. The rule for the rate, fixed before the first run, is that
of sweeps.py; it is applied to 500 samples at rank 4, and the other rank of the same layers takes the same rate.
"""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.digits_tshirt import get_config
from retrack_jax import parallel
from retrack_jax.cli.process import set_up_jax, set_up_logs
from retrack_jax.config.reading import read_config
from retrack_jax.diffusion.conversions import make_eps_fn
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.models.unet2d import UNet2D
from retrack_jax.train.lora import LoraOptions, init
from retrack_jax.train.state import create_state
from retrack_jax.train.step import Shared, StepOptions, make_train_step
from retrack_jax.unlearn.methods import get_method
from tests.benchmarks.sweeps import TUNING_SEED, Variant, best_rate, measured

RATES = (5e-4, 2e-3, 8e-3)
METHODS = ("retrack", "siss")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS = {"attention": ATTENTION, "attention and convolutions": (*ATTENTION, "conv1", "conv2")}
# name -> layers, rank; None: full fine-tuning by the config's own recipe
VARIANTS = {
    "attention, 4": ("attention", 4),
    "attention, 16": ("attention", 16),
    "all, 4": ("attention and convolutions", 4),
    "full": None,
}
METRICS = ("frequency", "fid", "forget_loss", "nll_bits_per_dim")


def changed(name: str, method: str, layers_and_rank, rate: float | None, **changes) -> Variant:
    """Returns the run of `method` with an adapter, or by the config's own recipe if there is none."""
    if layers_and_rank is not None:
        layers, rank = layers_and_rank
        adapter = {"adapter": "lora", "lora.rank": rank, "lora.layers": LAYERS[layers], "learning_rate": rate}
        changes |= {f"unlearn.{key}": value for key, value in adapter.items()}
    return Variant((method, name), method, {"eval.metrics": METRICS} | changes)


def seconds(rounds: int = 3, steps: int = 10) -> None:
    """Prints, for each way to train, the processor seconds of 50 steps: the least of `rounds`, which take turns."""
    options = read_config(get_config("retrack"))
    recipe, method = options.recipe("retrack"), get_method("retrack")
    unet, schedule = UNet2D.from_config(dataclasses.asdict(options.model)), Schedule.create()
    inputs = jnp.zeros((1, 8, 8, 1)), jnp.zeros((1,), jnp.int32)
    params = jax.jit(unet.init)(jax.random.key(0), *inputs)["params"]
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1), np.uint8)
    shared = Shared(
        schedule=schedule, forget={"pixels": pixels[:1]}, neighbors={"pixels": pixels[:10]}, neighbor_rows=np.arange(10)[None],
        reference=params,
    )  # fmt: skip
    size = recipe.batch_size
    batch = {"remain": {"pixels": pixels[None, :size]}, "forget_row": np.zeros((1, size), np.int32)}
    batch |= {name: np.arange(size, dtype=np.int32)[None] for name in ("remain_index", "forget_index")}
    ways = {}
    for name, variant in VARIANTS.items():
        lora = None if variant is None else LoraOptions(rank=variant[1], layers=LAYERS[variant[0]])
        how = StepOptions(options=method.options(), t_max=1000, lora=lora)
        start = init(lora, params, jax.random.key(0)) if lora else parallel.copy(params)
        state = parallel.replicate(create_state(start, recipe.optimizer()))
        ways[name] = make_train_step(method, make_eps_fn(unet.apply, schedule), how), state
    here, spent = parallel.replicate(shared), {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first round compiles
        for name, (step, state) in ways.items():
            began = time.process_time()
            for _ in range(steps):
                state, metrics = jax.block_until_ready(step(state, batch, here, jax.random.key(0)))
            spent[name].append((time.process_time() - began) * 50 / steps)
            ways[name] = step, state
    for name, (_, state) in ways.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        print(f"{name}: {count:,} trained, {min(spent[name][1:]):.1f} processor seconds for 50 steps")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir")
    parser.add_argument("--out")
    parser.add_argument("--seconds", action="store_true")
    options = parser.parse_args()
    if options.seconds:
        set_up_jax(1)
        seconds()
        return
    set_up_logs()
    set_up_jax(get_config().compute.cpu_devices)
    out, workdir = Path(options.out), Path(options.workdir)
    few = {"sampling.num_images": 500, "eval.metrics": ("frequency", "fid")}
    grid, chosen, results = {}, {}, {}
    for method, layers in itertools.product(METHODS, LAYERS):
        found = {}
        for rate in RATES:
            one = changed(f"{layers} {rate:g}", method, (layers, 4), rate, **few)
            (found[rate],) = measured(one, out / "grid" / one.folder, workdir, (TUNING_SEED,))
            grid[f"{method}, {layers}, {rate:g}"] = found[rate]
        chosen[method, layers] = best_rate(found)
    for (name, variant), method in itertools.product(VARIANTS.items(), METHODS):
        rate = None if variant is None else chosen[method, variant[0]]
        one = changed(name, method, variant, rate)
        results[f"{method}, {name}"] = {"rate": rate, "seeds": measured(one, out / one.folder, workdir, (0, 1, 2))}
    # Added once the rate that the rule chose for SISS was seen to damage the model: the lowest of the grid.
    one = changed("attention, 4, lowest rate", "siss", VARIANTS["attention, 4"], RATES[0])
    results["siss, attention, 4, lowest rate"] = {"rate": RATES[0], "seeds": measured(one, out / one.folder, workdir, (0, 1, 2))}
    (out / "adapters.json").write_text(json.dumps({"grid": grid, "results": results}, indent=2))


if __name__ == "__main__":
    main()
