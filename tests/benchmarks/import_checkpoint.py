"""Time and memory to import a checkpoint of google/ddpm-celebahq-256's size (113.7 M parameters, 455 MB).

    python -m tests.benchmarks.import_checkpoint

Prints a line for each kind of file: seconds for `import_diffusers`, and the rise of the process's peak resident memory during it
as a multiple of the file's size. Each import runs in a process of its own, after the package has been imported. The `.bin` kinds
are written by PyTorch, so they are measured where it is installed (the environment of `make parity`), and left out with a note
elsewhere.
"""

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from retrack_jax.checkpoints import export_diffusers, import_diffusers
from retrack_jax.models.unet2d import UNet2D

CELEBAHQ = UNet2D(
    sample_size=256,
    block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    attention_head_dim=None,
)
WEIGHTS = "diffusion_pytorch_model"


def write(folder: Path) -> None:
    """Writes the model with random weights as safetensors, and from it the other kinds."""
    shapes = jax.eval_shape(CELEBAHQ.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,), jnp.int32))["params"]
    numbers = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape, dtype=np.float32), shapes)
    export_diffusers(folder / "safetensors", CELEBAHQ, params)
    export_diffusers(folder / "safetensors float16", CELEBAHQ, jax.tree.map(lambda leaf: leaf.astype(np.float16), params))
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is not installed here: .bin is not measured")
        return
    import torch
    from safetensors.torch import load_file

    state = load_file(folder / "safetensors" / f"{WEIGHTS}.safetensors")
    for kind, new in (("bin, zip", True), ("bin, sequence", False)):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_bytes((folder / "safetensors" / "config.json").read_bytes())
        torch.save(state, folder / kind / f"{WEIGHTS}.bin", _use_new_zipfile_serialization=new)


def resident(field: str) -> int:
    """Returns VmRSS or VmHWM (the peak) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(folder: Path) -> None:
    """Imports the model in `folder` and prints what it cost."""
    jnp.zeros(1).block_until_ready()
    size = sum(file.stat().st_size for file in folder.glob(f"{WEIGHTS}.*"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = resident("VmRSS"), time.perf_counter()
    _, params = import_diffusers(folder)
    jax.block_until_ready(params)
    seconds, rise = time.perf_counter() - start, resident("VmHWM") - before
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{folder.name:20s} {count / 1e6:6.1f} M parameters, file {size / 1e6:4.0f} MB: {seconds:5.2f} s", end="")
    print(f", peak memory {rise / size:4.2f} x file")


def main() -> None:
    """Writes the files once and measures each in its own process."""
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        for folder in sorted(Path(name).iterdir()):
            subprocess.run([sys.executable, "-m", "tests.benchmarks.import_checkpoint", str(folder)], check=True)


if __name__ == "__main__":
    main()
