"""How a process finds the others, and how it ends where they wait for it."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import pytest

from retrack_jax.checks import UserError
from retrack_jax.cli import process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each call to jax's own set-up of several processes, which is not made; no variable names any."""
    for name in [name for name in os.environ if name.startswith(("RETRACK_", "SLURM_", "JAX_PLATFORMS"))]:
        monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **limit: calls.append(arguments))
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
    "values",
    [("h:1", "2", "2"), ("h:70000", "2", "0"), ("h:1", "-1", "0"), ("nonsense", "2", "0"), ("h:1", "two", "0"), ("", "2", "0")],
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
    def fail(**limit):
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
from retrack_jax.cli import terminal
terminal.open_closed_streams()
terminal.drop_what_cannot_be_printed()
stop = terminal.catch_termination(1)
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


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "<&- >&- 2>&-"])
def test_streams_that_take_nothing_stop_nothing(streams, tmp_path):
    """Not even the interpreter's last flush fails, and no file gets the number of a closed stream and what is printed there."""
    program = (
        "import sys; from retrack_jax.cli import terminal as t; t.open_closed_streams(); t.drop_what_cannot_be_printed()\n"
        "file = open(sys.argv[1], 'w')\n"
        "[print('\\u2014', 'words' * 9999, file=stream) for stream in (sys.stdout, sys.stderr) for _ in range(2)]\n"
        "file.write('whole'); file.close()\n"
    )
    (tmp_path / "program.py").write_text(program)
    line = f"{sys.executable} {tmp_path}/program.py {tmp_path}/file {streams}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "whole" and b"Error" not in done.stderr


COMMAND = ["-m", "retrack_jax", "--config=configs/digits_tshirt.py"]


def the_command(tmp_path, **variables):
    """Runs the command with these variables and nothing else about jax; asserts status 2 and one line, and returns the line."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "RETRACK_", "SLURM_"))}
    command = [sys.executable, *COMMAND, f"--workdir={tmp_path}/work"]
    done = subprocess.run(command, cwd=ROOT, env=clean | variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout and not (tmp_path / "work").exists()
    return done.stderr


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("JAX_PLATFORMS", "nope", "Backend 'nope' is not in the list of known backends"),
        ("JAX_NUM_CPU_DEVICES", "x", '"x" for JAX flag jax_num_cpu_devices'),
        ("JAX_NUM_CPU_DEVICES", "0", "JAX_NUM_CPU_DEVICES=0: "),
        ("XLA_FLAGS", "--xla_no_such_flag=1", "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1"),
        ("XLA_FLAGS", "--xla_backend_optimization_level=abc", "Couldn't interpret value abc"),
        ("JAX_ENABLE_X64", "1", "float64 is enabled"),
        ("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg", "random numbers are by unsafe_rbg"),
        ("JAX_THREEFRY_PARTITIONABLE", "0", "jax_threefry_partitionable is off"),
    ],
)
def test_variables_that_jax_cannot_use_are_one_line(name, value, words, tmp_path):
    assert words in the_command(tmp_path, **{"JAX_PLATFORMS": "cpu", name: value})


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="jax knows CUDA here")
def test_cuda_where_there_is_none_is_one_line(tmp_path):
    assert "cannot start with JAX_PLATFORMS=cuda" in the_command(tmp_path, JAX_PLATFORMS="cuda")


@pytest.mark.parametrize("given, expected", [("", 1800), ("--xla_cpu_collective_call_terminate_timeout_seconds=77", 77)])
def test_cpu_devices_wait_half_an_hour_for_each_other(given, expected):
    """XLA's own 60 seconds ended runs on crowded cores. XLA reads the flag here, and would refuse another."""
    script = (
        "import os; from retrack_jax.cli import process; process.import_jax(); process.split_cpu(2)\n"
        "import jax; print(jax.device_count(), os.environ['XLA_FLAGS'])"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**env, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": given}, capture_output=True, text=True
    )
    flag = f"--xla_cpu_collective_call_terminate_timeout_seconds={expected}"
    assert done.stdout.split() == ["2", flag], done.stderr[-2000:]


def test_float64_that_was_enabled_in_python_is_refused():
    with jax.enable_x64(True), pytest.raises(UserError, match="float64 is enabled"):
        process.set_up_jax()


def joining(index: int, port: int, **more) -> dict[str, str]:
    variables = {"COORDINATOR": f"127.0.0.1:{port}", "PROCESSES": "2", "PROCESS": str(index), **more}
    return {"JAX_PLATFORMS": "cpu", **{f"RETRACK_{name}": value for name, value in variables.items()}}


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another port" in the_command(tmp_path, **joining(0, taken.getsockname()[1]))


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_come_are_one_line(index, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert "not all were there after 1 s" in the_command(tmp_path, **joining(index, port, JOIN_SECONDS="1"))


def test_termination_while_the_others_are_waited_for_ends_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, *COMMAND, f"--workdir={tmp_path}/work"]
        environment = os.environ | joining(1, port)
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        time.sleep(2)
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 75 and time.monotonic() - began < 5
    assert errors.startswith("preempted: ") and errors.count("\n") == 1


def test_a_failure_of_one_of_many_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(process.os, "_exit", ended.append)
    monkeypatch.setattr(process, "_LAST_WORDS_SECONDS", 0.0)
    assert process.leave(2) == 2 and ended == []
    monkeypatch.setattr(process, "_is_joined", lambda: True)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(process_index=lambda: 0))
    assert process.leave(75, at_once=False) == 75 and ended == []
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
