"""Models and data sets of the Hugging Face hub by their ids: only the files that are needed, in the hub client's own cache.

An id is `org/name`, or `org/name@revision` for a branch, tag or commit. A file or folder of that name wins over the hub.
"""

import re
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from retrack_jax.checks import UserError

_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# The hub has no organization of the first three names; the others are what paths here usually begin with.
_OF_PATHS = ("datasets/", "models/", "spaces/", "checkpoints/", "runs/")
_OF_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".parquet")
# From the best to the worst: a network's weights may lie in a folder several times.
_WEIGHTS = [re.compile(rf"(diffusion_pytorch_model|pytorch_model|model){middle}{ending}(\.index\.json)?")
            for middle in (r"(-\d+-of-\d+)?", r"\..*") for ending in (r"\.safetensors", r"\.bin")]  # fmt: skip
_TEXTS = re.compile(r".*\.(json|txt)|spiece\.model|(README|LICEN[CS]E|NOTICE|COPYING).*", re.IGNORECASE)


def is_id(name) -> bool:
    """Whether `name` can only be an id of the hub: it has its form, and no file or folder has that name."""
    text = str(name)
    of_path = text.startswith(_OF_PATHS) or text.endswith(_OF_FILES)
    return bool(_ID.fullmatch(text)) and not of_path and not Path(text).exists()


def local_model(name) -> Path:
    """Returns the folder (or file) of a model: `name` itself, or, if it is an id, the hub's files, downloaded when needed.

    Raises:
      UserError: the hub has no such model, does not give it, or cannot be reached, and its cache does not hold all of it.
    """
    return snapshot(str(name), model_files) if is_id(name) else Path(name).expanduser()


def model_files(paths: Iterable[str]) -> list[str]:
    """Returns those of a model's files that its networks are read from: of weights in several formats one, safetensors first."""
    needed: list[str] = []
    folders: dict[PurePosixPath, list[str]] = {}
    for path in map(PurePosixPath, paths):
        folders.setdefault(path.parent, []).append(path.name)
    for folder, names in folders.items():
        kinds = [[name for name in names if kind.fullmatch(name)] for kind in _WEIGHTS]
        weights = next((kind for kind in kinds if kind), [])
        others = {name for kind in kinds for name in kind}.difference(weights)
        needed += [str(folder / name) for name in names if name in weights or (_TEXTS.fullmatch(name) and name not in others)]
    return needed


def text_files(paths: Iterable[str]) -> list[str]:
    """Returns those of a model's files that are no weights: configs, the tokenizer, license and card."""
    return [path for path in model_files(paths) if _TEXTS.fullmatch(PurePosixPath(path).name) and ".index." not in path]


def id_of(folder) -> str | None:
    """Returns the id of the model that the hub's cache keeps in `folder` or around it, else None."""
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", f"{Path(folder).absolute()}/")
    return f"{found[1]}/{found[2]}" if found else None


@lru_cache(maxsize=32)
def snapshot(name: str, choose: Callable[[Iterable[str]], list[str]], kind: str = "model", *, download: bool = True) -> Path:
    """Returns a folder with the files of a repository that `choose` picks from the names of all; asks the hub once a process.

    Without a network, what an earlier download left whole is taken.

    Args:
      name: the id.
      choose: from the paths of all files to those that are needed.
      kind: `model` or `dataset`.
      download: False takes only what the cache holds whole, and asks nobody.

    Raises:
      UserError: the hub does not have it, does not give it, or cannot be reached, and the cache does not hold all of it.
    """
    from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repository, revision = _ID.fullmatch(name).group("repository", "revision")
    where: dict[str, Any] = {"repo_type": kind, "revision": revision}
    what = f"{'data set' if kind == 'dataset' else kind} {name}"
    try:
        try:
            commit = HfApi().resolve_revision(repository, **where, local_files_only=not download)
            where["revision"] = commit
            names = [file.path for file in get_cached_repo_tree(repository, **where)]
        except errors.CachedRepoTreeNotFoundError:
            if not download:
                raise
            names = HfApi().list_repo_files(repository, **where)
        files = [escape(file) for file in choose(names)]
        return Path(snapshot_download(repository, **where, allow_patterns=files, local_files_only=not download))
    except UserError:
        raise
    except errors.GatedRepoError as error:
        url = f"{constants.ENDPOINT}/{repository}"
        raise UserError(f"the {what} is gated: ask for access at {url}, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        hint = "correct the name, or log in with `hf auth login` if it is private"
        raise UserError(f"no folder {name}, and no {what} at {constants.ENDPOINT}; {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{constants.ENDPOINT}/{repository} has no revision {revision!r}; correct what follows the @") from error
    except Exception as error:  # of the client, of what it uses to reach the hub, or of the disk
        whole = f"the hub's cache {constants.HF_HUB_CACHE} does not hold all of it"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"no folder {name}, the {what} cannot be downloaded from {constants.ENDPOINT} and {whole}; connect to a network and "
            f"run the same command again, or give a folder ({reason})"
        ) from error
