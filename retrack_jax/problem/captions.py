"""The caption of each image as the condition that the network gets."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import check, shown
from retrack_jax.config.options import Options
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.dataset import ImageSet
from retrack_jax.files import json_digest
from retrack_jax.neighbors.captions import CaptionedNeighbors, captioned_nearest, similarities
from retrack_jax.notation import PyTree
from retrack_jax.problem.conditioning import Conditioning
from retrack_jax.problem.picture_sizes import time_ids_of, time_ids_of_whole, with_time_ids
from retrack_jax.problem.target import Target
from retrack_jax.problem.text_states import TextStates
from retrack_jax.unlearn.options import MethodOptions, RetrackOptions
from retrack_jax.unlearn.streams import Anchor

_SEED = 0  # of the choice of remaining captions that samples are drawn of: the same for every run


class Captions(Conditioning):
    """Each image's own caption, as the text encoder's states, for Stable Diffusion XL with the sizes of the image.

    Samples are drawn of some forgotten captions, `forgotten_00`, ..., and of some that remain, `kept_00`, ....

    Args:
      states: of all captions.
      encode: a prompt to its embedding, as `states` has it, leaves `[1, ...]`.
      options: the config: the negative prompt, how many captions of each kind samples are drawn of, caption dropout, and the side
        of samples.
      takes_sizes: whether the network is given the sizes of images, as Stable Diffusion XL's is.
    """

    of_target = True

    def __init__(self, states: TextStates, encode: Callable[[str], PyTree], options: Options, takes_sizes: bool = False):
        self._states, self._num_captions = states, options.sampling.num_captions
        self._takes_sizes = takes_sizes
        self._whole = time_ids_of_whole(options.data.resolution) if self._takes_sizes else None
        self.dropped, self.dropout = encode(""), options.data.caption_dropout  # a dropped caption leaves the sizes
        negative = options.sampling.negative_prompt
        self.null = with_time_ids(encode(negative) if negative else self.dropped, self._whole)
        self.digests = {"text encoder in config.checkpoint": states.digest}
        if self._takes_sizes:  # force_zeros_for_empty_prompt of model_index.json
            self.digests["empty prompt in config.checkpoint"] = "states" if np.any(self.dropped["text_embeds"]) else "zeros"

    def of_images(self, images: ImageSet) -> Callable[[np.ndarray], PyTree]:
        row_of_image, time_ids = self._states.rows(images.captions), self._time_ids(images)
        return lambda rows: with_time_ids(self._states.take(row_of_image[rows]), None if time_ids is None else time_ids[rows])

    def search(self, target: Target, own: MethodOptions) -> Callable[..., CaptionedNeighbors]:
        forget, remain = self._rows(target)
        if not isinstance(own, RetrackOptions):
            own = RetrackOptions()
        how = {"text": self._states.pooled, "forget_caption": forget, "remain_caption": remain}
        if own.same_caption and own.anchor is None:
            alone = [target.images.ids[row] for row, caption in zip(target.unique, forget, strict=True) if caption not in remain]
            check(
                not alone,
                f"no picture that remains has the caption of {shown(alone)}; set config.unlearn.retrack.same_caption=False, or "
                "config.unlearn.retrack.anchor to lead these to the pretrained prediction",
            )
        return partial(captioned_nearest, **how, beta=own.beta, same_caption=own.same_caption)

    def anchor(self, target: Target, similarity: np.ndarray, recipe: UnlearnOptions) -> Anchor | None:
        threshold = getattr(recipe.own, "anchor", None)
        used = np.zeros(len(similarity), bool) if threshold is None else similarity.max(axis=1) < threshold
        if not used.any():
            return None
        forget, remain = self._rows(target)
        nearest = remain[similarities(self._states.pooled, forget, remain).argmax(axis=1)]
        time_ids = self._time_ids(target.images)
        condition = with_time_ids(self._states.take(nearest), None if time_ids is None else time_ids[target.unique])
        return Anchor(condition, used)

    def shown(self, target: Target) -> dict[str, int]:
        """Returns name of samples -> the row of the image whose caption they are of: a fixed random choice of either kind."""
        state = self._states.rows(target.images.captions)  # captions of equal tokens are one
        gone, kept = list(dict.fromkeys(state[target.unique])), {}
        chosen = np.random.default_rng(_SEED).permutation(len(gone))[: self._num_captions]
        forgotten = [target.unique[state[target.unique] == gone[number]][0] for number in np.sort(chosen)]
        for row in np.random.default_rng(_SEED).permutation(target.remain):
            if state[row] not in gone and len(kept) < self._num_captions:
                kept.setdefault(state[row], row)
        kinds = {"forgotten": forgotten, "kept": kept.values()}
        return {f"{kind}_{number:02d}": int(row) for kind, rows in kinds.items() for number, row in enumerate(rows)}

    def digests_of(self, target: Target) -> dict[str, str]:
        """As `Conditioning.digests_of`: which captions samples are drawn of, where these are a choice."""
        forgotten = set(self._states.rows(target.images.captions)[target.forget])
        if len(forgotten) <= self._num_captions:
            return {}
        return {"captions of samples": json_digest([target.images.captions[row] for row in self.shown(target).values()])}

    def pictures(self, target: Target) -> dict[str, np.ndarray]:
        """Returns name of samples -> rows of their pictures: every forgotten one with the caption, or the kept one."""
        state, unique = self._states.rows(target.images.captions), target.unique
        return {
            name: unique[state[unique] == state[row]] if row in unique else np.array([row])
            for name, row in self.shown(target).items()
        }

    def sampled(self, target: Target) -> dict[str, PyTree]:
        rows = {name: self._states.rows([target.images.captions[row]]) for name, row in self.shown(target).items()}
        conditions = {name: with_time_ids(self._states.take(row), self._whole) for name, row in rows.items()}
        return jax.tree.map(jnp.asarray, conditions)

    def describe(self, name: str, target: Target) -> str:
        return target.images.captions[self.shown(target)[name]]

    def _time_ids(self, images: ImageSet) -> np.ndarray | None:
        return time_ids_of(images) if self._takes_sizes else None

    def _rows(self, target: Target) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the states: of the distinct forgotten images, and of those that remain."""
        rows = self._states.rows(target.images.captions)
        return rows[target.unique], rows[target.remain]
