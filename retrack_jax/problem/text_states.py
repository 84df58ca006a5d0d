"""The text encoder's states of a set of captions, computed once and cached, and what follows from them.

A state is what the network gets, `[N, D]` for the N tokens of a caption: 236 kB with Stable Diffusion 1.x. XL's network gets a
dict of arrays (checkpoints/text_encoders.py), 636 kB, and so does Stable Diffusion 3's, 639 kB, or 4.8 MB with T5; without T5
zeros take its place when a row is read. They are mapped into memory, and a batch reads the rows that it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from retrack_jax import files
from retrack_jax.checkpoints.stable_diffusion import Pipeline
from retrack_jax.checkpoints.text_encoders import TextEncoder, encode_ids, padded, text_digest, token_ids, warn_of_cuts
from retrack_jax.log import progress
from retrack_jax.notation import PyTree

_VERSION = 1
_BATCH = 16  # captions encoded at once


@dataclass(frozen=True, eq=False)
class TextStates:
    """The states of P distinct captions. Captions whose tokens are equal are one: the network cannot tell them apart.

    Attributes:
      row_of: caption -> its row.
      states: float32 `[P, N, D]`, or of XL and 3 a dict of arrays `[P, ...]`; memory maps.
      pooled: float32 `[P, D]`, unit vectors: the states at each caption's end token, or of XL and 3 the pooled ones.
      digest: of the text encoder.
      padded_width: as `Pipeline.padded_width`.
    """

    row_of: dict[str, int]
    states: PyTree
    pooled: np.ndarray
    digest: str
    padded_width: int | None = None

    def rows(self, captions: Sequence[str]) -> np.ndarray:
        """Returns the row of each caption, int64 `[len(captions)]`."""
        return np.array([self.row_of[caption] for caption in captions], np.int64)

    def take(self, rows: np.ndarray) -> PyTree:
        """Returns the states of `rows`, `[len(rows), ...]`, in memory."""
        return padded(jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[rows]), self.states), self.padded_width)


def text_states(pipeline: Pipeline, captions: Sequence[str], cache_dir) -> TextStates:
    """Returns the states of `captions`, which may come several times, from the cache if it has them."""
    distinct = sorted(set(captions))
    tokenizer, encoders = pipeline.tokenizer, pipeline.text_encoders
    warn_of_cuts(encoders, distinct)
    ids_PN, row_of_caption = np.unique(token_ids(encoders, distinct), axis=0, return_inverse=True)
    digest = text_digest(encoders)
    path = files.cache_path(cache_dir, "captions", [_VERSION, files.array_digest(ids_PN), digest], "npy")
    states = _arrays(files.cached_array(path, lambda temporary: _encode(encoders, ids_PN, temporary)))
    if isinstance(states, dict):
        pooled = np.array(states["text_embeds"])
    else:
        ends = (ids_PN == tokenizer.eos_id).argmax(axis=1)
        pooled = states[np.arange(len(states)), ends]
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    row_of = dict(zip(distinct, row_of_caption.reshape(-1).tolist(), strict=True))
    return TextStates(row_of, states, pooled, digest, pipeline.padded_width)


def _encode(encoders: Sequence[TextEncoder], ids_PN: np.ndarray, path) -> None:
    # Until all is encoded; T5 is put there layer by layer.
    encoders = [replace(one, params=jax.device_put(one.params)) if number < 2 else one for number, one in enumerate(encoders)]
    shapes = jax.eval_shape(lambda ids: encode_ids(encoders, ids), ids_PN[:1])
    whole = isinstance(shapes, dict)  # one file has both arrays, caption by caption
    kind = [(name, np.float32, leaf.shape[1:]) for name, leaf in sorted(shapes.items())] if whole else np.float32
    shape = (len(ids_PN),) if whole else (len(ids_PN), *shapes.shape[1:])
    file = np.lib.format.open_memmap(str(path), mode="w+", dtype=kind, shape=shape)
    for start in progress(range(0, len(ids_PN), _BATCH), "encode captions", unit="batch"):
        block = ids_PN[start : start + _BATCH]
        padded = np.concatenate([block, np.repeat(block[-1:], _BATCH - len(block), axis=0)])  # one compiled shape
        states = encode_ids(encoders, padded)
        for leaf, batch in zip(jax.tree.leaves(_arrays(file)), jax.tree.leaves(states), strict=True):
            leaf[start : start + len(block)] = batch[: len(block)]
    file.flush()


def _arrays(file: np.ndarray) -> PyTree:
    """Returns a file as the states that it holds; leaves share its memory."""
    return file if file.dtype.names is None else {name: file[name] for name in file.dtype.names}
