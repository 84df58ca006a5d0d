"""The benchmark of full-size networks fails where training did nothing, or broke the weights."""

import numpy as np
import pytest

from tests.benchmarks.full_size import check_moved


def test_weights_must_be_finite_and_move():
    check_moved("cifar10", np.array([1e-5, 2e-5]))
    for bad, message in ((np.nan, "1 of 2 tensors are not finite"), (0.0, "1 of 2 tensors did not move")):
        with pytest.raises(SystemExit, match=message):
            check_moved("cifar10", np.array([1e-5, bad]))
