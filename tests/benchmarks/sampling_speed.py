"""Images a second of our sampling against diffusers' DDPMPipeline: the same weights, steps and batch, float32, in turns A B A B.

    .venv-parity/bin/python -m tests.benchmarks.sampling_speed [--network digits] [--images 512] [--batch 128] [--steps 50]
        [--rounds 5] [--devices 2] [--out FILE.json]

diffusers writes a pipeline with random weights into a folder and both sides load it: `DDPMPipeline.from_pretrained` in one
process, `import_diffusers` in another. Before the clock starts both networks are compared on one input. What is timed is a user's
call: from keys or a generator to a NumPy array of images in [0, 1].
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.measure import Worker, in_turns, peak_resident_bytes
from tests.benchmarks.networks import NETWORKS


class PipelineWorker(Worker):
    """One side in a process of its own, driven as the workers of measure.py are."""

    def __init__(self, side: str, arguments: argparse.Namespace, folder: str):
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.sampling_speed",
            "--worker",
            side,
            "--folder",
            folder,
        ]
        for name in ("images", "batch", "steps", "devices"):
            command += [f"--{name}", str(getattr(arguments, name))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start = self._read()
        self.turns = []


def write_pipeline(network: str, folder: str) -> None:
    """Writes a DDPMPipeline with random weights; diffusers' initial output layer is not zero, so the network does answer."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    config = {key: value for key, value in NETWORKS[network].items() if not key.startswith("_")}
    DDPMPipeline(unet=UNet2DModel(**config), scheduler=DDPMScheduler()).save_pretrained(folder)


def probe(size: int, channels: int):
    """Returns the input on which both networks are compared: x_t `[4, H, W, C]` and t `[4]`."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((4, size, size, channels)).astype(np.float32), np.array([0, 1, 500, 999])


def make_diffusers(arguments: argparse.Namespace):
    import numpy as np
    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(arguments.folder)
    pipeline.set_progress_bar_config(disable=True)
    x, t = probe(pipeline.unet.config.sample_size, pipeline.unet.config.in_channels)
    with torch.no_grad():
        answer = pipeline.unet(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)).sample.permute(0, 2, 3, 1).numpy()

    def run():
        generator = torch.Generator().manual_seed(0)
        batches = []
        for start in range(0, arguments.images, arguments.batch):
            count = min(arguments.batch, arguments.images - start)
            options = dict(batch_size=count, generator=generator, num_inference_steps=arguments.steps, output_type="np")
            batches.append(pipeline(**options).images)
        return np.concatenate(batches)

    return run, answer


def make_ours(arguments: argparse.Namespace):
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    from retrack_jax.checkpoints import import_diffusers, read_schedule_config
    from retrack_jax.diffusion import Schedule, make_eps_fn
    from retrack_jax.sampling import DDPM, generate, make_sample_fn, pmap_sample_fn

    module, params = import_diffusers(arguments.folder)
    schedule = Schedule.from_config(read_schedule_config(arguments.folder))
    eps_fn = make_eps_fn(module.apply, schedule)
    shape = (module.sample_size, module.sample_size, module.in_channels)
    x, t = probe(shape[0], shape[2])
    answer = np.asarray(jax.jit(eps_fn)(params, jnp.asarray(x), jnp.asarray(t, jnp.int32)))
    p_sample = pmap_sample_fn(make_sample_fn(eps_fn, DDPM.create(schedule, arguments.steps), shape))

    def run():
        return generate(p_sample, params, rng=jax.random.key(0), num_images=arguments.images, batch_size=arguments.batch)

    return run, answer


def work(arguments: argparse.Namespace) -> None:
    """One side: says that it is ready, then runs once for each line that it reads."""
    import numpy as np

    start = time.perf_counter()
    run, answer = {"ours": make_ours, "diffusers": make_diffusers}[arguments.worker](arguments)
    np.save(Path(arguments.folder) / f"{arguments.worker}.npy", answer)
    first = run()
    assert first.shape[0] == arguments.images and np.isfinite(first).all()
    print(json.dumps({"first_seconds": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(seconds | {"peak_bytes": peak_resident_bytes()}), flush=True)


def main(arguments: argparse.Namespace) -> dict:
    """Returns images per second of both sides and their ratio, above 1 where we are the faster."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(arguments.network, folder)
        workers = {side: PipelineWorker(side, arguments, folder) for side in ("ours", "diffusers")}
        ours, theirs = (np.load(Path(folder) / f"{side}.npy") for side in ("ours", "diffusers"))
        difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        if not difference < 1e-5:
            raise SystemExit(f"error: the two networks differ by {difference:.1e}; nothing was measured")
        sides = in_turns(workers, arguments.rounds)
    for side in sides.values():
        side["images_per_second"] = arguments.images / side["seconds"]
    pairs = zip(sides["diffusers"]["all_seconds"], sides["ours"]["all_seconds"], strict=True)
    return {
        "network": arguments.network, "images": arguments.images, "batch": arguments.batch, "steps": arguments.steps,
        "devices": arguments.devices, "networks_differ_by": difference, **sides,
        "ratio": sides["diffusers"]["seconds"] / sides["ours"]["seconds"],
        "ratio_of_each_pair": [round(theirs / ours, 3) for theirs, ours in pairs],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="digits", choices=NETWORKS)
    for name, default in (("images", 512), ("batch", 128), ("steps", 50), ("rounds", 5), ("devices", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker:
        work(parsed)
    else:
        result = main(parsed)
        text = json.dumps(result, indent=2)
        print(text)
        if parsed.out:
            Path(parsed.out).write_text(text + "\n")
