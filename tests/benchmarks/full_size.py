"""configs/celebahq.py and configs/cifar10.py from the command line with networks of full size on this CPU.

    python -m tests.benchmarks.full_size [celebahq|cifar10 ...]

Random weights in the checkpoints' real layout, synthetic images in the real format, two optimizer steps (CelebA-HQ: batch 1
x 2), the export, and the export read back. Prints the time of each part and the peak memory of the command; exits with
status 1 where a tensor is not finite or has not moved.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.networks import NETWORKS

BATCH = {"celebahq": (2, 2), "cifar10": (16, 1)}  # images per step, microbatches


def write_checkpoint(folder: Path, name: str) -> int:
    """Random weights: CelebA-HQ's at the root, CIFAR-10's in unet/ and scheduler/. Returns the number of parameters."""
    import jax
    import jax.numpy as jnp

    from retrack_jax.checkpoints import export_diffusers
    from retrack_jax.diffusion import Schedule
    from retrack_jax.models.unet2d import UNet2D
    from tests.benchmarks.programs import random_arrays

    module = UNet2D.from_config(NETWORKS[name])
    size = NETWORKS[name]["sample_size"]
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros((1,), jnp.int32))["params"]
    params = random_arrays(shapes)
    target = folder / "unet" if name == "cifar10" else folder
    export_diffusers(target, module, params, schedule=Schedule.from_config({"num_train_timesteps": 1000}))
    if name == "cifar10":
        (folder / "scheduler").mkdir(exist_ok=True)
        for path in target.glob("scheduler_config.json"):
            path.rename(folder / "scheduler" / path.name)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def write_images(folder: Path, name: str) -> None:
    if name == "celebahq":
        from tests.benchmarks.neighbors import write_jpegs

        folder.mkdir()
        write_jpegs(folder, 64)
        return
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    encoded = []
    for image in np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    folder.mkdir()
    table = pyarrow.table({"img": encoded, "label": np.arange(500) % 10})
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")


def run(name: str, root: Path) -> None:
    from retrack_jax.checkpoints import import_diffusers

    count = write_checkpoint(root / "model", name)
    write_images(root / "images", name)
    batch, parts = BATCH[name]
    target = "00003.jpg" if name == "celebahq" else "hf:3"
    command = [sys.executable, "-m", "retrack_jax.main", f"--config=configs/{name}.py", f"--workdir={root / 'run'}"]
    command += [f"--config.checkpoint={root / 'model'}", f"--config.data.dir={root / 'images'}", f"--config.targets={target}"]
    command += [f"--config.data.cache_dir={root / 'cache'}", "--config.mode=unlearn", "--config.unlearn.num_steps=2"]
    command += [f"--config.unlearn.batch_size={batch}", f"--config.unlearn.accumulation={parts}"]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    (export,) = (root / "run").glob("retrack/*/diffusers")
    start = time.perf_counter()
    module, params = import_diffusers(export)
    reload = time.perf_counter() - start
    old = import_diffusers(root / "model")[1]
    import jax

    largest = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), params, old)
    moved = {jax.tree_util.keystr(path): change for path, change in jax.tree_util.tree_leaves_with_path(largest)}
    log = [json.loads(line) for path in (root / "run").rglob("log.jsonl") for line in path.read_text().splitlines()]
    print(
        f"{name}: {count / 1e6:.1f} M parameters, 2 steps of {batch} = {parts} x {batch // parts}: {seconds:.0f} s in all, peak "
        f"{peak / 2**30:.1f} GiB; reload {reload:.1f} s, moved by at most {max(moved.values()):.1e}"
    )
    print(f"  log: {log[-2:]}")
    check_moved(name, moved)


def check_moved(name: str, moved: dict[str, float]) -> None:
    """Exits with status 1, naming the tensors, unless each is finite and has moved; `moved` is the largest change of each.

    The biases of attention's keys have no gradient (models/attention.py `KeyProjection`) and so may stay.
    """
    infinite = [path for path, change in moved.items() if not np.isfinite(change)]
    still = [path for path, change in moved.items() if change == 0 and "['to_k']['bias']" not in path]
    for what, wrong in (("are not finite", infinite), ("did not move", still)):
        if wrong:
            raise SystemExit(f"{name}: {len(wrong)} of {len(moved)} tensors {what} after two steps: {', '.join(wrong)}")


def main(names: list[str]) -> None:
    for name in names or BATCH:
        with tempfile.TemporaryDirectory() as folder:
            run(name, Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
