"""Process set-up: devices, other processes, the compilation cache, signals and logs; then the run."""

import logging
import os
import signal
import sys
import warnings

from ml_collections import ConfigDict

from retrack_jax.checks import UserError, check_int


def run_command(config: ConfigDict, workdir: str) -> int:
    """Sets the process up, runs the config and returns the exit status."""
    from retrack_jax.main import DONE, PREEMPTED

    set_up_logs()
    stop = catch_termination()
    set_up_jax(config.compute.cpu_devices)
    from retrack_jax.run import run
    from retrack_jax.train.loop import Preempted

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
    # A warning is a line for the user, not a place in our source.
    warnings.showwarning = lambda message, *place, **more: logging.getLogger(__name__).warning("%s", message)


def _quiet_late_callbacks(show):
    """TensorStore's callbacks may arrive after a failed save closed their event loop; the failure itself was raised already."""

    def hook(unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            show(unraisable)

    return hook


def catch_termination():
    """Returns a function that says whether SIGTERM has arrived: the loops then save and stop."""
    arrived = []
    signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    return lambda: bool(arrived)


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
    coordinator = os.environ.get("RETRACK_COORDINATOR")
    if coordinator:
        try:
            count, index = int(os.environ["RETRACK_PROCESSES"]), int(os.environ["RETRACK_PROCESS"])
        except (KeyError, ValueError) as error:
            raise UserError(
                "RETRACK_COORDINATOR is set, so RETRACK_PROCESSES (how many) and RETRACK_PROCESS (which, from 0) must be "
                "whole numbers"
            ) from error
        if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, count, index)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or _on_tpu_slice():
        jax.distributed.initialize()


def _on_tpu_slice() -> bool:
    return len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ


def warn_of_idle_accelerator() -> None:
    """Warns where a GPU or TPU is present but jax can only use the CPU."""
    import jax

    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS"):
        return
    log = logging.getLogger(__name__)
    if os.path.exists("/dev/nvidia0"):
        how = 'install it with `pip install -e ".[cuda]"` or `make demo JAX=cuda`'
        log.warning("an NVIDIA GPU is present but jax runs on the CPU; %s", how)
    elif os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
        how = 'install it with `pip install -e ".[tpu]"` or `make demo JAX=tpu`'
        log.warning("a TPU seems to be present but jax runs on the CPU; %s", how)
