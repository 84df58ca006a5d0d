"""How much memory there is, for data that is checked against it before it is read."""

import re
from pathlib import Path

import psutil

_CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_memory(group: Path = _CONTROL_GROUP) -> int:
    """Returns the bytes that a process may still take: what the system calls available, or what the control group leaves.

    `group` is the folder of a control group (version 2); one without `memory.max` has no limit. File pages that were not
    used lately count as free, as they do for the system.
    """
    free, limit = psutil.virtual_memory().available, group / "memory.max"
    most = limit.read_text().strip() if limit.exists() else "max"
    if most == "max":
        return free
    droppable = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    used = int((group / "memory.current").read_text()) - int(droppable[1])
    return max(0, min(free, int(most) - used))
