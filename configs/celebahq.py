"""CelebA-HQ 256: forget one face a run, the official ten. ReTrack's official recipe.

    launch/download.sh configs/celebahq.py                                              # checkpoint and data
    python -m retrack_jax.main --config=configs/celebahq.py                             # ReTrack, ten runs
    python -m retrack_jax.main --config=configs/celebahq.py:siss --config.targets=10001.jpg

Data: a folder of 30,000 JPEGs `00000.jpg`...; with `--config.data.format=tfds` TFDS's celeb_a_hq/256, whose names come from
your own tar. The checkpoint is `google/ddpm-ema-celebahq-256`.

Hardware: one accelerator of 24 GB (`--config.compute.remat=True` for less). Time and score to expect: we have not
measured them on the real data; the README says what we measured.
"""

from retrack_jax.config.base import base_config, with_method


def get_config(method=None):
    config = base_config("celebahq", pretrained_here=False)
    config.targets = tuple(f"{number}.jpg" for number in range(10_001, 10_011))
    config.checkpoint = "checkpoints/celeba_hq/pretrained/ddpm_ema_celebahq_256"

    config.data.source = "celebahq"
    config.data.dir = "datasets/celeba_hq_256"
    config.data.resolution = 256

    config.unlearn.num_steps = 40
    config.unlearn.batch_size = 64
    config.unlearn.accumulation = 16  # microbatches of 4; on more than 4 devices fewer of them, chosen by the run
    config.unlearn.learning_rate = 5e-6
    config.unlearn.siss.scale = config.unlearn.siss_no_is.scale = 500.0
    config.sampling.batch_size = 32
    config.eval.metrics = ("fid", "sscd", "nll_bits_per_dim")
    config.eval.fid_reference = "all"
    config.eval.grid_images = 25
    return with_method(config, method)
