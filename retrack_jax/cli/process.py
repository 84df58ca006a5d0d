"""Process set-up: devices, other processes, the compilation cache, signals and logs; then the run."""

import glob
import importlib.util
import logging
import os
import re
import signal
import sys
import time
import warnings

from ml_collections import ConfigDict

from retrack_jax.checks import Preempted, UserError, check_int
from retrack_jax.cli.exit_status import DONE, PREEMPTED

_LAST_WORDS_SECONDS = 1.0


def run_command(config: ConfigDict, workdir: str) -> int:
    """Sets the process up, runs the config and returns the exit status."""
    set_up_logs()
    stop = catch_termination()
    set_up_jax(config.compute.cpu_devices)
    from retrack_jax.run.sweep import run

    try:
        run(config, workdir, should_stop=stop)
    except Preempted as reason:
        print(f"preempted: {reason}; everything is saved, the same command continues", file=sys.stderr)
        return PREEMPTED
    return DONE


def set_up_logs() -> None:
    """Our messages go to standard error, one line each; the libraries' only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("retrack_jax").setLevel(logging.INFO)
    # A failed save raises, and becomes our one line; the library's own tracebacks of it, and of its other tasks, would bury that.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _quiet_late_callbacks(sys.unraisablehook)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # After a failed save, whose error was raised already.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    # A warning is a line for the user, not a place in our source.
    warnings.showwarning = lambda message, *place, **more: logging.getLogger(__name__).warning("%s", message)


def _quiet_late_callbacks(show):
    """TensorStore's callbacks may arrive after a failed save closed their event loop; the failure itself was raised already."""

    def hook(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    return hook


def catch_termination():
    """Returns a function that says whether SIGTERM has arrived, or SIGHUP, a lost terminal: the loops then save and stop."""
    arrived = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup asks to outlive the terminal
            signal.signal(number, lambda number, frame: arrived.append(number))
    return lambda: bool(arrived)


def is_one_of_many() -> bool:
    """Whether other processes work on the same run."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def leave(status: int) -> int:
    """Returns `status`; but a failure of one process of several ends that process here and now.

    At its exit jax waits five minutes for the others, while they wait for this one in a collective, and the launcher, which would
    end them, waits for this one to be gone.
    """
    if status in (DONE, PREEMPTED) or not is_one_of_many():
        return status
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(_LAST_WORDS_SECONDS)  # the others end with their coordinator: they may have something to say of their own
    os._exit(status)


def set_up_jax(cpu_devices: int = 1) -> None:
    """Joins the other processes, warns of an idle accelerator, and keeps compiled programs in the user's cache folder.

    Args:
      cpu_devices: devices that the CPU counts as, where the environment does not say (`JAX_NUM_CPU_DEVICES`, `XLA_FLAGS`).
    """
    import jax

    check_int("config.compute.cpu_devices", cpu_devices, 1)
    split_cpu(cpu_devices)

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/retrack_jax/xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    join_processes()
    warn_of_idle_accelerator()


def split_cpu(count: int) -> None:
    """Makes the CPU `count` devices, for XLA runs narrow convolutions on one core whatever the number of cores.

    Not where the environment says how many, nor where jax has started already, as in a notebook.
    """
    import jax

    said = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count == 1 or said:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logging.getLogger(__name__).info("jax has started already: config.compute.cpu_devices=%d has no effect", count)


def join_processes() -> None:
    """Connects to the other processes where the environment names them: explicit variables, SLURM, or a Cloud TPU slice."""
    import jax

    if jax.distributed.is_initialized():
        return
    # jax's preemption service would take SIGTERM over from `catch_termination`: several processes would never hear of it.
    jax.config.update("jax_enable_preemption_service", False)
    if any(name in os.environ for name in ("RETRACK_COORDINATOR", "RETRACK_PROCESSES", "RETRACK_PROCESS")):
        coordinator, count, index = _named_processes()
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _initialize("RETRACK_COORDINATOR", coordinator, count, index)
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # SLURM_NTASKS is set outside srun too, where there is one process
        _initialize("the variables of SLURM")
    elif uses_tpu():
        try:
            jax.distributed.initialize()  # of a slice of one host too, where it changes nothing
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(
                f"the workers of this TPU slice were not found from the environment, nor from its metadata server ({error}); set "
                "RETRACK_COORDINATOR, RETRACK_PROCESSES and RETRACK_PROCESS (docs/running_at_scale.md)"
            ) from error


def _named_processes() -> tuple[str, int, int]:
    """Returns where process 0 is, how many there are and which one this is, as the environment says."""
    values = [os.environ.get(f"RETRACK_{name}", "") for name in ("COORDINATOR", "PROCESSES", "PROCESS")]
    coordinator, count, index = values
    right = re.fullmatch(r".+:\d+", coordinator) and count.isdecimal() and index.isdecimal() and int(index) < int(count)
    if not right:
        raise UserError(
            f"RETRACK_COORDINATOR, RETRACK_PROCESSES and RETRACK_PROCESS are {', '.join(map(repr, values))}; "
            "set all three or none: HOST:PORT of process 0, how many processes, and which this one is, from 0"
        )
    return coordinator, int(count), int(index)


def _initialize(source: str, *arguments) -> None:
    """Joins the processes that `source` names; what is wrong with it becomes one line."""
    import jax

    try:
        jax.distributed.initialize(*arguments)
    except Exception as error:  # each of jax's cluster environments, and the connection, have their own
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"cannot join the other processes by {source} ({problem}); see docs/running_at_scale.md") from error


def uses_tpu() -> bool:
    """Whether jax will use a TPU of this machine: the devices are there, and libtpu is installed.

    Not by variables of the environment: a Cloud TPU VM has none. Its metadata server knows the slice's members, and jax asks it.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "")
    wanted = not chosen or "tpu" in chosen
    return wanted and has_tpu_devices() and importlib.util.find_spec("libtpu") is not None


def has_tpu_devices() -> bool:
    """Whether this machine has device files as those of a TPU."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def num_visible_gpus() -> int:
    """Returns how many NVIDIA GPUs this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(glob.glob("/dev/nvidia[0-9]*")) if chosen is None else len([name for name in chosen.split(",") if name])


def warn_of_idle_accelerator() -> None:
    """Warns where a GPU or TPU is present but jax can only use the CPU, or a task of SLURM fewer GPUs than there are."""
    import jax

    log = logging.getLogger(__name__)
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if jax.default_backend() == "gpu" and tasks and jax.process_count() > 1:
        used, visible = int(tasks[0]) * jax.local_device_count(), num_visible_gpus()
        if used < visible:
            how = f"one task drives one GPU, so start as many: --ntasks-per-node={visible}"
            log.warning("%d of the %d GPUs of this node are used; %s", used, visible, how)
    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return
    if os.path.exists("/dev/nvidia0"):
        how = 'install it with `pip install -e ".[cuda]"` or `make demo JAX=cuda`'
        log.warning("an NVIDIA GPU is present but jax runs on the CPU; %s", how)
    elif has_tpu_devices():
        how = 'install it with `pip install -e ".[tpu]"` or `make demo JAX=tpu`'
        log.warning("a TPU seems to be present but jax runs on the CPU; %s", how)
