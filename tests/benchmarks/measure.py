"""Timing in turns: A B A B, each side in a process of its own that sleeps while the other runs, medians and their ratio.

A machine's speed drifts by tens of percent within minutes, so two numbers are comparable only if taken in turns;
processes of their own keep one library's spinning threads, caches and allocator out of the other's time.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

AT_START = os.getloadavg()[0]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers")


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Returns a benchmark's parser: its help is the module's docstring, and `--results` is where its tables are kept."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--results", type=Path, metavar="FOLDER", help="keep the tables, such as in docs/results")
    return found


def this_machine() -> str:
    """Returns what seconds depend on: processor, load and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{os.cpu_count()} x {cpu}, load average {AT_START:.1f} at the start; {named}"


class Table:
    """A table that is printed in Markdown as its rows come, and kept as docs/generate.py reads it.

    `machine` is what the numbers depend on, if not on this machine.
    """

    def __init__(self, name: str, *columns: str, machine: str = ""):
        self._name, self._columns, self._rows, self._machine = name, columns, [], machine or this_machine()
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def add(self, *cells: str) -> None:
        """Adds a row."""
        self._rows.append(cells)
        print(f"| {' | '.join(cells)} |", flush=True)

    def write(self, folder: Path | None, command: str) -> None:
        """Writes `folder`/NAME.json, if there is a folder."""
        from retrack_jax import __version__

        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        about = {"command": command, "version": __version__, "machine": self._machine, "date": f"{datetime.date.today()}"}
        lines = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in self._rows)
        head = json.dumps({**about, "columns": self._columns}, indent=2, ensure_ascii=False).removesuffix("\n}")
        (folder / f"{self._name}.json").write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')


def peak_resident_bytes() -> int:
    """Returns the most resident memory of this process since `forget_peak`, or ever.

    Not `ru_maxrss`: a process takes that over from its starter.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> None:
    """Makes `peak_resident_bytes` count from here on: what imports and compiling took once is not what a step takes."""
    ctypes.CDLL(None).malloc_trim(0)  # what they gave back, glibc's allocator may still hold
    Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """A process that waits to be told to run; see worker.py."""

    def __init__(self, side: str, job: str, **arguments: Any):
        spec = json.dumps({"side": side, "job": job, **arguments})
        command = [sys.executable, "-m", "tests.benchmarks.worker", spec]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start = self._read()
        self.turns: list[dict] = []

    def turn(self) -> None:
        """Runs twice and keeps what was measured of the second; see worker.py for why."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.turns.append(self._read())

    def close(self) -> dict[str, Any]:
        """Ends the process and returns the medians of all turns."""
        self._process.stdin.close()
        self._process.wait()
        medians = {key: statistics.median(turn[key] for turn in self.turns) for key in ("seconds", "cpu_seconds")}
        all_seconds = [round(turn["seconds"], 4) for turn in self.turns]
        return self.start | medians | {"all_seconds": all_seconds, "peak_bytes": self.turns[-1]["peak_bytes"]}

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}: {self._process.args}")
        return json.loads(line)


def in_turns(workers: dict[str, Worker], rounds: int) -> dict[str, dict]:
    """Returns `{name: medians}` after `rounds` rounds in which every worker has a turn, and closes them."""
    for _ in range(rounds):
        for worker in workers.values():
            worker.turn()
    return {name: worker.close() for name, worker in workers.items()}


def compare(job: str, rounds: int, ours: dict | None = None, theirs: dict | None = None, **arguments: Any) -> dict[str, Any]:
    """Returns both sides' medians for one job and `ratio`, their time over ours: above 1 we are the faster."""
    workers = {
        "ours": Worker("ours", job, **arguments, **(ours or {})),
        "pytorch": Worker("theirs", job, **arguments, **(theirs or {})),
    }
    result = in_turns(workers, rounds)
    pairs = zip(result["pytorch"]["all_seconds"], result["ours"]["all_seconds"], strict=True)
    return result | {
        "ratio": result["pytorch"]["seconds"] / result["ours"]["seconds"],
        "ratio_of_each_pair": [round(theirs / ours, 3) for theirs, ours in pairs],
        "memory_ratio": result["pytorch"]["peak_bytes"] / result["ours"]["peak_bytes"],
    }


def once(side: str, job: str, rounds: int = 3, **arguments: Any) -> dict[str, Any]:
    """Returns one side's medians, for measurements without a counterpart."""
    return in_turns({"only": Worker(side, job, **arguments)}, rounds)["only"]
