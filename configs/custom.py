"""Your own model and images: a folder that diffusers saved, a folder of images, a list of file names to forget.

    python -m retrack_jax.main --config=configs/custom.py --workdir=runs/mine \\
        --config.checkpoint=MODEL_FOLDER --config.data.dir=IMAGE_FOLDER --config.targets=@forget.txt

`forget.txt` has one file name per line; all of them are forgotten together. The result is in
`runs/mine/retrack/seed0-forget.txt-.../`: the folder `diffusers`, which diffusers' from_pretrained reads, and `report.html`.
Images (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF; subfolders too) are scaled so that their shorter side is the model's size, and
the center is cut out.

Numbers that you do not set are chosen from the size and resolution S of the data (retrack_jax/config/rules.py), in line with
the official recipes: K = 10, or as many as remain if there are fewer; lambda = 0.02 f and rate = 2e-5 f with
f = (32/S)^(2/3) for S from 32 to 256, which gives the official values of CIFAR-10 (S = 32) and CelebA-HQ (S = 256); 60 steps
of 128 images up to S = 64, else 40 steps of 64 in 16 parts, of latents always in 16. `--config.unlearn.FIELD=VALUE` wins over
its rule, and for lambda `--config.unlearn.retrack.lam=VALUE`.

S is the side of what the network denoises: of a latent pipeline (diffusers' LDMPipeline, DiTPipeline) that of the latents. Such
a pipeline is exported whole (docs/guide/your-images.md).

With a Stable Diffusion 1.x, 2.x, XL or 3 folder, images need captions: metadata.jsonl, metadata.csv or a .txt next to each
(docs/guide/text-to-image.md). The recipe is then the paper's for Stable Diffusion; of XL and 3 an adapter is trained.

Hardware: as for the paper's data of the same resolution. Score to expect: unknown, it is your data. Read the report before you
trust the result.
"""

from ml_collections import config_dict

from retrack_jax.config.base import base_config, with_method


def get_config(method=None):
    config = base_config("custom", pretrained_here=False)

    config.data.source = "folder"
    config.data.resolution = config_dict.placeholder(int)  # None: the model's own size

    for field in ("num_neighbors", "num_steps", "batch_size", "accumulation"):
        config.unlearn[field] = config_dict.placeholder(int)
    config.unlearn.learning_rate = config_dict.placeholder(float)
    config.unlearn.retrack.lam = config_dict.placeholder(float)

    config.sampling.sampler = config_dict.placeholder(str)
    config.sampling.num_images = config_dict.placeholder(int)
    config.sampling.batch_size = config_dict.placeholder(int)  # a placeholder of two fields would set both
    config.eval.metrics = config_dict.placeholder(tuple)
    config.export = config_dict.placeholder(str)
    config.compute.remat = config_dict.placeholder(bool)
    return with_method(config, method)
