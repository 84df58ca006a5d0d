"""Exact nearest neighbors in one streaming pass, with bounded memory.

For a query q and an image x, cut into chunks c of at most 1024 values:

    (1)  ‖q - x‖² = sum_c (‖q_c‖² + ‖x_c‖² - 2 <q_c, x_c>)
    (2)  pixels: with values less 128, |q_i x_i| <= 2^14, so each chunk's products sum exactly in float32 (2^10 2^14 = 2^24)
    (3)  floats: |computed (1) - true| <= (1024 + C + 16) u (‖q‖ + ‖x‖)², u = 2^-24, for C chunks

By (2) distances between uint8 images are exact integers on any device, even where matrix products round their factors to
bfloat16, for integers up to 256 survive that. By (3) the float path only selects candidates; their distances are then taken
from the differences themselves in float64. So ranks are exact, and ties go to the lower index, in both paths.
"""

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checks import UserError
from retrack_jax.data.row_view import Rows

_CHUNK = 1024
_LOW_BITS = 13  # a chunk's squared distance is below 2^26: both halves of it sum in int32 over 2^13 and more chunks
_BLOCK_VALUES = 1 << 22  # of images a block: it stays in the cache while it is used
_SCORE_VALUES = 1 << 22  # of a block's scores, queries x images
_QUERY_TILE = 4096  # queries of one pass over the images, and
_TILE_VALUES = 1 << 26  # the values that they may have: as float32, 256 MiB
UNIT_ROUNDOFF = 2.0**-24
PIXEL_SCALE = 2.0 / 255.0  # a step of one level, in [-1, 1]


@jax.jit
def _pixel_scores(queries_QD, images_ND):
    """uint8 -> the squared distances of (1) as two int32 [Q, N]: high * 2^13 + low."""
    num_chunks, width = _chunks(queries_QD.shape[1])
    queries_QD = _centred(queries_QD, num_chunks * width)

    def add_chunk(chunk, sums):
        q = jax.lax.dynamic_slice_in_dim(queries_QD, chunk * width, width, axis=1)
        x = _centred(jax.lax.dynamic_slice_in_dim(padded_ND, chunk * width, width, axis=1), width)
        square_Q1 = jnp.sum(q * q, axis=1, keepdims=True).astype(jnp.int32)
        square_1N = jnp.sum(x * x, axis=1)[None, :].astype(jnp.int32)
        distance_QN = square_Q1 + square_1N - 2 * jnp.matmul(q, x.T, precision="highest").astype(jnp.int32)
        return sums[0] + (distance_QN >> _LOW_BITS), sums[1] + (distance_QN & (2**_LOW_BITS - 1))

    padded_ND = jnp.pad(images_ND, ((0, 0), (0, num_chunks * width - images_ND.shape[1])), constant_values=128)
    zeros_QN = jnp.zeros((queries_QD.shape[0], images_ND.shape[0]), jnp.int32)
    return jax.lax.fori_loop(0, num_chunks, add_chunk, (zeros_QN, zeros_QN))


def _centred(pixels_ND, width: int):
    padding = ((0, 0), (0, width - pixels_ND.shape[1]))
    return jnp.pad(pixels_ND.astype(jnp.float32) - 128.0, padding)


@jax.jit
def _float_scores(queries_QD, images_ND):
    """float32 -> (the squared distances of (1), rounded [Q, N]; the images' squared norms [N])."""
    num_chunks, width = _chunks(queries_QD.shape[1])
    padding = ((0, 0), (0, num_chunks * width - queries_QD.shape[1]))
    queries_QD, images_ND = jnp.pad(queries_QD, padding), jnp.pad(images_ND, padding)

    def add_chunk(chunk, sums):
        q = jax.lax.dynamic_slice_in_dim(queries_QD, chunk * width, width, axis=1)
        x = jax.lax.dynamic_slice_in_dim(images_ND, chunk * width, width, axis=1)
        square_1N = jnp.sum(x * x, axis=1)[None, :]
        distance_QN = jnp.sum(q * q, axis=1, keepdims=True) + square_1N - 2 * jnp.matmul(q, x.T, precision="highest")
        return sums[0] + distance_QN, sums[1] + square_1N

    zeros_QN = jnp.zeros((queries_QD.shape[0], images_ND.shape[0]), jnp.float32)
    distance_QN, square_1N = jax.lax.fori_loop(0, num_chunks, add_chunk, (zeros_QN, zeros_QN[:1]))
    return distance_QN, square_1N[0]


