"""CLIP-IQA: how much nearer an image is to "Good photo." than to "Bad photo." in CLIP's space.

It follows the default of torchmetrics (`clip_iqa`, CLIP RN50 without positional embedding), which the official code uses:

    (1) x'    = (x - mean) / std                      CLIP's mean and std, x float in [0, 1]; images are not resized
    (2) f     = image(x') / ‖image(x')‖,   a_j = text(prompt_j) / ‖text(prompt_j)‖
    (3) score = softmax(100 [f·a_good, f·a_bad])_good

The 100 in (3) is torchmetrics' constant for the scale that CLIP learns, which ended at 100. Prompts are padded with id 0, not
with the end token: the model finds the end token as the highest id, and the causal mask hides what follows it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check
from retrack_jax.metrics.arrays import unit_images
from retrack_jax.metrics.features.clip_image import ClipTowers
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.models.tokenizer import ClipTokenizer
from retrack_jax.notation import Array

PROMPTS = ("Good photo.", "Bad photo.")
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclass(frozen=True, eq=False)
class ClipIqa:
    """CLIP-IQA with its weights.

    Attributes:
      network: CLIP's image tower, images not resized.
      anchors: unit text features `[2, D]`, the good prompt's first.
    """

    network: FeatureNetwork
    anchors: np.ndarray

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """Returns float32 scores `[N]` in [0, 1] of samples `[N, H, W, 3]`, floats in [0, 1], sides multiples of 32."""
        return np.asarray(score(self.network(samples)["features"], self.anchors))


def make_clip_iqa(towers: ClipTowers, tokenizer: ClipTokenizer, digest: str, batch_size: int = 4) -> ClipIqa:
    """Returns the metric for the official pair of prompts; `digest` is the weights file's, for provenance."""
    image = towers.image  # a closure over `towers` would keep the 0.25 GB of the text tower, which only the anchors need

    network = FeatureNetwork(
        name="clip-rn50",
        digest=digest,
        resize="none",
        params=towers.image_params,
        apply_fn=lambda params, batch: {"features": image.apply({"params": params}, batch)},
        prepare=_prepare,
        batch_size=batch_size,
    )
    ids_2N = jnp.asarray(prompt_ids(tokenizer)[:, : towers.text.max_position_embeddings])
    anchors_2D = towers.text.apply({"params": towers.text_params}, ids_2N, method="pooled")
    return ClipIqa(network, np.asarray(anchors_2D / jnp.linalg.norm(anchors_2D, axis=-1, keepdims=True)))


def prompt_ids(tokenizer: ClipTokenizer) -> np.ndarray:
    """Returns int32 `[2, length]`, padded with zeros, with whatever id the tokenizer pads."""
    ids = tokenizer(PROMPTS)
    is_end = ids == tokenizer.eos_id
    return np.where(np.cumsum(is_end, axis=1) - is_end > 0, 0, ids)


def score(features_ND: Array, anchors_2D: Array) -> Array:
    """Returns `[N]` in [0, 1] from image features `[N, D]` of any length and unit anchors (equation 3)."""
    unit_ND = features_ND / jnp.linalg.norm(features_ND, axis=-1, keepdims=True)
    return jax.nn.softmax(100.0 * unit_ND @ anchors_2D.T, axis=-1)[:, 0]


def _prepare(images: np.ndarray) -> np.ndarray:
    fits = images.shape[-1] == 3 and images.shape[1] % 32 == 0 and images.shape[2] % 32 == 0
    check(fits, f"clip_iqa takes images [N, H, W, 3] with sides that are multiples of 32; got {images.shape}")
    return (unit_images("images", images) - _MEAN) / _STD
