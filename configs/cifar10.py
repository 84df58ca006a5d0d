"""CIFAR-10 (32x32): forget one training image a run, the official ten. ReTrack's official recipe.

    launch/download.sh configs/cifar10.py                                               # checkpoint and data
    python -m retrack_jax.main --config=configs/cifar10.py                              # ReTrack, ten runs
    python -m retrack_jax.main --config=configs/cifar10.py:siss --config.targets=hf:10000

Targets are rows of the Hugging Face parquet files (`hf:10000`) or TFDS ids (`tfds:train_20000`, the same image); with
`--config.data.format=tfds` the data come from TFDS. The checkpoint is Diff-Pruning's `ddpm_ema_cifar10`.

Hardware: one accelerator of 16 GB. Drawing 10,000 images in 1000 steps, for each model, takes most of the time;
`--config.sampling.sampler=ddim --config.sampling.num_steps=50` is 20 times cheaper and gives other scores. Time and score to
expect: we have not measured them on the real data; the README says what we
measured.
"""

from retrack_jax.config.base import base_config, with_method


def get_config(method=None):
    config = base_config("cifar10", pretrained_here=False)
    config.targets = tuple(f"hf:{row}" for row in range(10_000, 10_010))
    config.checkpoint = "checkpoints/cifar10/pretrained/ddpm_ema_cifar10_32"

    config.data.source = "cifar10"
    config.data.dir = "datasets/cifar10"

    config.schedule.variance_type = "fixed_large"  # the checkpoint's scheduler_config.json says so too

    config.unlearn.num_steps = 60
    config.unlearn.learning_rate = 2e-5
    config.unlearn.retrack.lam = 0.02
    config.unlearn.siss.scale = config.unlearn.siss_no_is.scale = 5.0
    config.sampling.num_steps = 1000
    config.sampling.batch_size = 128
    config.eval.metrics = ("fid", "inception_score", "sscd", "nll_bits_per_dim")
    config.eval.fid_reference = "all"
    return with_method(config, method)
