"""What a method is given at each step: clean images with a key each, and how to noise and predict them.

A `Stream` holds a batch of clean images; every example has its own key, made from its global index in the batch, so that the
draws are the same on one device and on four. A `Context` turns streams into noisy points and predictions; its forward pass is
fused.
"""

from collections.abc import Callable
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from retrack_jax.diffusion import edm
from retrack_jax.diffusion.conversions import add_noise
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.notation import Array, PyTree, Rng
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.options import MethodOptions

# Each draw of an example has its own fold, so that adding a draw never changes another. Clean latents are drawn in train/step.py.
_TIME, _NOISE, _MASK, _UNIFORM, POSTERIOR, _DROPOUT, CONDITION = range(7)


@flax.struct.dataclass
class Anchor:
    """Where the pretrained prediction takes the place of the neighbors (equation 10 of losses.py).

    Attributes:
      condition: leaves `[B, ...]`, what that prediction is made under.
      used: bool `[B]`, for which examples.
    """

    condition: PyTree
    used: Array


@flax.struct.dataclass
class Stream:
    """A batch of clean images.

    Attributes:
      x_0: `[B, H, W, C]` float32, in the space that the network denoises.
      rngs: `[B]` keys, one per example.
      neighbors: `[B, K, H, W, C]` for the forget stream of methods that ask for it, else None.
      condition: int32 `[B]`, each example's row of the table of conditions, or the conditions themselves, leaves `[B, ...]`;
        None for an unconditional network.
      neighbor_bias: `[B, K]`, b_k of equation 9 of losses.py, or None.
      anchor: for which examples there is one, or None.
    """

    x_0: Array
    rngs: Rng
    neighbors: Array | None = None
    condition: PyTree = None
    neighbor_bias: Array | None = None
    anchor: Anchor | None = None

    def bernoulli(self, probability: float | Array) -> Array:
        """Returns bool `[B]`, true with `probability`."""
        return jax.vmap(lambda rng: jax.random.bernoulli(jax.random.fold_in(rng, _MASK), probability))(self.rngs)

    def uniform(self) -> Array:
        """Returns draws from U[0, 1) of the images' shape."""
        shape = self.x_0.shape[1:]
        return jax.vmap(lambda rng: jax.random.uniform(jax.random.fold_in(rng, _UNIFORM), shape))(self.rngs)


@flax.struct.dataclass
class Noised:
    """Noisy points `x_t = gamma x_0 + sigma eps`: images `[B, H, W, C]`, the rest `[B]`.

    `target` is what the network is to predict: eps, or for a flow the velocity eps - x_0; `c` is as in equation 11 of losses.py.
    `rngs` are for dropout masks; `condition` is the stream's. `weight` makes a loss in eps one in the network's own space, where
    these differ; None: 1.
    """

    x_t: Array
    t: Array
    eps: Array
    target: Array
    gamma: Array
    sigma: Array
    c: Array
    rngs: Rng
    condition: PyTree = None
    weight: Array | None = None

    def weighted(self, loss: Array) -> Array:
        """Returns `loss` `[B]` times `weight`."""
        return loss if self.weight is None else self.weight * loss


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may use besides its streams.

    Attributes:
      eps_fn: `(x_t, t, condition, rngs) -> eps_pred`, the parameters being trained closed over.
      reference_fn: `(x_t, t, condition) -> eps_pred` with the frozen pretrained parameters, or None.
      distill: whether the retain loss is the distance to `reference_fn`.
      options: the method's own options (numbers, or traced scalars if they follow a schedule).
      t_min, t_max: timesteps are drawn from [t_min, t_max), uniformly unless `logit_normal` or `log_normal` says otherwise.
      logit_normal: (m, s): the place in that range is sigmoid(m + s z), with z standard normal, as flows are often trained.
      log_normal: (m, s), on EDM's schedule alone: log(sigma) is m + s z within that range. None: on EDM's schedule that of its
        paper, unless there is a `logit_normal`; (): uniformly.
    """

    schedule: Schedule
    eps_fn: Callable[[Array, Array, PyTree, Rng], Array]
    options: MethodOptions = MethodOptions()
    reference_fn: Callable[[Array, Array, PyTree], Array] | None = None
    distill: bool = False
    t_min: int = 0
    t_max: int
    logit_normal: tuple[float, float] | None = None
    log_normal: tuple[float, float] | None = None

    def noise(self, stream: Stream) -> Noised:
        """Draws t and eps for each example of `stream` and noises its images."""
        x_0 = stream.x_0

        def draw(rng):
            t = self._draw_t(jax.random.fold_in(rng, _TIME))
            eps = jax.random.normal(jax.random.fold_in(rng, _NOISE), x_0.shape[1:])
            return t, eps, jax.random.fold_in(rng, _DROPOUT)

        t, eps, rngs = jax.vmap(draw)(stream.rngs)
        gamma, sigma = self.schedule.gamma[t], self.schedule.sigma[t]
        return Noised(
            x_t=add_noise(x_0, eps, gamma, sigma),
            t=t,
            eps=eps,
            target=self.schedule.target(x_0, eps),
            gamma=gamma,
            sigma=sigma,
            c=self.schedule.clean_weight(gamma),
            rngs=rngs,
            condition=stream.condition,
            weight=self.schedule.loss_weight(sigma),
        )

    def _draw_t(self, rng: Rng) -> Array:
        if self.schedule.is_edm and not self.logit_normal and self.log_normal != ():
            window = self.schedule.sigma[self.t_min : self.t_max]
            return self.t_min + edm.draw_row(rng, window, self.log_normal or edm.LOG_NORMAL)
        if not self.logit_normal:
            return jax.random.randint(rng, (), self.t_min, self.t_max)
        mean, std = self.logit_normal
        place = jax.nn.sigmoid(mean + std * jax.random.normal(rng))
        return jnp.minimum(self.t_min + jnp.floor(place * (self.t_max - self.t_min)).astype(jnp.int32), self.t_max - 1)

    def predict(self, *noised: Noised) -> tuple[Array, ...]:
        """Returns the prediction at each batch of noisy points, from one forward pass over all of them."""
        points = [(n.x_t, n.t, n.condition, n.rngs) for n in noised]
        if len(points) == 1:
            return (self.eps_fn(*points[0]),)
        eps_pred = self.eps_fn(*jax.tree.map(lambda *parts: jnp.concatenate(parts), *points))
        sizes = [n.x_t.shape[0] for n in noised]
        return tuple(jnp.split(eps_pred, [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]))

    def retain_loss(self, eps_pred: Array, noised: Noised) -> Array:
        """Returns `[B]`: the vanilla loss, or the distance to the frozen pretrained prediction when distilling."""
        if not self.distill:
            return noised.weighted(losses.vanilla(eps_pred, noised.target))
        return self.distance_to_reference(eps_pred, noised, noised.condition)

    def distance_to_reference(self, eps_pred: Array, noised: Noised, condition: PyTree) -> Array:
        """Returns `[B]`: the squared distance to the frozen pretrained prediction at the same points under `condition`."""
        reference = jax.lax.stop_gradient(self.reference_fn(noised.x_t, noised.t, condition))
        return noised.weighted(losses.vanilla(eps_pred, reference))
