"""The fields that a run depends on, with their units and sources. The other configs start here and change what differs; a
field that only one of them has stands there.

    python -m retrack_jax.main --config=configs/NAME.py[:METHOD] [--workdir=DIR] [--config.FIELD=VALUE ...]
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Returns the fields with the values that all of the paper's experiments share (method.md: ReTrack's official recipe)."""
    config = ConfigDict()
    config.name = ""  # reports' title; the default workdir is runs/NAME of the config file
    config.method = "retrack"  # what follows the colon in --config=FILE.py:METHOD
    config.mode = "run"  # every stage not done yet; or one of pretrain unlearn sample eval report; or check
    config.seeds = (0,)  # each seed x target is one run
    config.targets = ("",)  # a name, a+b+c, @list.txt, a glob, label:7, random:0.05; commas separate runs
    config.checkpoint = ""  # a diffusers folder with the pretrained model; empty: pretrain here
    config.log_every = 1  # steps
    config.checkpoint_every = 100  # steps; unlearning and pretraining also save at their end
    config.save_float = False  # keep float samples in samples.npz beside the uint8 ones

    config.data = data = ConfigDict()
    data.source = ""  # digits_tshirt mnist_tshirt cifar10 celebahq folder parquet npz tfds; concepts (stable_diffusion.py)
    data.dir = ""  # where the files are; ~ is expanded
    data.format = ""  # how that source's files are kept: tfds, parquet, folder; empty: its first
    data.tfds_name = ""  # with source tfds: its name there, such as mnist
    data.split = "train"
    data.copies = 0  # T-shirts added to the digits, where the source adds any
    data.resolution = 0  # pixels; 0: as they are
    data.channels = 0  # 1 or 3 converts; 0: as they are
    data.crop = "center"  # how an image of another shape becomes square: center, or none to refuse it
    data.held_out = 0.0  # share of the images, drawn at random, that no model trains on; membership needs it
    data.exclude = ""  # images that an earlier run made the checkpoint forget, written as a target is: not in the data any more
    data.skip_corrupt = False  # leave out images that cannot be decoded, rather than refuse to run
    data.cache_dir = "~/.cache/retrack_jax"  # decoded images and neighbors

    config.model = model = ConfigDict()  # diffusers' UNet2DModel fields and defaults; a checkpoint's own config.json wins
    model.sample_size = 32
    model.in_channels = 3
    model.out_channels = 3
    model.layers_per_block = 2
    model.block_out_channels = (224, 448, 672, 896)
    model.down_block_types = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    model.up_block_types = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    model.attention_head_dim = 8  # channels per head
    model.add_attention = True
    model.norm_num_groups = 32
    model.norm_eps = 1e-5
    model.act_fn = "silu"
    model.dropout = 0.0
    model.downsample_padding = 1
    model.flip_sin_to_cos = True
    model.freq_shift = 0

    config.schedule = schedule = ConfigDict()  # diffusers' scheduler fields; a checkpoint's own scheduler_config.json wins
    schedule.num_train_timesteps = 1000
    schedule.beta_schedule = "linear"
    schedule.beta_start = 1e-4
    schedule.beta_end = 0.02
    schedule.prediction_type = "epsilon"
    schedule.clip_sample = True
    schedule.clip_sample_range = 1.0
    schedule.variance_type = "fixed_small"
    schedule.timestep_spacing = "leading"
    schedule.steps_offset = 0

    # Pretraining, and retraining without the forgotten images, from random weights (SISS's MNIST recipe).
    config.pretrain = pretrain = ConfigDict()
    pretrain.num_steps = 117_500
    pretrain.batch_size = 128  # images per step, over all devices and microbatches
    pretrain.accumulation = 1  # microbatches per step
    pretrain.learning_rate = 1e-4
    pretrain.learning_rate_schedule = "cosine"  # or constant
    pretrain.warmup_steps = 500
    pretrain.b1 = 0.95
    pretrain.b2 = 0.999
    pretrain.eps = 1e-8
    pretrain.weight_decay = 1e-6
    pretrain.clip_norm = 0.0  # of the gradient of a sum over pixels; 0: none
    pretrain.ema_power = 0.75
    pretrain.ema_inv_gamma = 1.0
    pretrain.ema_max_decay = 0.9999  # 0: no moving average
    pretrain.seed = 0

    config.unlearn = unlearn = ConfigDict()
    unlearn.num_steps = 50
    unlearn.batch_size = 128  # remaining images per step, over all devices and microbatches
    unlearn.forget_batch_size = 0  # noisy copies of forgotten images per step; 0: as many as remaining ones
    unlearn.accumulation = 1
    unlearn.learning_rate = 5e-5
    unlearn.learning_rate_schedule = "constant"
    unlearn.warmup_steps = 0
    unlearn.b1 = 0.95
    unlearn.b2 = 0.999
    unlearn.eps = 1e-8
    unlearn.weight_decay = 1e-6
    unlearn.clip_norm = 1.0
    unlearn.lam = 0.005  # lambda: weight of the unlearning term (retrack), or the mixture (siss); under all not siss's
    unlearn.lam_schedule = "constant"  # or linear, cosine: from lam to lam_end
    unlearn.lam_end = config_dict.placeholder(float)
    unlearn.num_neighbors = 10  # K
    unlearn.neighbor_backend = "auto"  # or scann, exact
    unlearn.siss_scale = 0.0  # s; 0: siss_share of the main gradient's norm
    unlearn.siss_share = 0.1
    unlearn.erasediff_eta = 1e-3
    unlearn.t_min = 0  # timesteps are drawn from [t_min, t_max)
    unlearn.t_max = config_dict.placeholder(int)  # None: all that the schedule has
    unlearn.retain_loss = "standard"  # or distillation: match the pretrained model

    config.sampling = sampling = ConfigDict()
    sampling.sampler = "ddpm"  # or ddim, dpm_solver, pndm
    sampling.num_steps = 50
    sampling.num_images = 10_000
    sampling.batch_size = 500  # images at once, over all devices
    sampling.seed = 0  # image i is the same for every model and any batch size

    config.eval = evaluation = ConfigDict()
    evaluation.metrics = ("fid",)  # names of contract metrics
    evaluation.features = "inception"  # behind fid kid precision recall inception_score: inception, or digits (trained here)
    evaluation.weights_dir = "~/.cache/retrack_jax/weights"  # feature networks' files
    evaluation.fid_resize = "torchmetrics"  # or tf1
    evaluation.fid_reference = "remain"  # or all: every training image
    evaluation.frequency_threshold = 0.0  # L2 in [0, 1] pixels to the forgotten image, below which a sample counts as one
    evaluation.nll_probes = 1  # Rademacher probes of the divergence
    evaluation.relearning = relearning = ConfigDict()  # fine-tuning until the forgotten image is back, for relearning_steps
    relearning.steps = (10, 20, 40, 80, 160)  # where the curve is measured; its last step censors it
    relearning.learning_rate = 1e-4
    relearning.batch_size = 64
    evaluation.mark_name = "forgotten image"  # what the report calls what is forgotten
    evaluation.grid_images = 64  # samples shown in samples.png

    config.compute = compute = ConfigDict()
    compute.dtype = "float32"  # or bfloat16: the network computes in it, weights stay float32
    compute.remat = False  # compute activations again in the backward pass, to save memory
    compute.cpu_devices = 1  # where jax runs on the CPU: devices that share each batch; with 2, digits use two cores fully
    return config


def with_method(config: ConfigDict, method: str | None, recipes: dict[str, dict] | None = None) -> ConfigDict:
    """Returns `config` with `method` chosen and locked: an override of a field that does not exist fails with the nearest name.

    Args:
      config: the fields.
      method: what follows the colon in `--config=FILE:METHOD`; None or empty keeps the default.
      recipes: method -> values of `config.unlearn` that differ for it.
    """
    config.method = method or config.method
    config.recipes = ConfigDict(recipes or {})  # read by `all` alone; a single method's recipe is already in config.unlearn
    if config.method in config.recipes:
        config.unlearn.update(config.recipes[config.method])
    config.lock()
    return config
