"""Exact nearest neighbors in one streaming pass, with bounded memory.

For a query q and an image x, cut into C chunks c of at most 1024 values:

    (1)  ‖q - x‖² = sum_c (‖q_c‖² + ‖x_c‖² - 2 <q_c, x_c>)
    (2)  |computed (1) - true| <= (1024 + C + 16) u (‖q‖ + ‖x‖)², u = 2^-24
    (3)  pixels less 128: |q_i x_i| <= 2^14, so a chunk's products sum exactly in float32 (2^10 2^14 = 2^24), and in (2)
         C + 16 is enough. Integers up to 256 survive even bfloat16 factors.

So (1) selects candidates: all images that the bound (2) does not rule out. Their distances are then taken from the
differences themselves in float64. So ranks are exact, and ties go to the lower index.
"""

import mmap
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import RowView, pixels_to_model
from retrack_jax.data.in_order import in_order

_CHUNK = 1024
_BLOCK_VALUES = 1 << 22  # of images a block: it stays in the cache while it is used
_SCORE_VALUES = 1 << 22  # of a block's scores, queries x images
_QUERY_TILE = 4096  # queries of one pass over the images, and
_TILE_VALUES = 1 << 26  # the values that they may have: as float32, 256 MiB
UNIT_ROUNDOFF = 2.0**-24
PIXEL_SCALE = 2.0 / 255.0  # a step of one level, in [-1, 1]


