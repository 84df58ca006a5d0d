"""The shell commands that get what configs need: config.mode=check prints them, launch/download.sh runs them."""

from pathlib import Path

KAGGLE = "https://www.kaggle.com/api/v1/datasets/download/kenhas/data-unlearning-in-diffusion-models"
# Feature network -> its file, and where it comes from.
NETWORKS = {
    "inception": (
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    "sscd": (
        "sscd_disc_mixup.torchscript.pt",
        "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt",
    ),
    "CLIP RN50": (
        "RN50.pt",
        "https://openaipublic.azureedge.net/clip/models/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    ),
}
# Other files of the same weights that do as well.
ALSO = {
    "inception": (),
    "sscd": ("sscd_disc_mixup.torchvision.pt", "sscd_disc_mixup.classy.pt"),
    "CLIP RN50": ("RN50.safetensors",),
}


def checkpoint_command(source: str, folder: Path) -> str:
    """Returns what gets the checkpoint that the paper's config for `source` starts from; empty for a source that has none."""
    if source == "celebahq":
        return f"hf download google/ddpm-ema-celebahq-256 --local-dir {folder}"
    if source == "concepts":
        return f"hf download CompVis/stable-diffusion-v1-4 --local-dir {folder}"
    if source == "cifar10":
        archive = "https://github.com/VainF/Diff-Pruning/releases/download/v0.0.1/ddpm_ema_cifar10.zip"
        return unzip(archive, "ddpm_ema_cifar10", folder)
    if source == "mnist_tshirt":
        return unzip(f"{KAGGLE}-checkpoints", "checkpoints/mnist-tshirt/base/checkpoint-117500", folder)
    return ""


def unzip(url: str, inside: str, folder: Path, *more: str) -> str:
    """Downloads an archive and moves what is in the folder `inside` it, and the files `more`, to `folder`."""
    archive, part = f"{folder}.zip", f"{folder}.part"
    wanted = " ".join(f"'{name}'" for name in (f"{inside}/*", *more))
    return (
        f"mkdir -p {folder} && curl -fL --connect-timeout 10 -o {archive} '{url}' && unzip -q {archive} {wanted} -d {part} && "
        + "".join(f"mv {part}/{name} {folder}/ && " for name in more)
        + f"find {part}/{inside} -mindepth 1 -maxdepth 1 -exec mv -t {folder} {{}} + && rm -r {part} {archive}"
    )


def unzip_file(url: str, inside: str, folder: Path) -> str:
    """Downloads an archive and takes the file `inside` it to `folder`."""
    archive = folder / "archive.zip"
    get = f"mkdir -p {folder} && curl -fL --connect-timeout 10 -o {archive} '{url}'"
    return f"{get} && unzip -q -j -o {archive} '{inside}' -d {folder} && rm {archive}"
