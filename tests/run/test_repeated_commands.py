"""Commands that are repeated in one Python process share what they compile, so that their memory does not grow."""

import gc

import jax

from retrack_jax.main import main
from tests.tiny import flags


def test_a_repeated_command_compiles_nothing_and_keeps_nothing(tmp_path):
    counts = []
    for name in ("first", "second", "third", "fourth"):
        assert main(["retrack_jax", "--config=configs/digits_tshirt.py", *flags(tmp_path / name)]) == 0
        gc.collect()
        counts.append((len(jax.live_arrays()), len(jax.devices()[0].client.live_executables())))
    assert counts[1] == counts[2] == counts[3], counts
