"""Fewer operations for the same gradient, counted by the compiler: the shared forward pass, the single target, SISS's one pass.

    .venv-parity/bin/python -m tests.benchmarks.operations

FLOPs are XLA's own count of the compiled training step of the digits UNet (its convolutions are all direct): what 16 more
images per batch add to a step, so that the optimizer, which does not grow with them, is left out. Memory is
XLA's plan for the temporary buffers of the loss and its gradient in eps_pred, CelebA-HQ's shape: 16 images of 196,608
values, 10 neighbors.
"""

import jax
import jax.numpy as jnp

from retrack_jax.diffusion.conversions import expand
from retrack_jax.unlearn import losses
from tests.benchmarks.measure import Table, parser_of
from tests.benchmarks.ours import make_data, make_module, make_state, make_step


def step_flops(method: str, images: int) -> float:
    """Returns the FLOPs of one compiled step on `images` images per batch."""
    module, params = make_module("digits")
    batch, shared = make_data("digits", images, images)
    compiled = make_step(module, "digits", method).lower(make_state("digits", params), batch, shared, jax.random.key(1)).compile()
    return compiled.cost_analysis()["flops"]


def published_loss(eps_pred, x_t, neighbors, gamma, sigma):
    """ReTrack's loss as it is printed: K targets per image."""
    v = (x_t[:, None] - expand(gamma, neighbors) * neighbors) / expand(sigma, neighbors)
    p = jax.lax.stop_gradient(losses.retrack_posterior(x_t, neighbors, gamma, sigma))
    return jnp.sum(p * jnp.sum(jnp.square(eps_pred[:, None] - v), axis=(2, 3, 4)), axis=1)


def loss_memory(loss) -> int:
    """Returns the bytes of temporary buffers of the mean loss and its gradient."""
    image, vector = jax.ShapeDtypeStruct((16, 256, 256, 3), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.float32)
    neighbors = jax.ShapeDtypeStruct((16, 10, 256, 256, 3), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        step = jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays).mean()))
        return step.lower(image, image, neighbors, vector, vector).compile().memory_analysis().temp_size_in_bytes


def operations() -> dict:
    """Returns FLOPs by method, relative to a vanilla step on as many images, and the bytes of both forms of the loss."""
    methods = ("vanilla", "retrack", "siss", "siss_no_is")
    flops = {method: step_flops(method, 32) - step_flops(method, 16) for method in methods}
    memory = {"single_target": loss_memory(losses.retrack), "published": loss_memory(published_loss)}
    relative = {name: value / flops["vanilla"] for name, value in flops.items()}
    return {"flops": flops, "times_vanilla": relative, "loss_bytes": memory}


def table(found: dict) -> Table:
    """Returns the counts, printed."""
    shown = Table("speed_operations", "16 images of a step", "GFLOP", "times vanilla")
    for name, value in found["flops"].items():
        shown.add(name, f"{value / 1e9:.2f}", f"{found['times_vanilla'][name]:.2f}")
    one, all_ = (found["loss_bytes"][name] / 2**20 for name in ("single_target", "published"))
    print(f"Loss and gradient: {one:.0f} MiB of buffers with one target, {all_:.0f} MiB with K.")
    return shown


def main() -> None:
    results = parser_of(__doc__).parse_args().results
    table(operations()).write(results, "python -m tests.benchmarks.operations")


if __name__ == "__main__":
    main()
