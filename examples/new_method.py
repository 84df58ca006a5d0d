"""Add a method of unlearning: one function, one record of options, one entry in the table.

    python examples/new_method.py

"Relabel" teaches the network, at noisy versions of a forgotten image, the noise that leads to a *random* remaining image: ReTrack
without neighbors. Devices, accumulation, clipping, resuming and evaluation work for it as for every other method, and the
command takes it as `--config=mine.py:relabel` if mine.py, a copy of `configs/digits_tshirt.py` beside this file, imports it.
"""

from dataclasses import dataclass

import jax
import numpy as np

from retrack_jax.api import unlearn
from retrack_jax.diffusion.conversions import expand
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.methods import METHODS, Method, Terms
from retrack_jax.unlearn.options import MethodOptions


@dataclass(frozen=True, kw_only=True)
class RelabelOptions(MethodOptions):
    weight: float = 0.01


def relabel(context, remain, forget):
    """weight ||eps_pred(x_t) - (x_t - gamma a)/sigma||^2 + L_R: x_t noised from a forgotten image, a a random remaining one."""
    points_remain, points_forget = context.noise(remain), context.noise(forget)
    eps_remain, eps_forget = context.predict(points_remain, points_forget)
    x_t, gamma, sigma = points_forget.x_t, expand(points_forget.gamma, remain.x_0), expand(points_forget.sigma, remain.x_0)
    unlearn_term = losses.vanilla(eps_forget, (x_t - gamma * remain.x_0) / sigma).mean()
    retain = context.retain_loss(eps_remain, points_remain).mean()
    return Terms(main=context.options.weight * unlearn_term + retain, logs={"unlearn": unlearn_term, "retain": retain})


METHODS["relabel"] = Method(streams=frozenset({"remain", "forget"}), terms=relabel, options=RelabelOptions, paired=True)


def main(num_steps: int = 1500) -> dict[str, float]:
    from own_network import Denoiser, digits, loss, schedule, train  # here: the command imports this module for its method alone

    remain, forget = digits()
    module = Denoiser()
    params = train(module, np.concatenate([remain, np.repeat(forget, 95, axis=0)]), num_steps)
    after = unlearn(
        module.apply, params, schedule, remain, forget, method="relabel", weight=0.02, rng=jax.random.key(2),
        num_steps=50, batch_size=64, learning_rate=3e-4,
    )  # fmt: skip
    results = {"before": loss(module, params, forget), "after": loss(module, after, forget)}
    print(f"loss on the T-shirt: {results['before']:.2f} before, {results['after']:.2f} after")
    return results


if __name__ == "__main__":
    main()
