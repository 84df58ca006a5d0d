"""How much memory there is, for data that is checked against it before it is read."""

from pathlib import Path

import psutil


def available_memory() -> int:
    """Returns the bytes that a process may still take: what the system calls available, or the limit of its control group."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    group = limit.read_text().strip() if limit.exists() else "max"
    return min(free, int(group)) if group.isdigit() else free
