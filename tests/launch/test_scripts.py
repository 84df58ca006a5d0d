"""The launch scripts: what --dry-run prints is what would run, it runs nothing, and mistakes are one line with status 2.

The launcher of local processes is also run for real, with a stand-in for the interpreter that shows what it was given.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
CONFIG = "--config=configs/digits_tshirt.py:siss"
HEARS_CTRL_C = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # in a script's background the tests may not
TPU = ["--name", "slice", "--zone", "us-central2-b"]
COMMANDS = {
    "cpu_processes.sh": ["2", CONFIG],
    "gpu_local.sh": [CONFIG],
    "gpu_slurm.sbatch": [CONFIG, "--workdir=/shared/x"],
    "tpu_vm.sh": [*TPU, CONFIG, "--workdir=gs://bucket/x"],
}


def launch(script, *arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30
    )


@pytest.fixture
def no_tools(tmp_path):
    """A PATH on which the tools that cost money or need hardware leave a trace when they are called."""
    for tool in ("gcloud", "srun", "scontrol", "nvidia-smi"):
        path = tmp_path / tool
        path.write_text(f'#!/bin/sh\ntouch "{tmp_path}/called-{tool}"\n')
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_prints_and_does_nothing(script, no_tools):
    done = launch(script, "--dry-run", *COMMANDS[script], PATH=f"{no_tools}:{os.environ['PATH']}", SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert f"-m retrack_jax.main {CONFIG}" in done.stdout
    assert not list(no_tools.glob("called-*"))


@pytest.mark.parametrize("script", [*COMMANDS, "download.sh"])
def test_help_shows_the_usage(script):
    done = launch(script, "--help", SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 0 and f"launch/{script}" in done.stdout and "--dry-run" in done.stdout
    assert not done.stdout.lstrip().startswith("#")


@pytest.mark.parametrize(
    "script,arguments,words",
    [
        ("cpu_processes.sh", [], "number of processes"),
        ("cpu_processes.sh", ["zero", CONFIG], "number of processes"),
        ("cpu_processes.sh", ["2"], "own flags"),
        ("cpu_processes.sh", ["--devices", "0", "2", CONFIG], "--devices is '0'"),
        ("cpu_processes.sh", ["--device", "2", "2", CONFIG], "unknown option --device"),
        ("gpu_local.sh", [], "own flags"),
        ("gpu_local.sh", ["--gpus", "a,b", CONFIG], "--gpus is 'a,b'"),
        ("download.sh", [], "config file first"),
        ("download.sh", ["--dry", "configs/cifar10.py"], "unknown option --dry"),
        ("gpu_slurm.sbatch", [CONFIG], "--workdir"),
        ("gpu_slurm.sbatch", [CONFIG, "--workdir=/x"], "sbatch launch/gpu_slurm.sbatch"),
        ("tpu_vm.sh", [CONFIG, "--workdir=gs://b/x"], "--name and --zone"),
        ("tpu_vm.sh", ["--name", "--zone", "z", CONFIG], "--name needs a value"),
        ("tpu_vm.sh", [*TPU, CONFIG], "--workdir=gs://"),
    ],
)
def test_mistakes_are_one_line(script, arguments, words):
    environment = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": ""}
    done = launch(script, *arguments, **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_a_word_with_spaces_stays_one_word():
    done = launch("gpu_local.sh", "--dry-run", CONFIG, "--config.targets=a b,it's")
    line = done.stdout.strip().splitlines()[-1].removeprefix("would run: ")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.splitlines()
    assert words[-1] == "--config.targets=a b,it's"


def test_tpu_creates_installs_runs_on_all_workers_and_deletes():
    done = launch(
        "tpu_vm.sh", "--dry-run", *TPU, "--type", "v4-32", "--project", "p", "--spot", "--delete", CONFIG, "--workdir=gs://b/x"
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("would run: ")]
    verbs = [line.split("tpu-vm ")[1].split()[0] for line in lines if "tpu-vm" in line]
    assert verbs == ["create", "scp", "ssh", "ssh", "delete"]
    assert "--accelerator-type=v4-32" in lines[0] and "--spot" in lines[0] and "--project=p" in lines[0]
    assert ".[tpu]" in done.stdout and all("--worker=all" in line for line in lines if " scp " in line)
    short = launch("tpu_vm.sh", "--dry-run", *TPU, "--skip-create", "--skip-install", CONFIG, "--workdir=gs://b/x").stdout
    assert short.count("would run") == 1 and "--worker=all" in short
    files = ("--setup", "gcloud storage cp -r gs://b/datasets .")
    done = launch("tpu_vm.sh", "--dry-run", *TPU, "--skip-create", *files, CONFIG, "--workdir=gs://b/x").stdout
    lines = [line for line in done.splitlines() if " ssh " in line or line.startswith("cd")]
    assert "cd retrack_jax && gcloud storage cp -r gs://b/datasets ." in done and "retrack_jax.main" in lines[-1]


def make_checkout(folder, body=""):
    """Makes a checkout of the scripts alone, with a .venv whose interpreter runs a shell body; returns it and its GPU plugin."""
    checkout = folder / "checkout"
    shutil.copytree(LAUNCH, checkout / "launch")
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\n{body}\n")
    python.chmod(0o755)
    plugin = checkout / ".venv" / "lib" / "python3.11" / "site-packages" / "jax_cuda12_plugin"
    plugin.mkdir(parents=True)
    return checkout, plugin


def test_a_signal_to_gpu_local_is_one_to_the_run(no_tools):
    """The stand-in saves and ends with 75 as a preempted run does; an orphan would outlive the script and save for nobody."""
    saves = f'trap "touch {no_tools}/saved; exit 75" TERM'
    checkout, _ = make_checkout(no_tools, f"{saves}; touch {no_tools}/up; while :; do sleep 0.05; done")
    environment = {**os.environ, "PATH": f"{no_tools}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "launch/gpu_local.sh", CONFIG], cwd=checkout, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not (no_tools / "up").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75 and (no_tools / "saved").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_download_asks_the_interpreter_of_the_checkout(no_tools):
    """As `make demo` leaves it, called from elsewhere; the stand-in finds that nothing is missing."""
    checkout, _ = make_checkout(no_tools, 'echo "$@"')
    command = ["bash", checkout / "launch" / "download.sh", "configs/cifar10.py", "--config.data.dir=x"]
    done = subprocess.run(command, cwd=no_tools, env={**os.environ, "PYTHON": ""}, capture_output=True, text=True, timeout=30)
    flags = "--config=configs/cifar10.py --config.data.dir=x --config.mode=check"
    assert done.returncode == 0 and done.stdout == f"-m retrack_jax.main {flags}\n"


def test_slurm_queues_a_preempted_job_again(no_tools):
    """With a stand-in srun that exits with 75, as a preempted run does."""
    (no_tools / "srun").write_text(f"#!/bin/sh\necho $@ > {no_tools}/asked\nexit 75\n")
    checkout, plugin = make_checkout(no_tools)
    environment = {"PATH": f"{no_tools}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "7"}
    done = launch("gpu_slurm.sbatch", CONFIG, "--workdir=/x", **environment)
    assert done.returncode == 75 and (no_tools / "called-scontrol").exists()
    # Else a cluster's KillOnBadExit ends the tasks that still save as soon as one has, and srun's status is another.
    assert (no_tools / "asked").read_text().startswith("--kill-on-bad-exit=0 --wait=")
    (no_tools / "srun").write_text("#!/bin/sh\nexit 2\n")
    (no_tools / "called-scontrol").unlink()
    assert launch("gpu_slurm.sbatch", CONFIG, "--workdir=/x", **environment).returncode == 2
    assert not (no_tools / "called-scontrol").exists()
    plugin.rmdir()
    done = launch("gpu_slurm.sbatch", CONFIG, "--workdir=/x", **environment)
    assert done.returncode == 2 and "knows no GPU" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def stand_in(tmp_path):
    """Returns a function that makes an executable which runs a shell body, to be started in the interpreter's place."""

    def make(body):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return {"PYTHON": str(path), "PORT": "12345"}

    return make


