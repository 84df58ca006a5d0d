"""Small things that many tests share: a schedule, a network of a few hundred parameters, random images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.parallel import example_rngs
from retrack_jax.unlearn.streams import Stream

SHAPE = (4, 4, 1)


class ToyNet(nn.Module):
    """A network that depends on the image and on t, and compiles at once."""

    width: int = 16
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, t, deterministic=True):
        flat = x.reshape(x.shape[0], -1)
        phase = t.astype(jnp.float32) / 100.0
        time = jnp.stack([jnp.sin(phase), jnp.cos(phase)], axis=1)
        hidden = nn.silu(nn.Dense(self.width)(jnp.concatenate([flat, time], axis=1)))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=deterministic)
        return nn.Dense(flat.shape[1])(hidden).reshape(x.shape)


def schedule() -> Schedule:
    """The linear schedule of DDPM."""
    return Schedule.from_config({"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})


def params(seed=0):
    return ToyNet().init(jax.random.key(seed), jnp.zeros((1, *SHAPE)), jnp.zeros((1,), jnp.int32))["params"]


class Interrupted:
    """A parameter `[4]` at which the user presses Ctrl-C, or the machine is taken away."""

    dtype, ndim, shape = np.dtype(np.float32), 1, (4,)

    def __array__(self, *_, **__):
        raise KeyboardInterrupt


def images(count, seed=0):
    """uint8 images."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def streams(rng, size=8):
    """Streams of remaining images, and of forgotten ones with three neighbors each."""

    def stream(seed):
        rngs = example_rngs(jax.random.fold_in(rng, seed), jnp.arange(size))
        return Stream(jnp.asarray(pixels_to_model(images(size, seed))), rngs)

    neighbors = jnp.asarray(pixels_to_model(images(size * 3, 2))).reshape(size, 3, *SHAPE)
    return stream(0), stream(1).replace(neighbors=neighbors)


def streams_of(method, rng):
    """Returns both streams, with None for one that `method` does not ask for."""
    both = zip(("remain", "forget"), streams(rng), strict=True)
    return [stream if kind in method.streams else None for kind, stream in both]


def relative(a, b):
    """Returns ||a - b|| / ||b|| over whole trees."""
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64) for tree in (a, b)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
