"""How much memory is free, from the files of a control group."""

import psutil

from retrack_jax.data.memory import available_memory

GIB = 1 << 30


def test_a_control_group_leaves_what_its_processes_do_not_hold(tmp_path):
    free = psutil.virtual_memory().available
    assert available_memory(tmp_path) > free // 2  # no limit

    def group(most, current, inactive):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_anon 5\ninactive_file {inactive}\nactive_file 3\n")

    group("max", 5, 0)
    assert available_memory(tmp_path) > free // 2
    group(3000, 2500, 0)
    assert available_memory(tmp_path) == 500
    group(3000, 2500, 1200)
    assert available_memory(tmp_path) == 1700
    group(3000, 3100, 0)
    assert available_memory(tmp_path) == 0
    group(10**6 * GIB, 0, 0)
    assert available_memory(tmp_path) <= 1.5 * free