def test_processes_get_their_number_their_devices_and_the_same_command(stand_in, tmp_path):
    environment = stand_in(
        'echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $RETRACK_COORDINATOR $RETRACK_PROCESSES $RETRACK_PROCESS $*"'
    )
    done = launch("cpu_processes.sh", "--devices", "3", "--logs", str(tmp_path / "logs"), "3", CONFIG, **environment)
    assert done.returncode == 0
    assert done.stdout == f"cpu 3 127.0.0.1:12345 3 0 -m retrack_jax.main {CONFIG}\n"
    for index in (1, 2):
        text = (tmp_path / "logs" / f"process{index}.log").read_text()
        assert text == f"cpu 3 127.0.0.1:12345 3 {index} -m retrack_jax.main {CONFIG}\n"


def test_the_first_failure_ends_the_others_and_is_the_status(stand_in, tmp_path):
    environment = stand_in('if [ "$RETRACK_PROCESS" = 1 ]; then exit 7; else exec sleep 60; fi') | {"GRACE_SECONDS": "1"}
    began = time.monotonic()
    done = launch("cpu_processes.sh", "--logs", str(tmp_path / "logs"), "3", CONFIG, **environment)
    assert done.returncode == 7 and time.monotonic() - began < 20


def test_termination_is_passed_on_and_waited_for(stand_in, tmp_path):
    save = f'trap "sleep 0.3; touch {tmp_path}/saved-$RETRACK_PROCESS; exit 75" TERM'
    body = f"{save}; touch {tmp_path}/up-$RETRACK_PROCESS; while :; do sleep 0.05; done"
    command = ["bash", str(LAUNCH / "cpu_processes.sh"), "--logs", str(tmp_path / "logs"), "2", CONFIG]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **stand_in(body)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("up-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}


def test_a_second_interrupt_ends_processes_that_are_still_saving(stand_in, tmp_path):
    asked = f'trap "touch {tmp_path}/asked-$RETRACK_PROCESS" TERM'
    body = f"{asked}; touch {tmp_path}/up-$RETRACK_PROCESS; while :; do sleep 0.05; done"
    command = ["bash", str(LAUNCH / "cpu_processes.sh"), "--logs", str(tmp_path / "logs"), "2", CONFIG]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **stand_in(body)}, stderr=subprocess.DEVNULL, **HEARS_CTRL_C)
    for sign in ("up", "asked"):
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob(f"{sign}-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGKILL
