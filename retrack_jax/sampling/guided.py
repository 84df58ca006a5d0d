"""Sampling with more than a UNet: guided by a prompt or a label, in latent space and decoded to images.

    (1) eps = eps(x_t, t, negative) + w (eps(x_t, t, prompt) - eps(x_t, t, negative)),  w the guidance scale
    (2) w <= 1: eps = eps(x_t, t, prompt), as in diffusers, with one call of the network instead of two
    (3) image = decode(x_0), one image at a time, because decoding 16 of 512 x 512 together takes tens of GB

Equation (1) is the same for v or x_0 in place of eps, because both are linear in eps at a fixed x_t.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retrack_jax.checks import check_number
from retrack_jax.notation import Array, EpsFn, ModelEpsFn, PyTree, Rng
from retrack_jax.sampling.generate import SampleFn
from retrack_jax.sampling.loop import Sampler, initial_noise, sample


class GuidedParams(NamedTuple):
    """The parameters of both networks and both conditions: embeddings of prompts, leaves `[P, ...]`, or labels, int32 `[P]`.

    Image i is under condition i mod P. Without a VAE `vae` is None, without guidance `negative` may be, and `prompt` is for an
    unconditional network.
    """

    unet: PyTree
    vae: PyTree | None
    prompt: PyTree
    negative: PyTree

    def of_images(self, index: Array) -> "GuidedParams":
        """Returns the same with the conditions of the images `index` `[B]`; one condition stays as it is and broadcasts."""
        prompt = jax.tree.map(lambda leaf: leaf if leaf.shape[0] == 1 else leaf[index % leaf.shape[0]], self.prompt)
        return self._replace(prompt=prompt)


def guided_eps_fn(eps_fn: ModelEpsFn, params: PyTree, prompt: PyTree, negative: PyTree, guidance: float) -> EpsFn:
    """Returns `eps_fn(x_t [B, ...], t [B])` with classifier-free guidance, equations (1) and (2).

    Args:
      eps_fn: `eps_fn(params, x_t, t, condition) -> eps`, as from `make_eps_fn`.
      params: the network's.
      prompt, negative: conditions, leaves `[1, ...]` for all images or `[B, ...]`, one per image. No prompt: the network takes
        none.
      guidance: the scale w.
    """
    check_number("the guidance scale", guidance, 0.0)
    if prompt is None or guidance <= 1:
        condition = () if prompt is None else (prompt,)
        return lambda x_t, t: eps_fn(params, x_t, t, *condition)

    def guided(x_t: Array, t: Array) -> Array:
        def of_all(one: Array) -> Array:
            return jnp.broadcast_to(one, (x_t.shape[0], *one.shape[1:]))

        both = jax.tree.map(lambda *parts: jnp.concatenate([of_all(part) for part in parts]), negative, prompt)
        eps = eps_fn(params, jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        eps_negative, eps_prompt = jnp.split(eps, 2)
        guided_eps = eps_negative + guidance * (eps_prompt - eps_negative)
        if guided_eps.shape == x_t.shape:
            return guided_eps
        channels = x_t.shape[-1]  # what a network says of the variance is not guided
        return jnp.concatenate([guided_eps[..., :channels], eps_prompt[..., channels:]], axis=-1)

    return guided


def make_guided_sample_fn(
    eps_fn: ModelEpsFn,
    decode_fn: Callable[[PyTree, Array], Array] | None,
    sampler: Sampler,
    latent_shape: tuple[int, int, int],
    *,
    guidance: float,
) -> SampleFn:
    """Returns `sample_fn(GuidedParams, rngs [B]) -> images [B, H, W, 3]`, about [-1, 1], for `pmap_sample_fn` and `generate`.

    Args:
      eps_fn, guidance: as in `guided_eps_fn`.
      decode_fn: `decode_fn(vae params, latents [B, h, w, C]) -> images [B, H, W, 3]`; None: what is denoised are the images.
      sampler: from `make_sampler`.
      latent_shape: (h, w, C).
    """

    def sample_fn(params: GuidedParams, rngs: Rng) -> Array:
        guided = guided_eps_fn(eps_fn, params.unet, params.prompt, params.negative, guidance)
        x_0 = sample(guided, initial_noise(rngs, latent_shape), rngs, sampler)
        if decode_fn is None:
            return x_0
        return jax.lax.map(lambda one: decode_fn(params.vae, one[None])[0], x_0)

    return sample_fn
