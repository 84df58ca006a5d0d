"""Samples of a problem: unconditional images, images under labels, or images of each of a target's prompts, as pixels."""

import json
from collections.abc import Callable
from functools import cached_property, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from retrack_jax import files
from retrack_jax.config.options import Options
from retrack_jax.data.dataset import unit_to_pixels
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.models.vae import Autoencoder
from retrack_jax.notation import ModelEpsFn, PyTree
from retrack_jax.problem.codec import LatentCodec, PixelCodec, decode_fn
from retrack_jax.problem.conditioning import Conditioning
from retrack_jax.problem.denoiser import Denoiser
from retrack_jax.problem.target import Target
from retrack_jax.sampling import SAMPLERS
from retrack_jax.sampling.generate import generate, pmap_sample_fn
from retrack_jax.sampling.guided import GuidedParams, make_guided_sample_fn
from retrack_jax.train.run_store import tree_digest

_VERSION = 1  # to be raised when the same settings come to give other samples


class ProblemSampler:
    """Draws samples, with one program for every target and every model.

    Raises:
      UserError: a number of steps that the sampler cannot make; not every sampler takes every number.
    """

    def __init__(self, options: Options, denoiser: Denoiser, codec: PixelCodec | LatentCodec, conditioning: Conditioning):
        self._options, self._denoiser, self._conditioning = options.sampling, denoiser, conditioning
        self._vae_params = getattr(codec, "params", None)
        self._param_dtype = jnp.dtype(options.compute.param_dtype)
        prompts = denoiser.condition and not denoiser.takes_labels
        self._p_sample = _p_sample(
            denoiser.sampled_by(options.sampling.sampler),
            SAMPLERS[options.sampling.sampler],
            options.sampling.num_steps,
            json.dumps(denoiser.schedule.to_config()),
            denoiser.shape,
            getattr(codec, "vae", None),
            options.sampling.guidance_scale if prompts else options.sampling.label_guidance,
            "float32" if options.save_float else "uint8",
        )
        self._settings = [
            _VERSION, options.sampling.binding, options.save_float, options.compute.dtype, options.compute.param_dtype,
            denoiser.shape, denoiser.module.to_config(), denoiser.schedule.to_config(), codec.digests, conditioning.digests,
        ]  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """Of all that samples depend on besides a target's conditions, their numbers and trained parameters."""
        return files.json_digest([*self._settings, self._denoiser.digests, tree_digest(self._conditioning.null)])

    def depends_on(self, target: Target, fingerprint: str) -> dict[str, list[str]]:
        """Returns name in `samples.npz` -> what they depend on besides their number; `fingerprint` is of the parameters."""
        conditioning = self._conditioning
        return {name: [fingerprint, self.digest, conditioning.describe(name, target)] for name in conditioning.sampled(target)}

    def total(self, target: Target) -> int:
        """Returns how many images `sample` draws."""
        return self._options.num_images * len(self._conditioning.sampled(target))

    def sample(
        self, target: Target, params: PyTree, *, out_dir, fingerprint: str, progress: Callable[[int, int], None], first: int = 0
    ) -> dict[str, np.ndarray]:
        """Returns arrays of `samples.npz`: uint8 `[N, H, W, C]` by name, and with `config.save_float` NAME_float in [0, 1];
        of a network that takes labels also `labels`, int32 `[N]`.

        Args:
          target: whose conditions are drawn.
          params: the network's, replicated; they are used up if they are to be halved.
          out_dir: where finished parts are kept, so that a run that was stopped continues.
          fingerprint: of the parameters; parts of other parameters or settings are ignored.
          progress: called with (images done, in all) after every batch; what it raises ends sampling.
          first: images before this one, of each condition, are there already; N is `config.sampling.num_images` less these.
        """
        params = _converted(params, self._param_dtype)
        options, arrays = self._options, {}
        count = options.num_images - first
        total = count * len(self._conditioning.sampled(target))
        depends_on = self.depends_on(target, fingerprint)
        for number, (name, condition) in enumerate(self._conditioning.sampled(target).items()):
            images = generate(
                self._p_sample,
                GuidedParams(params, self._vae_params, condition, self._conditioning.null),
                rng=jax.random.key(options.seed),
                num_images=count,
                first=first,
                batch_size=options.batch_size,
                out_dir=epath.Path(out_dir) / name,
                fingerprint=files.json_digest(depends_on[name]),
                progress=lambda done, _, number=number: progress(number * count + done, total),
            )
            arrays |= {name: images} if images.dtype == np.uint8 else {name: unit_to_pixels(images), f"{name}_float": images}
            if self._denoiser.takes_labels:
                arrays["labels"] = condition[np.arange(first, first + count) % len(condition)]
        return arrays


@lru_cache(maxsize=8)
def _p_sample(
    eps_fn: ModelEpsFn,
    sampler_class: type,
    num_steps: int,
    schedule: str,
    shape: tuple[int, int, int],
    vae: Autoencoder | None,
    guidance: float,
    output: str,
) -> Callable:
    """Returns the compiled sampler of `generate`; problems with the same arguments share one."""
    sampler = sampler_class.create(Schedule.from_config(json.loads(schedule)), num_steps)
    decode = None if vae is None else decode_fn(vae)
    guided = make_guided_sample_fn(eps_fn, decode, sampler, shape, guidance=guidance)
    return pmap_sample_fn(guided, output=output, of_images=GuidedParams.of_images)


def _converted(params: PyTree, dtype) -> PyTree:
    """Returns `params` in `dtype`. Each leaf is deleted once it is converted: both copies together would save nothing."""

    def convert(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == dtype:
            return leaf
        converted = jax.block_until_ready(leaf.astype(dtype))
        leaf.delete()
        return converted

    return jax.tree.map(convert, params)
