"""Images a second of our sampling against diffusers' DDPMPipeline: the same weights, steps and batch, float32, in turns A B A B.

    .venv-parity/bin/python -m tests.benchmarks.sampling_speed [--network digits] [--images 512] [--batch 128] [--steps 50]
        [--rounds 5] [--results=docs/results]

diffusers writes a pipeline with random weights into a folder and both sides load it: `DDPMPipeline.from_pretrained` in one
process, `import_diffusers` in another. Before the clock starts both networks are compared on one input. What is timed is a user's
call: from keys or a generator to a NumPy array of images in [0, 1].
"""

import tempfile

from tests.benchmarks.measure import Table, compare, parser_of
from tests.benchmarks.networks import NETWORKS, config_of


def write_pipeline(network: str, folder: str) -> None:
    """Writes a DDPMPipeline with random weights; diffusers' initial output layer is not zero, so the network does answer."""
    from diffusers import DDPMPipeline, DDPMScheduler

    from tests.benchmarks.theirs import make_model

    DDPMPipeline(unet=make_model(network), scheduler=DDPMScheduler()).save_pretrained(folder)


def difference(network: str, folder: str) -> float:
    """Returns how far the two networks' answers to one input are apart, relative to their size."""
    import jax
    import numpy as np
    import torch
    from diffusers import DDPMPipeline

    from retrack_jax.checkpoints import import_diffusers

    size, channels = config_of(network)["sample_size"], config_of(network)["in_channels"]
    x, t = np.random.default_rng(0).standard_normal((4, size, size, channels), np.float32), np.array([0, 1, 500, 999])
    with torch.no_grad():
        unet = DDPMPipeline.from_pretrained(folder).unet
        theirs = unet(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t)).sample.permute(0, 2, 3, 1).numpy()
    module, params = import_diffusers(folder)
    ours = np.asarray(jax.jit(module.apply)({"params": params}, x, t.astype(np.int32)))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--network", default="digits", choices=NETWORKS)
    for name, default in (("images", 512), ("batch", 128), ("steps", 50), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("images", "batch", "steps")}
    with tempfile.TemporaryDirectory() as folder:
        write_pipeline(arguments.network, folder)
        apart = difference(arguments.network, folder)
        if not apart < 1e-5:
            raise SystemExit(f"error: the two networks differ by {apart:.1e}; nothing was measured")
        table = Table("sampling_speed", "CPU devices", "ours, images/s", "diffusers, images/s", "ratio")
        for devices in (2, 1):
            found = compare("pipeline", arguments.rounds, {"num_devices": devices}, folder=folder, **sizes)
            pairs, rates = (
                found["ratio_of_each_pair"],
                (arguments.images / found[side]["seconds"] for side in ("ours", "pytorch")),
            )
            ratio = f"{found['ratio']:.2f} ({min(pairs):.2f} to {max(pairs):.2f} over the pairs)"
            table.add(f"{devices}", *(f"{rate:.1f}" for rate in rates), ratio)
    table.write(arguments.results, "python -m tests.benchmarks.sampling_speed")


if __name__ == "__main__":
    main()
