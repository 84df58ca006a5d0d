"""How a process finds the others, and how it ends where they wait for it."""

import signal

import jax
import pytest

from retrack_jax import process
from retrack_jax.checks import UserError


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call to jax's own set-up of several processes, which is not made; no variable names any."""
    for name in ("RETRACK_COORDINATOR", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(process, "uses_tpu", lambda: False)
    return calls


def test_alone_without_flags_slurm_or_tpu(joined):
    process.join_processes()
    assert joined == []


def test_flags_name_the_others(joined, monkeypatch):
    for name, value in (("COORDINATOR", "host:1"), ("PROCESSES", "4"), ("PROCESS", "3")):
        monkeypatch.setenv(f"RETRACK_{name}", value)
    process.join_processes()
    assert joined == [("host:1", 4, 3)]


def test_a_slurm_step_is_joined_but_not_an_allocation_alone(joined, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    process.join_processes()
    assert joined == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    process.join_processes()
    assert joined == [()]


def test_a_tpu_asks_its_metadata_server(joined, monkeypatch):
    monkeypatch.setattr(process, "uses_tpu", lambda: True)
    process.join_processes()
    assert joined == [()]


def test_a_tpu_without_a_cluster_is_one_clear_line(joined, monkeypatch):
    def fail():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(process, "uses_tpu", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="metadata server.*RETRACK_COORDINATOR"):
        process.join_processes()


def test_a_lost_terminal_stops_like_a_termination(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        stop = process.catch_termination()
        assert not stop()
        signal.raise_signal(signal.SIGHUP)
        assert stop()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_failure_of_one_of_many_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(process.os, "_exit", ended.append)
    monkeypatch.setattr(process, "_LAST_WORDS_SECONDS", 0.0)
    assert process.leave(2) == 2 and ended == []
    monkeypatch.setattr(process, "is_one_of_many", lambda: True)
    process.leave(0), process.leave(75)
    assert ended == []
    process.leave(2)
    assert ended == [2]
