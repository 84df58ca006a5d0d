"""CLIP-IQA: how much nearer an image is to "Good photo." than to "Bad photo." in CLIP's space.

Follows torchmetrics' default (`clip_iqa`, CLIP RN50 without positional embedding), which the official code uses:
1. x' = (x - mean) / std with CLIP's mean and std; images are not resized.
2. f = image(x') / ‖image(x')‖; a_j = text(prompt_j) / ‖text(prompt_j)‖.
3. score = softmax(100 [f·a_good, f·a_bad])_good. torchmetrics writes 100 where CLIP's learnt scale is 100.0000...
Prompts are padded with id 0, not with the end token: the end token is found as the highest id, and the causal mask hides the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.metrics.features.clip_image import ClipTowers
from retrack_jax.models.tokenizer import ClipTokenizer
from retrack_jax.types import Array

PROMPTS = ("Good photo.", "Bad photo.")
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def prompt_ids(tokenizer: ClipTokenizer, prompts=PROMPTS) -> np.ndarray:
    """Returns int32 `[P, 77]`, padded with zeros whatever the tokenizer pads with."""
    ids = tokenizer(prompts)
    after_end = np.cumsum(ids == tokenizer.eos_id, axis=1) - (ids == tokenizer.eos_id) > 0
    return np.where(after_end, 0, ids)


def anchors(towers: ClipTowers, ids_PN: np.ndarray) -> Array:
    """Returns `[P, D]` float32: the prompts' features, each of length 1."""
    features_PD = towers.text.apply({"params": towers.text_params}, jnp.asarray(ids_PN), method="pooled")
    return features_PD / jnp.linalg.norm(features_PD, axis=-1, keepdims=True)


def score(features_ND: Array, anchors_2D: Array) -> Array:
    """Returns `[N]` in [0, 1] from image features `[N, D]` of any length and unit anchors (equation 3)."""
    unit_ND = features_ND / jnp.linalg.norm(features_ND, axis=-1, keepdims=True)
    return jax.nn.softmax(100.0 * unit_ND @ anchors_2D.T, axis=-1)[:, 0]


@dataclass(frozen=True, eq=False)
class ClipIqa:
    """CLIP-IQA with its weights: call it with samples `[N, H, W, 3]` float in [0, 1] for scores `[N]` in [0, 1].

    Attributes:
      digest: SHA-256 of the weights file, for provenance.
      fn: the compiled scores of one batch.
      batch_size: images per call; 16 of 512 x 512 take about 1.5 GB.
    """

    digest: str
    fn: Callable
    batch_size: int = 4

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        samples = np.asarray(samples)
        if samples.ndim != 4 or samples.shape[-1] != 3 or samples.shape[1] % 32 or samples.shape[2] % 32:
            raise UserError(f"clip_iqa needs images [N, H, W, 3] with sides that are multiples of 32; got {samples.shape}")
        if not np.issubdtype(samples.dtype, np.floating):
            raise UserError(f"clip_iqa takes floats in [0, 1], not {samples.dtype}")
        parts = []
        for start in range(0, len(samples), self.batch_size):
            part = samples[start : start + self.batch_size].astype(np.float32)
            whole = np.concatenate([part, np.zeros((self.batch_size - len(part), *part.shape[1:]), np.float32)])
            parts.append(np.asarray(self.fn(whole))[: len(part)])
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def make_clip_iqa(towers: ClipTowers, tokenizer: ClipTokenizer, digest: str, batch_size: int = 4) -> ClipIqa:
    """Returns the metric for the official pair of prompts."""
    anchors_2D = anchors(towers, prompt_ids(tokenizer))

    @jax.jit
    def fn(params, x_NHWC):
        normal = (x_NHWC - _MEAN[None, None, None]) / _STD[None, None, None]
        return score(towers.image.apply({"params": params}, normal), anchors_2D)

    return ClipIqa(digest, lambda x: fn(towers.image_params, x), batch_size)
