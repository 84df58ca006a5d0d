"""How a process finds the others, and how it ends where they wait for it."""

import os
import signal
import subprocess
import sys

import jax
import pytest

from retrack_jax.checks import UserError
from retrack_jax.cli import process


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call to jax's own set-up of several processes, which is not made; no variable names any."""
    for name in [name for name in os.environ if name.startswith(("RETRACK_", "SLURM_", "JAX_PLATFORMS"))]:
        monkeypatch.delenv(name)
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


@pytest.mark.parametrize(
    "values", [("host:1", "2", "2"), ("host:1", "-1", "0"), ("nonsense", "2", "0"), ("host:1", "two", "0"), ("", "2", "0")]
)
def test_flags_that_name_no_set_of_processes_are_one_line(joined, monkeypatch, values):
    for name, value in zip(("COORDINATOR", "PROCESSES", "PROCESS"), values, strict=True):
        if value:
            monkeypatch.setenv(f"RETRACK_{name}", value)
    with pytest.raises(UserError, match=f"are {values[0]!r}, {values[1]!r}, {values[2]!r}; set all three or none"):
        process.join_processes()
    assert joined == []


@pytest.mark.parametrize("tasks", ["2", "abc"])
def test_a_slurm_step_without_its_other_variables_is_one_line(tasks, monkeypatch):
    """By jax's own set-up: of the variables that SLURM sets there is only the number of tasks."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RETRACK_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    with pytest.raises(UserError, match="cannot join the other processes by the variables of SLURM"):
        process.join_processes()


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


@pytest.mark.parametrize(
    ("tasks", "visible", "warned"), [("1(x2)", "0,1,2,3", True), ("4(x2)", "0,1,2,3", False), ("1(x2)", "0", False)]
)
def test_a_slurm_task_that_leaves_gpus_idle_is_warned_of(tasks, visible, warned, monkeypatch, caplog):
    """jax gives each task of SLURM one GPU, however many there are."""
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, value in (("default_backend", "gpu"), ("process_count", 2), ("local_device_count", 1)):
        monkeypatch.setattr(jax, name, lambda value=value: value)
    process.warn_of_idle_accelerator()
    assert ("1 of the 4 GPUs of this node are used" in caplog.text) == warned


LASTING = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
from retrack_jax.cli.process import catch_termination
from retrack_jax.cli.terminal import outlive_terminal
outlive_terminal()
stop = catch_termination()
print("begun", file=sys.stderr, flush=True)
sys.stdin.read()
before = stop()
print("nobody reads this", file=sys.stderr, flush=True)
print("nor this", flush=True)
sys.exit(75 if stop() and not before else 1)
"""


def test_a_broken_connection_is_a_lost_terminal():
    """A command over ssh without a terminal gets no SIGHUP; what it prints next finds no reader."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = subprocess.Popen([sys.executable, "-c", LASTING], **pipes)
    assert child.stderr.readline() == b"begun\n"
    for pipe in (child.stdout, child.stderr, child.stdin):
        pipe.close()
    assert child.wait(60) == 75


def test_a_lost_terminal_stops_like_a_termination(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
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


RESTART = """
import os, pathlib, sys
from retrack_jax.cli import huge_pages
huge_pages._POLICY = pathlib.Path(sys.argv[1])
huge_pages.restart_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="transparent huge pages are Linux's")
@pytest.mark.parametrize(
    "policy, before, after",
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "None"),
        ("always madvise [never]", None, "None"),
        ("", None, "None"),
    ],
)
def test_huge_pages_are_asked_for_once_and_where_they_matter(policy, before, after, tmp_path):
    """The process that started is the one that ends, with its own arguments, quotes and blanks among them."""
    (file := tmp_path / "enabled").write_text(policy)
    given = os.environ | ({"GLIBC_TUNABLES": before} if before else {})
    if before is None:
        given.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-c", RESTART, str(file), "--a=b c", '"']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=given)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.split(" ", 2) == [str(process.pid), after, "['--a=b c', '\"']\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="transparent huge pages are Linux's")
def test_a_system_without_huge_pages_goes_on(tmp_path):
    out = subprocess.run([sys.executable, "-c", RESTART, str(tmp_path / "none")], capture_output=True, text=True, check=True)
    assert out.stdout.endswith("[]\n") and not out.stderr
