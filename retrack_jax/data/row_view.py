"""Some rows of an array, as an array that reads only what is sliced."""

import numpy as np


class RowView:
    """Some rows of an array, read when they are sliced, so that a selection of a memory map is never copied whole.

    Attributes:
      source: the array, `[N, ...]`.
      dtype, ndim, shape: of the rows, `[R, ...]`.
    """

    def __init__(self, source: np.ndarray, rows: np.ndarray, *, flat: bool = False):
        self.source, self._rows, self._flat = source, rows, flat
        tail = source.shape[1:]
        self.dtype, self.shape = source.dtype, (len(rows), int(np.prod(tail))) if flat else (len(rows), *tail)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        rows = self._rows[index]
        values = self.source[rows]
        return values.reshape(*np.shape(rows), -1) if self._flat else values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def as_vectors(self) -> "RowView":
        """Returns the same rows, each as one vector: `[R, D]`."""
        return RowView(self.source, self._rows, flat=True)
