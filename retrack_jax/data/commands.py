"""The shell commands that download what configs need: config.mode=check prints them, launch/download.sh runs them.

Each may be run again after an interruption; it replaces what is incomplete. What a source of data downloads is in its module.
There is no command (it is empty) that unpacks into a folder where the user has other files.
"""

import re
import shlex
from pathlib import Path

KAGGLE = "https://www.kaggle.com/api/v1/datasets/download/kenhas/data-unlearning-in-diffusion-models"
# Feature network -> files of its weights, any of which does, and the address of the folder with the first.
WEIGHTS = {
    "inception": (
        ("weights-inception-2015-12-05-6726825d.pth",),
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0",
    ),
    "sscd": (
        tuple(f"sscd_disc_mixup.{kind}.pt" for kind in ("torchscript", "torchvision", "classy")),
        "https://dl.fbaipublicfiles.com/sscd-copy-detection",
    ),
    "CLIP RN50": (
        ("RN50.pt", "RN50.safetensors"),
        "https://openaipublic.azureedge.net/clip/models/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    ),
}
MNIST_FILE = "mnist.pt"  # of the classifier of the official MNIST experiment


def hub(what: str, folder: Path) -> str:
    """Downloads a repository of the Hugging Face hub, or the files that are named after it, to `folder`."""
    return "" if _has_other_files(folder) else f"hf download {what} --local-dir {_quoted(folder)}"


def curl(url: str, file: Path) -> str:
    """Downloads one file. If the address has its SHA-256, or the start of it, nothing else gets the file's name."""
    digest = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth$", url)
    part = f"{file}.part" if digest else file
    get = f"curl -fL --connect-timeout 10 --create-dirs -o {_quoted(part)} {_quoted(url)}"
    if not digest:
        return get
    return f"{get} && sha256sum {_quoted(part)} | grep -q ^{digest[1] or digest[2]} && mv {_quoted(part)} {_quoted(file)}"


def unzip(url: str, inside: str, folder: Path, *more: str) -> str:
    """Downloads an archive and moves what is in the folder `inside` it, and the files `more`, to `folder`."""
    if _has_other_files(folder):
        return ""
    archive, part = (Path(f"{folder}.{ending}") for ending in ("zip", "part"))
    wanted = " ".join(_quoted(name) for name in (f"{inside}/*", *more))
    # Links, not mv: that moves no folder onto one which an interrupted try has left.
    parts = [
        f"mkdir -p {_quoted(folder)}",
        curl(url, archive),
        f"rm -rf {_quoted(part)}",
        f"unzip -q {_quoted(archive)} {wanted} -d {_quoted(part)}",
        *(f"cp -lf {_quoted(part / name)} {_quoted(folder)}/" for name in more),
        f"cp -rlf {_quoted(part / inside)}/. {_quoted(folder)}/",
        f"rm -r {_quoted(part)} {_quoted(archive)}",
    ]
    return " && ".join(parts)


def kaggle_folder(archive: str, inside: str, folder: Path, *more: str) -> str:
    """`unzip` of one of the archives that the authors of SISS published: `datasets` or `checkpoints`."""
    return unzip(f"{KAGGLE}-{archive}", inside, folder, *more)


def unzip_file(url: str, inside: str, folder: Path) -> str:
    """Downloads an archive and takes the file `inside` it to `folder`."""
    archive = folder / "archive.zip"
    take = f"unzip -q -j -o {_quoted(archive)} {_quoted(inside)} -d {_quoted(folder)}"
    return f"{curl(url, archive)} && {take} && rm {_quoted(archive)}"


def _has_other_files(folder: Path) -> bool:
    """Whether files are in `folder` that no earlier try of a command has left there."""
    tries = (folder / ".cache" / "huggingface", Path(f"{folder}.zip"), Path(f"{folder}.part"))
    return folder.is_dir() and any(folder.iterdir()) and not any(path.exists() for path in tries)


def _quoted(value) -> str:
    return shlex.quote(str(value))
