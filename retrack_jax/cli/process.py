"""Process set-up: logs, devices, other processes and the compilation cache; then the run."""

import glob
import importlib.util
import logging
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable

from ml_collections import ConfigDict

from retrack_jax.checks import Preempted, UserError, check, check_int

_JOINING = "joining the other processes"  # a thread's name
_LAST_WORDS_SECONDS = 1.0
# XLA ends the process, by SIGABRT, once a CPU device has waited 60 s for another of it: on crowded cores, that is no fault.
_PATIENCE = "xla_cpu_collective_call_terminate_timeout_seconds"
_PATIENCE_SECONDS = 1800


def run_command(config: ConfigDict, workdir: str, should_stop: Callable[[], bool]) -> None:
    """Sets the process up and runs the config."""
    set_up_logs()
    set_up_jax(config.compute.cpu_devices, should_stop)
    from retrack_jax import parallel
    from retrack_jax.config.reading import read_config
    from retrack_jax.run import sweep

    parallel.stop_together(should_stop, "the first stage")
    sweep.run(read_config(config), workdir, should_stop=should_stop)


def set_up_logs() -> None:
    """Our messages go to standard error, one line each; the libraries' only from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("retrack_jax").setLevel(logging.INFO)
    # A failed save raises, and becomes our one line; the library's own tracebacks of it, and of its other tasks, would bury that.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _show_unless_late
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # After a failed save, whose error was raised already.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    # A warning is a line for the user, not a place in our source.
    warnings.showwarning = lambda message, *place, **more: logging.getLogger(__name__).warning("%s", message)


def _show_unless_late(unraisable) -> None:
    """Hides TensorStore's callbacks that arrive after a failed save closed their event loop; the failure itself was raised."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def is_one_of_many() -> bool:
    """Whether other processes work on the same run, or are being waited for."""
    return _is_joining() or _is_joined()


def _is_joining() -> bool:
    return any(thread.name == _JOINING for thread in threading.enumerate())


def _is_joined() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and not _is_joining() and jax.distributed.is_initialized() and jax.process_count() > 1


def leave(status: int, *, at_once: bool = True) -> int:
    """Returns `status`; but a failure of one process of several ends that process here and now.

    At its exit jax waits five minutes for the others, while they wait for this one in a collective, and the launcher, which would
    end them, waits for this one to end.

    Args:
      at_once: False if the others stop by themselves. A process that still waits for the others ends here all the same.
    """
    if not is_one_of_many() or (_is_joined() and not at_once):
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    if _is_joined() and sys.modules["jax"].process_index() == 0:
        time.sleep(_LAST_WORDS_SECONDS)  # the others end with their coordinator, and may have something to say before
    os._exit(status)


