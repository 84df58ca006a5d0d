"""A file of arrays with one flipped bit: what readers make of it is the right arrays or one line, wherever the bit is."""

import numpy as np
import pytest

from retrack_jax import files
from retrack_jax.checks import UserError
from retrack_jax.data.sources.npz import load_npz
from retrack_jax.sampling.generate import _read_parts

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1), dtype=np.uint8)


def user_images(path):
    return load_npz(path).images


def part_of_samples(path):
    return _read_parts(path.parent, "mine", 0, 6)[0]


def shown_samples(path):
    return files.read_npz(path, ("images",))["images"]


@pytest.mark.parametrize("read", [user_images, part_of_samples, shown_samples])
def test_right_or_one_line(tmp_path, read):
    path = tmp_path / "part-000000000-6.npz"
    files.write_npz(path, images=PIXELS, index=np.arange(6), fingerprint=np.array("mine"))
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(found, PIXELS)
    assert refused > len(content) / 3 / 3  # most of the file is data and names