def _chunks(size: int) -> tuple[int, int]:
    num_chunks = -(-size // _CHUNK)
    return num_chunks, -(-size // num_chunks)


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
        _search_tile(queries_QD[start : start + tile], images_ND, k, _tile_exclude(exclude, start, start + tile))
        for start in range(0, len(queries_QD), tile)
    ]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _tile_exclude(exclude, start: int, stop: int):
    pairs = [(rows[(rows >= start) & (rows < stop)] - start, indices) for rows, indices in exclude]
    return [(rows, indices) for rows, indices in pairs if len(rows)]


def _search_tile(queries_QD, images_ND, k, exclude):
    pixels = images_ND.dtype == np.uint8
    best = _Best(len(queries_QD), k)
    norms_Q = None if pixels else np.linalg.norm(queries_QD.astype(np.float64), axis=1)
    error_factor = (_CHUNK + _chunks(queries_QD.shape[1])[0] + 16) * UNIT_ROUNDOFF
    padded_QD = jnp.asarray(_pad_rows(queries_QD, _rounded(len(queries_QD))))
    for start, block_ND, scores in _scored_blocks(padded_QD, images_ND, len(queries_QD), pixels):
        num_rows = len(block_ND)
        if pixels:
            low_QN = scores[0].astype(np.float64) * 2.0**_LOW_BITS + scores[1]
            margin_QN = 0.0
        else:
            low_QN, squares_N = scores[0].astype(np.float64), scores[1]
            if not np.isfinite(squares_N).all():
                bad = start + int(np.flatnonzero(~np.isfinite(squares_N))[0])
                raise UserError(
                    f"image {bad} holds values that are not finite (or too large for float32): mend it or leave it out"
                )
            margin_QN = error_factor * (norms_Q[:, None] + np.sqrt(squares_N.astype(np.float64))[None, :]) ** 2
            low_QN -= margin_QN
        for rows, indices in exclude:
            inside = indices[np.searchsorted(indices, start) : np.searchsorted(indices, start + num_rows)]
            low_QN[np.ix_(rows, inside - start)] = np.inf
        rows, columns = best.candidates(low_QN, margin_QN)
        distances = low_QN[rows, columns] if pixels else difference_squares(queries_QD, block_ND, rows, columns)
        best.merge(rows, columns + start, distances)
    scale = PIXEL_SCALE if pixels else 1.0
    return best.indices_QK, np.sqrt(best.squares_QK) * scale


def _scored_blocks(queries_QD, images_ND, num_queries: int, pixels: bool) -> Iterator:
    """Yields (start, images [n, D], scores as host arrays), the next block being read and scored meanwhile."""
    size, count = images_ND.shape[1], len(images_ND)
    rows = max(1, min(count, max(64, _BLOCK_VALUES // size), max(64, _SCORE_VALUES // num_queries), (1 << 27) // size + 1))
    scores_fn = _pixel_scores if pixels else _float_scores

    def score(start):
        block_ND = _read(images_ND, start, start + rows)
        # The last block is padded, so that one compiled program serves all of them.
        return block_ND, scores_fn(queries_QD, _pad_rows(block_ND, rows))

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(score, 0)
        for start in range(0, count, rows):
            block_ND, scores = ahead.result()
            if start + rows < count:
                ahead = pool.submit(score, start + rows)
            high, low = (np.asarray(part)[..., : len(block_ND)] for part in scores)
            yield start, block_ND, (high[:num_queries], low[:num_queries] if pixels else low)


def _read(images_ND: np.ndarray, start: int, stop: int) -> np.ndarray:
    """A block of rows. Pages of a memory map are given back at once, for the system would count them as this process's memory."""
    source = images_ND.source if isinstance(images_ND, Rows) else images_ND
    if not isinstance(source, np.memmap):
        return np.ascontiguousarray(images_ND[start:stop])
    block_ND = np.array(images_ND[start:stop])
    if source.mode in ("r", "r+"):  # a private map could lose what was written to it
        source._mmap.madvise(mmap.MADV_DONTNEED)
    return block_ND


def _rounded(count: int) -> int:
    """Few distinct numbers of queries, so few compilations."""
    return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32


def _pad_rows(array_ND: np.ndarray, rows: int) -> np.ndarray:
    return array_ND if len(array_ND) == rows else np.pad(array_ND, ((0, rows - len(array_ND)), (0, 0)))


def as_float(array: np.ndarray) -> np.ndarray:
    """uint8 pixels -> float32 in [-1, 1]; floats -> float32."""
    array = np.asanyarray(array)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return array.astype(np.float32, copy=False)


def difference_squares(queries_QD, block_ND, rows, columns) -> np.ndarray:
    """float64 [M]: ‖q - x‖² of each pair from its differences, a bounded number of pairs at a time."""
    squares = np.empty(len(rows))
    step = max(1, _BLOCK_VALUES // queries_QD.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = queries_QD[rows[part]].astype(np.float64) - block_ND[columns[part]]
        squares[part] = np.einsum("md,md->m", difference, difference)
    return squares


class _Best:
    """The k best of each query so far, by (squared distance, index)."""

    def __init__(self, num_queries: int, k: int):
        self.squares_QK = np.full((num_queries, k), np.inf)
        self.indices_QK = np.full((num_queries, k), -1, np.int64)

    def candidates(self, low_QN, margin_QN) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of all that may enter, given scores that lie at most 2 margins below the true value.

        A later image with the same distance as the k-th best loses the tie; within the margin it cannot be told yet and
        stays in.
        """
        k = self.squares_QK.shape[1]
        below = low_QN < self.squares_QK[:, -1:]
        crowded = np.flatnonzero(below.sum(axis=1) > k) if low_QN.shape[1] > k else ()
        if len(crowded):
            high = low_QN[crowded] + 2 * (margin_QN[crowded] if np.ndim(margin_QN) else margin_QN)
            kth = np.partition(high, k - 1, axis=1)[:, k - 1 : k]
            below[crowded] &= low_QN[crowded] <= kth
        return np.nonzero(below)

    def merge(self, rows, indices, squares) -> None:
        """Enters candidates, sorted by row: one stable sort over all rows that have any."""
        if not len(rows):
            return
        k = self.squares_QK.shape[1]
        changed = np.unique(rows)
        all_rows = np.concatenate([np.repeat(changed, k), rows])
        all_squares = np.concatenate([self.squares_QK[changed].ravel(), squares])
        all_indices = np.concatenate([self.indices_QK[changed].ravel(), indices])
        order = np.lexsort((all_indices, all_squares, all_rows))
        starts = np.searchsorted(all_rows[order], changed)
        kept = order[starts[:, None] + np.arange(k)[None, :]]
        self.squares_QK[changed], self.indices_QK[changed] = all_squares[kept], all_indices[kept]