def set_up_jax(cpu_devices: int = 1, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Joins the other processes, warns of an idle accelerator, and keeps compiled programs in the user's cache folder.

    Args:
      cpu_devices: devices that the CPU counts as, if the environment does not say (`JAX_NUM_CPU_DEVICES`, `XLA_FLAGS`).
      should_stop: asked while the other processes are waited for.

    Raises:
      UserError: the environment asks for what jax does not have or know, or for float64; the other processes are not there.
      Preempted: `should_stop` said so.
    """
    import_jax()
    import jax

    from retrack_jax import files, parallel

    parallel.check_settings()
    check_int("config.compute.cpu_devices", cpu_devices, 1)
    split_cpu(cpu_devices)

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.expanduser("~/.cache/retrack_jax/xla")
    try:
        files.check_writable(cache, "set JAX_COMPILATION_CACHE_DIR")
        jax.config.update("jax_compilation_cache_dir", cache)
    except UserError as error:
        logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    join_processes(should_stop)
    check_devices()
    warn_of_idle_accelerator()


def import_jax() -> None:
    """Imports jax. Raises `UserError` for a variable of the environment that jax or XLA does not understand.

    To be called before anything else imports jax, config files included: an error there would name a line of the file.
    """
    check_xla_flags()
    try:
        import jax  # noqa: F401
    except ValueError as error:  # which names the variable
        raise UserError(f"jax cannot use a variable of the environment: {error}; correct or unset it") from error


def check_xla_flags() -> None:
    """Raises `UserError` if XLA does not understand `XLA_FLAGS`: it ends the process that reads them, so a copy of this one does.

    A process that has imported jax already, such as a notebook, is not copied: jax may have threads.
    """
    flags = os.environ.get("XLA_FLAGS")
    if not flags or "jax" in sys.modules:
        return
    from jaxlib import xla_client

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 2)
        xla_client.CompileOptions()  # reads the flags
        os._exit(0)
    os.close(writer)
    with open(reader, errors="replace") as stream:
        said = stream.read().strip().splitlines()
    if os.waitpid(child, 0)[1]:
        reason = said[0].rpartition("] ")[2] if said else "XLA does not say why"  # after the time and the line of its source
        raise UserError(f"XLA_FLAGS is {flags!r}, which XLA refuses ({reason}); correct or unset it")


def check_devices() -> None:
    """Raises `UserError` if jax finds no device of the kind that the environment asks for."""
    import jax

    try:
        jax.local_devices()
    except Exception as error:  # a failed assertion among them, without words
        asked = ", ".join(f"{name}={os.environ[name]}" for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES") if name in os.environ)
        reason = str(error).partition(" (")[0].rstrip(".") or "no such device was found"
        hint = "correct or unset it, or install jax for that device" if asked else "JAX_PLATFORMS=cpu uses the CPU"
        raise UserError(f"jax cannot start with {asked or 'the devices of this machine'}: {reason}; {hint}") from error


def split_cpu(count: int) -> None:
    """Makes the CPU `count` devices, because XLA runs narrow convolutions on one core whatever the number of cores.

    Not if the environment says how many, nor if jax has started already, as in a notebook.
    """
    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    said = "JAX_NUM_CPU_DEVICES" in os.environ or "xla_force_host_platform_device_count" in flags
    if (count > 1 or said) and _PATIENCE not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{_PATIENCE}={_PATIENCE_SECONDS}".strip()
    if count == 1 or said:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        logging.getLogger(__name__).info("jax has started already: config.compute.cpu_devices=%d has no effect", count)


def join_processes(should_stop: Callable[[], bool] = lambda: False) -> None:
    """Connects to the other processes if the environment names them: explicit variables, SLURM, or a Cloud TPU slice."""
    import jax

    if jax.distributed.is_initialized():
        return
    # jax's preemption service would take SIGTERM over from `catch_termination`: several processes would never hear of it.
    jax.config.update("jax_enable_preemption_service", False)
    if any(name in os.environ for name in ("RETRACK_COORDINATOR", "RETRACK_PROCESSES", "RETRACK_PROCESS")):
        coordinator, count, index = _named_processes()
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        if index == 0:
            _check_port_is_free(coordinator)
        _initialize(f"RETRACK_COORDINATOR={coordinator}", should_stop, coordinator, count, index)
    elif os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # SLURM_NTASKS is set outside srun too, where there is one process
        _initialize("the variables of SLURM", should_stop)
    elif uses_tpu():
        # Of a slice of one host too, where it changes nothing.
        hint = "set RETRACK_COORDINATOR, RETRACK_PROCESSES and RETRACK_PROCESS if the metadata server does not know the slice"
        _initialize(f"the environment or metadata server of this TPU; {hint}", should_stop)


def _named_processes() -> tuple[str, int, int]:
    """Returns the address of process 0, how many processes there are and which one this is, as the environment says."""
    values = [os.environ.get(f"RETRACK_{name}", "") for name in ("COORDINATOR", "PROCESSES", "PROCESS")]
    coordinator, count, index = values
    address = re.fullmatch(r".+:(\d{1,5})", coordinator)
    right = address and 0 < int(address[1]) < 65536 and count.isdecimal() and index.isdecimal() and int(index) < int(count)
    if not right:
        raise UserError(
            f"RETRACK_COORDINATOR, RETRACK_PROCESSES and RETRACK_PROCESS are {', '.join(map(repr, values))}; "
            "set all three or none: HOST:PORT of process 0, how many processes, and which this one is, from 0"
        )
    return coordinator, int(count), int(index)


def _check_port_is_free(coordinator: str) -> None:
    """Raises `UserError` if another program listens at the port where process 0 is about to: jax would crash without a word."""
    family, everywhere = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "")
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server((everywhere, port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        why = os.strerror(error.errno)
        raise UserError(f"process 0 cannot listen at RETRACK_COORDINATOR={coordinator} ({why}); choose another port") from error


def _initialize(source: str, should_stop: Callable[[], bool], *arguments) -> None:
    """Joins the processes that `source` names, in another thread: jax hears no signal meanwhile, and at its own limit aborts.

    Raises:
      UserError: `source` is wrong, or not all the others came within RETRACK_JOIN_SECONDS (60 by default).
      Preempted: `should_stop` said so.
    """
    import jax

    said = os.environ.get("RETRACK_JOIN_SECONDS", "60")
    check(said.isdecimal() and 0 < int(said) < 1e6, f"RETRACK_JOIN_SECONDS is {said!r}; it must be a whole number of at least 1")
    errors = []

    def join() -> None:
        try:
            jax.distributed.initialize(*arguments, initialization_timeout=2 * int(said) + 60)
        except Exception as error:  # each of jax's cluster environments, and the connection, raises another kind
            errors.append(error)

    joining = threading.Thread(target=join, name=_JOINING, daemon=True)
    joining.start()
    deadline = time.monotonic() + int(said)
    while joining.is_alive():
        joining.join(0.1)
        if joining.is_alive() and should_stop():
            raise Preempted("stopped before all processes had met")
        check(
            not joining.is_alive() or time.monotonic() < deadline,
            f"cannot join the other processes by {source}: not all were there after {said} s (RETRACK_JOIN_SECONDS); start them "
            "together, and see docs/guide/cloud.md",
        )
    if errors:
        problem = " ".join(f"{type(errors[0]).__name__}: {errors[0]}".split())[:300]
        raise UserError(f"cannot join the other processes by {source} ({problem}); see docs/guide/cloud.md") from errors[0]


def uses_tpu() -> bool:
    """Whether jax will use a TPU of this machine: the devices are there, and libtpu is installed.

    The environment does not say: a Cloud TPU VM has no variable for it. Its metadata server knows the slice's members, and jax
    asks it.
    """
    chosen = os.environ.get("JAX_PLATFORMS", "")
    wanted = not chosen or "tpu" in chosen
    return wanted and has_tpu_devices() and importlib.util.find_spec("libtpu") is not None


def has_tpu_devices() -> bool:
    """Whether this machine has device files like those of a TPU."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def num_visible_gpus() -> int:
    """Returns how many NVIDIA GPUs this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(glob.glob("/dev/nvidia[0-9]*")) if chosen is None else len([name for name in chosen.split(",") if name])


def warn_of_idle_accelerator() -> None:
    """Warns if a GPU or TPU is present but jax can only use the CPU, or if a task of SLURM uses fewer GPUs than there are."""
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
