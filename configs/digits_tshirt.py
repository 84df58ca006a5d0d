"""Digits T-Shirt: forget a T-shirt that a model of handwritten digits has memorized. Embedded data, no download.

    python -m retrack_jax.main --config=configs/digits_tshirt.py            # ReTrack, seed 0
    python -m retrack_jax.main --config=configs/digits_tshirt.py:all --config.seeds=0,1,2   # every method, one comparison

Hardware: any CPU; two cores are enough. Time and scores: README.md, measured.
"""

from retrack_jax.config.base import base_config, with_method


def get_config(method=None):
    config = base_config("digits_tshirt")
    config.targets = ("label:10",)
    config.save_float = True  # frequency is measured on floats

    config.data.source = "digits_tshirt"
    config.data.copies = 95  # 5.02% of 1,892 images

    config.model.update(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )

    config.pretrain.num_steps = 1500
    config.pretrain.batch_size = 64
    config.pretrain.learning_rate = 1e-3
    config.pretrain.warmup_steps = 100
    config.pretrain.ema_max_decay = 0.995
    config.checkpoint_every = 250
    config.log_every = 10

    # ReTrack's recipe for MNIST T-Shirt at this model's size.
    config.unlearn.num_steps = 50
    config.unlearn.batch_size = 64
    config.unlearn.learning_rate = 1e-4
    config.unlearn.retrack.lam = 0.005
    config.unlearn.num_neighbors = 10

    # XLA runs convolutions as narrow as these on one core; two devices use two cores.
    config.compute.cpu_devices = 2

    config.sampling.num_images = 2000
    config.sampling.batch_size = 500
    config.eval.metrics = ("frequency", "fid", "kid", "precision", "recall", "nll_bits_per_dim", "forget_loss")
    config.eval.features = "digits"
    config.eval.mark_name = "T-shirt"
    # No digit is nearer to the T-shirt than 3.5, and memorized samples are nearer than 0.6. Halfway, so that none is missed.
    config.eval.frequency_threshold = 2.0
    # Lambda and s are the official values for MNIST T-Shirt. The rates were chosen for each method from one grid
    # (tests/benchmarks/sweeps.py: 5e-5, 1e-4 and 2e-4 on seed 100); ReTrack, SISS and vanilla keep the rate above.
    config.unlearn.siss.scale = config.unlearn.siss_no_is.scale = 5.0
    config.unlearn.erasediff.learning_rate = config.unlearn.neggrad.learning_rate = 5e-5
    return with_method(config, method)
