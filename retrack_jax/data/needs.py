"""One thing that a config reads: where it was looked for, what was found, and what to do without it."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from retrack_jax.checks import UserError
from retrack_jax.files import file_digest
from retrack_jax.weights.hub import snapshot

METRICS_LEFT_OUT = "its metrics are left out"


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A file, or a folder of them, that a config reads.

    Attributes:
      path: where it is, or was looked for.
      files: how many files it is.
      size: bytes in all.
      digest: SHA-256 of the file, or of the names and sizes of many files.
      command: the shell command that gets it; empty if `advice` says what to do instead.
      advice: what to do, in words.
      without: what a run does without it; empty if no run is possible without it.
    """

    description: str
    path: Path
    found: bool
    files: int = 0
    size: int = 0
    digest: str = ""
    command: str = ""
    advice: str = ""
    without: str = ""


def requirement(description: str, path: Path, found: list[Path], **how) -> Requirement:
    """Returns the requirement of `path` given the files of it that are there; an empty list is what is missing.

    Args:
      how: `command`, `advice` and `without`.
    """
    if not found:
        return Requirement(description=description, path=path, found=False, **how)
    sizes = [entry.stat().st_size for entry in found]
    if len(found) == 1:
        path, digest = found[0], file_digest(found[0])
    else:
        listing = "".join(f"{entry.relative_to(path)}\0{size}\n" for entry, size in zip(found, sizes, strict=True))
        digest = hashlib.sha256(listing.encode()).hexdigest()
    return Requirement(description=description, path=path, found=True, files=len(found), size=sum(sizes), digest=digest, **how)


def hub_need(kind: str, name: str, choose: Callable[[Iterable[str]], list[str]]) -> Requirement:
    """Returns the model or data set (`kind`) that `name` is on the hub; see `snapshot`. Nothing is downloaded."""
    command = f"hf download {name.partition('@')[0]}" + (" --repo-type=dataset" if kind == "dataset" else "")
    command += f" --revision={name.partition('@')[2]}" if "@" in name else ""
    what, how = f"{kind} of the hub", {"command": command, "without": "the run downloads what it needs"}
    try:
        folder = snapshot(name, choose, kind, download=False)
    except UserError:
        return Requirement(description=what, path=Path(name), found=False, **how)
    listed = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return requirement(what, folder, [folder / file for file in choose(listed)], **how)


def if_file(path: Path) -> list[Path]:
    """The file, if it is there."""
    return [path] if path.is_file() else []


def matching(folder: Path, *patterns: str) -> list[Path]:
    """The files in `folder` that one of the globs matches, sorted."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
