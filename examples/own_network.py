"""Forget an image with a network of your own, in Python. No files, about half a minute on two CPU cores.

    python examples/own_network.py

Three models of scikit-learn's handwritten digits: one that was also trained on copies of a T-shirt, the same one after ReTrack,
and one that never saw the T-shirt, which unlearning should come close to.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.api import unlearn
from retrack_jax.data.sources.load import load_images
from retrack_jax.diffusion import Schedule

SHAPE = (8, 8, 1)
schedule = Schedule()  # DDPM's: linear betas, 1000 timesteps, the network predicts the noise


class Denoiser(nn.Module):
    """Any module will do that takes `(x_t [B, ...], t int32 [B])` and returns an array like x_t."""

    width: int = 512

    @nn.compact
    def __call__(self, x_t, t):
        frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(1e4), 32)) / 1e4
        angles = t[:, None].astype(jnp.float32) * frequencies[None]
        time = nn.Dense(self.width)(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1))
        hidden = nn.Dense(self.width)(x_t.reshape(len(x_t), -1))
        for _ in range(3):
            hidden = hidden + nn.Dense(self.width)(nn.silu(nn.LayerNorm()(hidden + time)))
        return nn.Dense(x_t[0].size)(hidden).reshape(x_t.shape)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns 1,797 digits and one T-shirt, uint8 `[N, 8, 8, 1]`."""
    data = load_images({"source": "digits_tshirt", "copies": 1})
    is_shirt = data.labels == 10
    return data.images[~is_shirt], data.images[is_shirt]


def train(module: nn.Module, images: np.ndarray, num_steps: int, seed: int = 0):
    """Returns parameters after training from random weights: "vanilla" is the ordinary denoising loss on `remain`."""
    params = module.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)), jnp.zeros((1,), jnp.int32))["params"]
    return unlearn(
        module.apply, params, schedule, remain=images, forget=images[:1], method="vanilla", rng=jax.random.key(seed + 1),
        num_steps=num_steps, batch_size=128, learning_rate=1e-3, learning_rate_schedule="cosine",
    )  # fmt: skip


def loss(module: nn.Module, params, images: np.ndarray, num_draws: int = 2048) -> float:
    """Returns the denoising loss on images `[N, 8, 8, 1]`: a sum over pixels, a mean over draws of image, timestep and noise."""
    rng_t, rng_eps = jax.random.split(jax.random.key(0))
    x_0 = 2 * np.resize(images, (num_draws, *SHAPE)).astype(np.float32) / 255 - 1
    t = jax.random.randint(rng_t, (num_draws,), 0, schedule.num_train_timesteps)
    eps = jax.random.normal(rng_eps, (num_draws, *SHAPE))
    gamma, sigma = schedule.gamma[t][:, None, None, None], schedule.sigma[t][:, None, None, None]
    x_t = gamma * x_0 + sigma * eps
    return float(jnp.square(module.apply({"params": params}, x_t, t) - eps).sum((1, 2, 3)).mean())


def main(num_steps: int = 1500) -> dict[str, float]:
    remain, forget = digits()
    module = Denoiser()
    memorized = train(module, np.concatenate([remain, np.repeat(forget, 95, axis=0)]), num_steps)
    forgotten = unlearn(
        module.apply, memorized, schedule, remain, forget, method="retrack", rng=jax.random.key(2),
        num_steps=50, batch_size=64, learning_rate=3e-4, lam=0.03, snr_cap=5.0,
    )  # fmt: skip
    retrained = train(module, remain, num_steps)
    losses = {}
    for name, params in (("memorized", memorized), ("after ReTrack", forgotten), ("never saw it", retrained)):
        losses[name] = loss(module, params, forget)
        print(f"{name:14}  loss on the T-shirt {losses[name]:6.2f}   on digits {loss(module, params, remain):5.2f}")
    return losses


if __name__ == "__main__":
    main()
