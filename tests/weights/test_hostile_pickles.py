"""Pickles that would bring Python down: deep tuples as keys, as classes, by torch.Size; copies without end."""

import io

import pytest

from retrack_jax.checks import UserError
from retrack_jax.weights.torch_pickle import load

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
        (COPIES, "copies more than any checkpoint"),
    ],
    ids=["key", "keys", "size", "class", "copies"],
)
def test_they_are_refused_in_one_line(body, words):
    with pytest.raises(UserError, match=words):
        load(io.BytesIO(START + body + STOP), "a.bin")
