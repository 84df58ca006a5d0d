"""What a number came from: versions, devices, data."""

import importlib.metadata
import platform

import jax

import retrack_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "scann", "diffrax", "numpy")


def environment() -> dict:
    """Returns versions and devices as plain JSON."""
    versions = {"retrack_jax": retrack_jax.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = jax.devices()
    return {
        "versions": versions,
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "processes": jax.process_count()},
        "system": f"{platform.system()} {platform.machine()}",
    }
