"""The benchmark of full-size networks fails where training did nothing, or broke the weights."""

import pytest

from tests.benchmarks.full_size import check_moved


def test_weights_must_be_finite_and_move():
    check_moved("cifar10", {"a": 1e-5, "b": 2e-5, "['to_k']['bias']": 0.0})
    for bad, message in ((float("nan"), "1 of 2 tensors are not finite .*: b"), (0.0, "1 of 2 tensors did not move .*: b")):
        with pytest.raises(SystemExit, match=message):
            check_moved("cifar10", {"a": 1e-5, "b": bad})
