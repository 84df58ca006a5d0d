"""The text encoder's states of a set of captions, computed once and cached, and what follows from them.

A state is what the network gets, `[N, D]` for the N tokens of a caption: 236 kB with Stable Diffusion 1.x. They are mapped into
memory, and a batch reads the rows that it needs.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrack_jax import files
from retrack_jax.checkpoints.stable_diffusion import Pipeline, encode_ids, text_digest
from retrack_jax.data.tables import shown
from retrack_jax.log import progress

_VERSION = 1
_BATCH = 16  # captions encoded at once
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TextStates:
    """The states of P distinct captions. Captions whose tokens are equal are one: the network cannot tell them apart.

    Attributes:
      row_of: caption -> its row.
      states: float32 `[P, N, D]`, a memory map.
      pooled: float32 `[P, D]`, unit vectors: the states at each caption's end token.
      digest: of the text encoder.
    """

    row_of: dict[str, int]
    states: np.ndarray
    pooled: np.ndarray
    digest: str

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        """Returns the row of each caption, int64 `[len(captions)]`."""
        return np.array([self.row_of[caption] for caption in captions], np.int64)


def text_states(pipeline: Pipeline, captions: Sequence[str], cache_dir) -> TextStates:
    """Returns the states of `captions`, which may come several times, from the cache if it has them."""
    distinct = sorted(set(captions))
    tokenizer = pipeline.tokenizer
    if long := [caption for caption in distinct if tokenizer.count(caption) > tokenizer.length]:
        cut = shown([f"{caption:.60}" for caption in long])
        log.warning("%d captions of more than %d tokens are cut, as diffusers does: %s", len(long), tokenizer.length, cut)
    ids_PN, row_of_caption = np.unique(tokenizer(distinct), axis=0, return_inverse=True)
    digest = text_digest(pipeline)
    path = files.cache_path(cache_dir, "captions", [_VERSION, files.array_digest(ids_PN), digest], "npy")
    states = files.read_cached(path, _map)
    if states is None:
        files.write_whole(path, lambda temporary: _encode(pipeline, ids_PN, temporary), advice=files.IN_CACHE)
        states = _map(path)
    ends = (ids_PN == tokenizer.eos_id).argmax(axis=1)
    pooled = states[np.arange(len(states)), ends]
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    return TextStates(dict(zip(distinct, row_of_caption.reshape(-1).tolist(), strict=True)), states, pooled, digest)


def _encode(pipeline: Pipeline, ids_PN: np.ndarray, path) -> None:
    width = pipeline.text_encoder.hidden_size
    states = np.lib.format.open_memmap(str(path), mode="w+", dtype=np.float32, shape=(*ids_PN.shape, width))
    for start in progress(range(0, len(ids_PN), _BATCH), "encode captions", unit="batch"):
        block = ids_PN[start : start + _BATCH]
        padded = np.concatenate([block, np.repeat(block[-1:], _BATCH - len(block), axis=0)])  # one compiled shape
        states[start : start + len(block)] = encode_ids(pipeline, padded)[: len(block)]
    states.flush()


def _map(path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
