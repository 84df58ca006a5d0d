"""Pictures of a concept's two prompts, drawn by guided sampling and decoded by the VAE."""

from collections.abc import Callable
from functools import cached_property

import jax
import numpy as np
from etils import epath

from retrack_jax import files
from retrack_jax.checkpoints.stable_diffusion import Pipeline, prompt_embeddings
from retrack_jax.data.dataset import unit_to_pixels
from retrack_jax.data.sources.prompts import PromptPair
from retrack_jax.notation import PyTree
from retrack_jax.sampling import make_sampler
from retrack_jax.sampling.generate import generate, pmap_sample_fn
from retrack_jax.sampling.guided import GuidedParams, make_guided_sample_fn


class PromptSampler:
    """Draws pictures, with one program for every concept and every model.

    Args:
      pipeline: the model's parts; the UNet's parameters are given to `sample`.
      eps_fn: the UNet's noise prediction.
      latent_shape: (h, w, C) of one latent.
      output: `float32`, or `uint8` by floor(255 x).
      sampler, num_steps, guidance_scale, negative_prompt: how one picture is drawn.
      num_images, batch_size: pictures of each prompt, and at once.
      seed: picture i of both prompts starts from the same noise, whatever the batch size.

    Raises:
      UserError: an unknown sampler, or a number of steps that it cannot make.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        eps_fn: Callable,
        latent_shape: tuple[int, int, int],
        output: str,
        *,
        sampler: str,
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        num_images: int,
        batch_size: int,
        seed: int,
    ):
        self._pipeline, self._eps_fn, self._latent_shape, self._output = pipeline, eps_fn, latent_shape, output
        self._sampler, self._guidance_scale = make_sampler(sampler, pipeline.schedule, num_steps), guidance_scale
        self._negative_prompt, self._num_images, self._batch_size, self._seed = negative_prompt, num_images, batch_size, seed

    @property
    def total(self) -> int:
        """How many pictures `sample` draws, of both prompts together."""
        return 2 * self._num_images

    @cached_property
    def _p_sample(self):
        def decode(params: PyTree, latents: jax.Array) -> jax.Array:
            return self._pipeline.vae.apply({"params": params}, latents, method="decode")

        scale = self._guidance_scale
        sample_fn = make_guided_sample_fn(self._eps_fn, decode, self._sampler, self._latent_shape, guidance=scale)
        return pmap_sample_fn(sample_fn, output=self._output)

    def sample(
        self, prompts: PromptPair, params: PyTree, *, out_dir, fingerprint: str, progress: Callable[[int, int], None]
    ) -> dict[str, np.ndarray]:
        """Returns `original` and `modified` uint8 `[N, H, W, 3]`, and with output float32 `original_float`, ... in [0, 1].

        Args:
          params: the UNet's.
          out_dir, fingerprint: where finished pictures are kept until all are, and of which model; see `sampling.generate`.
          progress: called with the pictures done and their total.
        """
        arrays: dict[str, np.ndarray] = {}
        for number, (kind, prompt) in enumerate(prompts.items()):
            prompt_1ND, negative_1ND = (prompt_embeddings(self._pipeline, [text]) for text in (prompt, self._negative_prompt))
            made = generate(
                self._p_sample,
                GuidedParams(params, self._pipeline.vae_params, prompt_1ND, negative_1ND),
                rng=jax.random.key(self._seed),
                num_images=self._num_images,
                batch_size=self._batch_size,
                out_dir=epath.Path(out_dir) / kind,
                fingerprint=files.json_digest([fingerprint, prompt]),
                progress=lambda done, _, number=number: progress(number * self._num_images + done, self.total),
            )
            if made.dtype == np.uint8:
                arrays[kind] = made
            else:
                arrays |= {kind: unit_to_pixels(made), f"{kind}_float": made}
        return arrays