def search(queries_QD: np.ndarray, images_ND: np.ndarray, k: int, exclude: Sequence[tuple[np.ndarray, np.ndarray]] = ()):
    """Returns the k nearest images of each query: (indices int64 [Q, k], distances float64 [Q, k]), nearest first.

    Args:
      queries_QD, images_ND: both uint8, taken as pixels in [-1, 1], or both float32. Images may be a memory map: they are
        read in order, a block at a time, once for each tile of queries.
      exclude: pairs (rows of queries, sorted indices of images that those queries must not find).

    Raises:
      UserError: an image holds a non-finite value.
    """
    tile = max(1, min(_QUERY_TILE, _TILE_VALUES // queries_QD.shape[1]))
    parts = [
        _search_tile(queries_QD[start : start + tile], images_ND, k, part_of(exclude, np.arange(start, start + tile)))
        for start in range(0, len(queries_QD), tile)
    ]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def part_of(exclude: Sequence[tuple[np.ndarray, np.ndarray]], rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns `exclude` for some of the queries, sorted `rows`, numbered from 0."""
    pairs = [(np.flatnonzero(np.isin(rows, excluding)), indices) for excluding, indices in exclude]
    return [(positions, indices) for positions, indices in pairs if len(positions)]


def _search_tile(queries_QD, images_ND, k, exclude):
    num_queries, size = queries_QD.shape
    pixels = images_ND.dtype == np.uint8
    error_factor = (-(-size // _CHUNK) + 16 + (0 if pixels else _CHUNK)) * UNIT_ROUNDOFF
    norms_Q1 = np.linalg.norm(queries_QD.astype(np.float64) - (128.0 if pixels else 0.0), axis=1, keepdims=True)
    squares_QK, indices_QK = np.full((num_queries, k), np.inf), np.full((num_queries, k), -1, np.int64)
    # Few distinct numbers of queries, so few compilations.
    rounded = 1 << (num_queries - 1).bit_length() if num_queries <= 32 else -(-num_queries // 32) * 32
    padded_QD = jnp.asarray(_pad_rows(queries_QD, rounded))
    rows = max(1, min(len(images_ND), max(64, _BLOCK_VALUES // size), max(64, _SCORE_VALUES // num_queries), 2**27 // size + 1))

    def score(block: int):
        block_ND = _read(images_ND, block * rows, (block + 1) * rows)
        # The last block is padded, so that one compiled program serves all of them.
        return block_ND, _scores(padded_QD, _pad_rows(block_ND, rows))

    for block, (block_ND, scores) in enumerate(in_order(score, range(-(-len(images_ND) // rows)), ahead=1)):
        start, stop = block * rows, block * rows + len(block_ND)
        scores_QN, squares_N = (np.asarray(part)[..., : len(block_ND)] for part in scores)
        if not np.isfinite(squares_N).all():
            bad = start + int(np.flatnonzero(~np.isfinite(squares_N))[0])
            raise UserError(f"image {bad} holds values that are not finite (or too large for float32); repair it or leave it out")
        margin_QN = error_factor * (norms_Q1 + np.sqrt(squares_N.astype(np.float64))) ** 2
        low_QN = scores_QN[:num_queries] - margin_QN
        for excluding, indices in exclude:
            inside = indices[np.searchsorted(indices, start) : np.searchsorted(indices, stop)]
            low_QN[np.ix_(excluding, inside - start)] = np.inf
        # A later image at the distance of the k-th best loses the tie; within the margin it may be nearer still.
        possible_QN = low_QN < squares_QK[:, -1:]
        crowded = np.flatnonzero(possible_QN.sum(axis=1) > k)
        if len(crowded):
            high = low_QN[crowded] + 2 * margin_QN[crowded]
            possible_QN[crowded] &= low_QN[crowded] <= np.partition(high, k - 1, axis=1)[:, k - 1 : k]
        _merge(squares_QK, indices_QK, *np.nonzero(possible_QN), queries_QD, block_ND, start)
    return indices_QK, np.sqrt(squares_QK) * (PIXEL_SCALE if pixels else 1.0)


@jax.jit
def _scores(queries_QD, images_ND):
    """uint8 or float32 -> (the squared distances of (1), rounded [Q, N]; the images' squared norms [N])."""
    num_chunks = -(-queries_QD.shape[1] // _CHUNK)
    width = -(-queries_QD.shape[1] // num_chunks)
    center = 128 if images_ND.dtype == jnp.uint8 else 0
    padding = ((0, 0), (0, num_chunks * width - queries_QD.shape[1]))
    padded_QD, padded_ND = (jnp.pad(array, padding, constant_values=center) for array in (queries_QD, images_ND))

    def add_chunk(chunk, sums):
        q, x = (
            jax.lax.dynamic_slice_in_dim(array, chunk * width, width, axis=1).astype(jnp.float32) - center
            for array in (padded_QD, padded_ND)
        )
        square_1N = jnp.sum(x * x, axis=1)[None, :]
        distance_QN = jnp.sum(q * q, axis=1, keepdims=True) + square_1N - 2 * jnp.matmul(q, x.T, precision="highest")
        return sums[0] + distance_QN, sums[1] + square_1N

    zeros_QN = jnp.zeros((queries_QD.shape[0], images_ND.shape[0]), jnp.float32)
    distance_QN, square_1N = jax.lax.fori_loop(0, num_chunks, add_chunk, (zeros_QN, zeros_QN[:1]))
    return distance_QN, square_1N[0]


def _merge(squares_QK, indices_QK, rows, columns, queries_QD, block_ND, start) -> None:
    """Enters candidates (rows of queries, ascending; columns of the block) among the best so far, by (distance, index)."""
    if not len(rows):
        return
    k = squares_QK.shape[1]
    changed = np.unique(rows)
    all_rows = np.concatenate([np.repeat(changed, k), rows])
    squares = difference_squares(queries_QD, block_ND, rows, columns)
    all_squares = np.concatenate([squares_QK[changed].ravel(), squares])
    all_indices = np.concatenate([indices_QK[changed].ravel(), columns + start])
    order = np.lexsort((all_indices, all_squares, all_rows))
    first = np.searchsorted(all_rows[order], changed)
    best = order[first[:, None] + np.arange(k)]
    squares_QK[changed], indices_QK[changed] = all_squares[best], all_indices[best]


def difference_squares(queries_QD, images_ND, rows, columns) -> np.ndarray:
    """Returns float64 [M]: ‖q - x‖² of each pair from its differences, a bounded number of pairs at a time."""
    squares = np.empty(len(rows))
    step = max(1, _BLOCK_VALUES // queries_QD.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = queries_QD[rows[part]].astype(np.float64) - images_ND[columns[part]]
        squares[part] = np.einsum("md,md->m", difference, difference)
    return squares


def _read(images_ND: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns a block of rows. Pages of a memory map are released at once: the system would count them as our memory."""
    source = images_ND.source if isinstance(images_ND, RowView) else images_ND
    if not isinstance(source, np.memmap):
        return np.ascontiguousarray(images_ND[start:stop])
    block_ND = np.array(images_ND[start:stop])
    if source.mode in ("r", "r+"):  # a private map could lose what was written to it
        source._mmap.madvise(mmap.MADV_DONTNEED)
    return block_ND


def _pad_rows(array_ND: np.ndarray, rows: int) -> np.ndarray:
    return array_ND if len(array_ND) == rows else np.pad(array_ND, ((0, rows - len(array_ND)), (0, 0)))


def as_float(array: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels as float32 in [-1, 1], and floats as float32."""
    array = np.asanyarray(array)
    return pixels_to_model(array) if array.dtype == np.uint8 else array.astype(np.float32, copy=False)
