"""Huge pages for the arrays of the CPU backend, which XLA takes from the system anew in every step and gives back after it.

A step of the CIFAR-10 UNet touches over a gigabyte, which Linux maps in pages of 4 KiB, every time (what it costs:
docs/measurements/speed.md). With the tunable below glibc's malloc asks for pages of 2 MiB. glibc reads its
tunables before a program's first line and never again, so the command starts itself a second time: the same process id,
arguments and open files.
"""

import contextlib
import os
import sys
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Starts this command again with huge pages; returns where that changes nothing, or where the user set the tunable.

    It changes nothing where there is no Linux, and where its policy is not "madvise": then all get huge pages, or nobody does.
    Another libc than glibc, or glibc before 2.35, ignores the tunable.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    with contextlib.suppress(OSError):
        if TUNABLE in tunables or "[madvise]" not in _POLICY.read_text():
            return
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{TUNABLE}=1")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
