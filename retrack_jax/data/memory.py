"""How much memory there is, for data that is checked against it before it is read."""

import sys
from pathlib import Path


def available_memory() -> int:
    """Returns the bytes that a process may still take: what Linux calls available, or the limit of its control group."""
    status = Path("/proc/meminfo")
    if not status.exists():  # not Linux
        return sys.maxsize
    lines = status.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    group = limit.read_text().strip() if limit.exists() else "max"
    return min(free, int(group)) if group.isdigit() else free
