"""What image models are evaluated against, and the model that is evaluated."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from etils import epath

from retrack_jax.data.dataset import RowView
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.metrics.features.network import FeatureNetwork
from retrack_jax.notation import PyTree, Rng


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What every model of a run is evaluated against.

    Attributes:
      forgotten: the distinct forgotten images, uint8 `[F, H, W, C]`.
      reference: the real images that samples are compared with, uint8 `[N, H, W, C]`.
      reference_digest, reference_name: say which these are.
      cache_dir: where the features of the reference are kept.
      clean: `() -> ` the forgotten images as the network denoises them, without noise, float32 `[F, h, w, c]`.
      decode: from what the network denoises, `[N, h, w, c]`, to images in [-1, 1]; None: it denoises images.
      eps_fn, schedule: the network and its schedule.
      features, sscd: `() -> FeatureNetwork`; raise `Unavailable` without their weights, or where they are for other images.
      classifier: `official -> FeatureNetwork` behind the inception scores and the label share, alike; None: `features` is.
      held_out: `() -> ` images that no model trained on and that the forgotten ones can be exchanged with, as `clean`; or None.
      condition, held_out_condition: of the forgotten and the held-out images, `[F, ...]` and `[M, ...]`, for a network that takes
        one; else None.
      label: the label that all forgotten images and no other have, or None.
      finetune: `(params, with_forgotten) -> (state, train)` for the relearning curves; see evaluate/memory.py.
      relearning: at which steps these curves are measured.
      pretrained: `() -> params` of the model before unlearning.
      threshold: L2 over [0, 1] pixels below which a sample counts as a forgotten image; 0: samples are not told apart.
      of_forgotten: bool `[P]`, whether the label of sample i, at i mod P, was drawn from a forgotten image. Quality is measured
        without such samples, so that labels are as frequent as in the reference. None: no labels, or none that were drawn.
      nll_probes: Rademacher probes of the likelihood's divergence.
      rng: decides the t and noises of the losses, the same for every model.
      protocol_rng: decides the likelihood's probes and the noise that SSCD's images are restored from: `rng`, or the run's own,
        as in the official protocol.
    """

    forgotten: np.ndarray
    reference: np.ndarray | RowView
    reference_digest: str
    reference_name: str
    cache_dir: epath.Path
    eps_fn: Callable
    schedule: Schedule
    features: Callable[[], FeatureNetwork]
    sscd: Callable[[], FeatureNetwork]
    clean: Callable[[], np.ndarray]
    held_out: Callable[[], np.ndarray] | None
    label: int | None
    finetune: Callable
    relearning: tuple[int, ...]
    pretrained: Callable[[], PyTree]
    threshold: float
    nll_probes: int
    rng: Rng
    protocol_rng: Rng
    decode: Callable[[np.ndarray], np.ndarray] | None = None
    classifier: Callable[[bool], FeatureNetwork] | None = None
    of_forgotten: np.ndarray | None = None
    condition: np.ndarray | None = None
    held_out_condition: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is evaluated: its parameters, and its samples as uint8 and, where they were kept, as floats in [0, 1].

    `pictures` is where what it restores of the forgotten images is kept for the report; None keeps nothing. `labels` int `[N]`
    are those that the samples were drawn under, if the network takes any.
    """

    params: PyTree
    samples: np.ndarray
    samples_float: np.ndarray | None = None
    pictures: epath.Path | None = None
    labels: np.ndarray | None = None

    @property
    def finest(self) -> np.ndarray:
        """The samples as precisely as they were kept."""
        return self.samples if self.samples_float is None else self.samples_float
