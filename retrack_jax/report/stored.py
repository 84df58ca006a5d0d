"""Reads the first samples of a `samples.npz` and leaves the rest packed: 10,000 images of 256 x 256 x 3 are 2 GB."""

import zipfile

import numpy as np
from etils import epath

from retrack_jax.checks import UserError
from retrack_jax.files import npy_header


def first_images(path, count: int) -> dict[str, np.ndarray]:
    """Returns name -> the first `count` rows of each uint8 image array in the `.npz` at `path`; empty if there is no file.

    Raises:
      UserError: the file is not a whole `.npz`.
    """
    path = epath.Path(path)
    if not path.exists():
        return {}
    arrays = {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    shape, fortran, dtype = npy_header(stream)
                    if dtype != np.uint8 or len(shape) != 4 or fortran:
                        continue
                    rows = min(count, shape[0])
                    data = stream.read(rows * int(np.prod(shape[1:])))
                    arrays[member.removesuffix(".npy")] = np.frombuffer(data, np.uint8).reshape(rows, *shape[1:])
    except Exception as error:  # zipfile, zlib and NumPy each raise their own
        raise UserError(f"{path} is not a whole .npz file ({error}); delete it and run again") from error
    return arrays
