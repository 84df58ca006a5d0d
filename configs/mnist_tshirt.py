"""MNIST T-Shirt (28x28): forget 606 copies of a T-shirt among the 60,000 MNIST digits. ReTrack's official recipe.

    python -m retrack_jax.main --config=configs/mnist_tshirt.py --config.mode=check     # what is needed, and how to get it
    python -m retrack_jax.main --config=configs/mnist_tshirt.py                         # ReTrack, seeds 0-9
    python -m retrack_jax.main --config=configs/mnist_tshirt.py:siss

The set is built from TFDS's mnist and fashion_mnist; `--config.data.format=parquet --config.data.dir=DIR` reads DIR/mnist and
DIR/fashion_mnist, parquet files of the Hugging Face hub, which need no TensorFlow (the files of the train split; others are
not read). Without `--config.checkpoint` the model is pretrained here, 117,500 steps of batch 128 (SISS's recipe), which needs
an accelerator. `--config.checkpoint` also takes SISS's own checkpoint (its folder `unet_ema` and config).

Hardware: one accelerator of 16 GB. Time and score to expect: we have not measured them on the real data; the
README says what we measured.
"""

from retrack_jax.config.base import base_config, with_method


def get_config(method=None):
    config = base_config("mnist_tshirt")
    config.targets = ("label:10",)
    config.seeds = tuple(range(10))
    config.log_every = 10
    config.checkpoint_every = 1000
    config.save_float = True  # frequency and the inception scores take floats in the official code

    config.data.source = "mnist_tshirt"
    config.data.copies = 606  # 1% of the set

    # SISS's network: three levels with attention in the second; otherwise diffusers' defaults.
    config.model.update(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )

    config.unlearn.siss.scale = config.unlearn.siss_no_is.scale = 5.0
    config.sampling.num_images = 50_000
    config.eval.mark_name = "T-shirt"
    config.eval.metrics = ("frequency", "fid", "inception_score", "inception_score_official", "nll_bits_per_dim")
    config.eval.score_network = "mnist_resnet"  # behind the inception scores; or features: the network behind fid
    config.eval.frequency_threshold = 10.0  # L2 in [0, 1] pixels; the nearest digit is at 11.49
    return with_method(config, method)
