"""Pickles that would bring Python down: deep tuples as keys, as classes, by torch.Size; copies without end."""

import io

import pytest

from retrack_jax.checks import UserError
from retrack_jax.weights.joblib_reader import JOBLIB
from retrack_jax.weights.pickle_machine import load
from retrack_jax.weights.torch_vocabulary import TORCH

START, STOP = b"\x80\x02", b"."
EMPTY_TUPLE, TUPLE1, NONE = b")", b"\x85", b"N"
SIZE = b"ctorch\nSize\n"
DEEP = EMPTY_TUPLE + TUPLE1 * 200_000
COPIES = b"](" + b"K\x01" * 200_000 + b"eq\x00" + (SIZE + b"h\x00" + TUPLE1 + b"R0") * 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"}" + DEEP + NONE + b"s", "tuples 101 deep"),
        (b"}(" + DEEP + NONE + b"u", "tuples 101 deep"),
        (b"".join([EMPTY_TUPLE, *[b"q\x000" + SIZE + b"]h\x00a" + TUPLE1 + b"R"] * 300]), "tuples 101 deep"),
        (DEEP + EMPTY_TUPLE + b"\x81", "tuples 101 deep"),
        (COPIES, "copies of"),
        (b"}(" + b"K\x01" * 200 + b"tNs", "a key of tuple with size 200"),
        (b"}" + b"\x8b" + (2000).to_bytes(4, "little") + b"\x01" * 2000 + b"Ns", "a key of int"),
    ],
    ids=["key", "keys", "size", "class", "copies", "wide key", "long key"],
)
def test_they_are_refused_in_one_line(body, words):
    with pytest.raises(UserError, match=words):
        load(io.BytesIO(START + body + STOP), "a.bin", TORCH)


def test_the_machine_has_the_same_bounds_for_joblib():
    with pytest.raises(UserError, match="tuples 101 deep"):
        load(io.BytesIO(START + DEEP + STOP), "k.joblib", JOBLIB)
