"""The fields of a config, typed and self-checking. Each has one default, and it stands here, or for training in recipes.py.

reading.py lays them out as the `ConfigDict` that `configs/*.py` and the command line change, and reads that back.

A message of a check starts with the field's name; whoever makes the record puts before it where the user sets it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from retrack_jax.checks import check, check_choice, check_int, check_number
from retrack_jax.config.recipes import MAX_SEED, PretrainOptions, UnlearnOptions
from retrack_jax.data.decode import CROPS
from retrack_jax.data.target_names import target_specs
from retrack_jax.diffusion.flow import EULER, VELOCITY
from retrack_jax.metrics.features.network import NETWORKS, SCORE_NETWORKS
from retrack_jax.metrics.features.resize import RULES
from retrack_jax.metrics.kmeans import CLASSIFIERS
from retrack_jax.sampling import SAMPLERS
from retrack_jax.train.lora import LoraOptions
from retrack_jax.unlearn.methods import ALL, METHODS, PRETRAINED

MODES = ("run", "pretrain", "unlearn", "sample", "eval", "report", "check")
DTYPES = ("float32", "bfloat16")
SAMPLING_PRESETS = ("", "quick")
NETWORK_KINDS = ("unet", "dit")
EXPORTS = ("pipeline", "unet", "single_file", "none")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """`config.data`: which images, and how they become pixels."""

    source: str = ""  # `folder`, `npz`, `parquet`, `tfds`, `idx`, or that of an experiment (data/sources/table.py)
    dir: str = ""  # where the files are; ~ is expanded; with parquet also an id of the hub
    format: str = ""  # how that source's files are stored: tfds, parquet, idx, folder; empty: its first
    tfds_name: str = ""  # with source tfds: its name there, such as mnist
    split: str = "train"  # of parquet, IDX and TFDS
    copies: int = 0  # T-shirts added to the digits, by sources that add any
    copies_label: int | None = None  # the label of these; None: one that no digit has
    labels: str = ""  # of a folder's images: folders (the first subfolder each is in), or a file; empty: none
    null_label: int | None = None  # of networks that take labels: the one that stands for none; None: there is none
    label_dropout: float | None = None  # share of training examples under the null label; None: 0.1 if there is one
    label_vectors: str = ""  # .npy [labels, D] for networks with class_embed_type identity: what each label is given as
    resolution: int | None = 0  # pixels a side; 0: as they are; None: the model's own
    channels: int = 0  # 1 or 3 converts; 0: as they are
    crop: str = "center"  # how an image of another shape becomes square: center, or none to refuse it
    held_out: float = 0.0  # share of the images, drawn at random, that no model made here trains on; membership needs it
    exclude: str = ""  # images that an earlier run made the checkpoint forget, written as a target is
    skip_corrupt: bool = False  # leave out images that cannot be decoded, rather than refuse to run
    cache_dir: str = "~/.cache/retrack_jax"  # decoded images, latents, neighbors and the pretrained model's samples
    original_prompts: str = "original_prompts.json"  # of concepts: below data.dir, or absolute
    modified_prompts: str = "modified_prompts.json"
    caption_column: str = "text"  # which column of metadata.jsonl, metadata.csv or parquet holds the captions
    caption_dropout: float = 0.0  # share of examples that are trained without their caption, as the model was
    encode_batch_size: int = 4  # pictures that a VAE encodes at once
    latent_seed: int = 0  # of the one draw of forgotten and neighbor latents that ReTrack keeps

    def __post_init__(self):
        check_int("resolution", self.resolution or 0, minimum=0)
        check_int("copies", self.copies, minimum=0)
        if self.label_dropout is not None:
            check_number("label_dropout", self.label_dropout, 0.0, 1.0)
        check_choice("crop", self.crop, CROPS)
        check_number("held_out", self.held_out, 0.0, 1.0)
        check_number("caption_dropout", self.caption_dropout, 0.0, 1.0)
        check_int("encode_batch_size", self.encode_batch_size)
        check_int("latent_seed", self.latent_seed, minimum=0)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """`config.model`: diffusers' UNet2DModel fields and defaults. A checkpoint's own config.json wins."""

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    num_class_embeds: int | None = None  # labels that the network takes, the null label included; None: it takes none
    class_embed_type: str | None = None  # or timestep, identity
    layers_per_block: int = 2
    block_out_channels: tuple = (224, 448, 672, 896)
    down_block_types: tuple = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    attention_head_dim: int = 8  # channels per head
    add_attention: bool = True
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    dropout: float = 0.0
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self):
        for name in ("layers_per_block", "in_channels", "out_channels", "norm_num_groups"):
            check_int(name, getattr(self, name))
        check_number("dropout", self.dropout, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class DiTOptions:
    """`config.dit`: diffusers' DiTTransformer2DModel fields, of a model that is pretrained here with config.network=dit."""

    sample_size: int = 32
    in_channels: int = 3
    patch_size: int = 2
    num_layers: int = 4
    num_attention_heads: int = 4
    attention_head_dim: int = 32
    num_embeds_ada_norm: int = 1  # labels that the network takes, without the null label; 1: it takes none

    def __post_init__(self):
        for name, value in asdict(self).items():
            check_int(name, value)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """`config.schedule`: diffusers' scheduler fields. A checkpoint's own scheduler_config.json wins.

    With the prediction type `flow_prediction` it is a rectified flow, of which `num_train_timesteps` and `shift` count alone.
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: str = "epsilon"  # or v_prediction, sample; flow_prediction: a rectified flow, which has no betas
    shift: float = 1.0  # m of a flow's sigmas m s / (1 + (m - 1) s)
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self):
        check_int("num_train_timesteps", self.num_train_timesteps, minimum=2)
        check_number("shift", self.shift, 0.0, above=True)
        read = {"num_train_timesteps", "prediction_type"}
        read |= {"shift"} if self.prediction_type == VELOCITY else {one.name for one in fields(self)} - {"shift"}
        for one in fields(self):
            value, kind = getattr(self, one.name), self.prediction_type
            unread = one.name not in read and value != one.default
            check(not unread, f"{one.name} is {value!r}, but prediction_type is {kind}, which does not read it; leave it out")

    def to_config(self) -> dict:
        """Returns the `scheduler_config.json` that these options stand for."""
        values = asdict(self)
        if self.prediction_type != VELOCITY:
            return values
        return {"_class_name": EULER} | {name: values[name] for name in ("num_train_timesteps", "shift")}


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """`config.sampling`: how samples are drawn; image i starts from the same noise for every model and any batch size."""

    preset: str = ""  # quick: a sampler of few steps, in place of the config's sampler and num_steps; empty: these
    sampler: str | None = "ddpm"  # or ddim, dpm_solver, euler, pndm; of flows flow_euler, flow_heun; None: by the rules
    num_steps: int | None = 50  # None: the preset's
    num_images: int | None = 10_000  # of each prompt, where there are prompts; None: left to the rules (config/rules.py)
    num_captions: int = 8  # of captioned images: forgotten captions, and as many kept ones, that samples are drawn of
    batch_size: int | None = 500  # images at once, over all devices; None: left to the rules
    seed: int = 0
    guidance_scale: float = 7.5  # of prompts; at most 1: none
    negative_prompt: str = ""
    labels: tuple = ()  # of networks that take labels: image i has label i mod their number; empty: drawn as in the data
    label_guidance: float = 0.0  # the scale for labels, which needs a null label; at most 1: none

    def __post_init__(self):
        check_choice("preset", self.preset, SAMPLING_PRESETS)
        if self.sampler is not None:
            check_choice("sampler", self.sampler, SAMPLERS)
        check(self.num_steps is not None or bool(self.preset), "num_steps is None; give a number, or a preset")
        for name in ("num_steps", "num_images", "num_captions", "batch_size"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        check_int("seed", self.seed, minimum=0, maximum=MAX_SEED)
        check_number("guidance_scale", self.guidance_scale, 0.0)
        check_number("label_guidance", self.label_guidance, 0.0)

    @property
    def binding(self) -> dict:
        """The fields that image i depends on: it is the same in any batch and among any number."""
        return {name: value for name, value in asdict(self).items() if name not in ("preset", "num_images", "batch_size")}


@dataclass(frozen=True, kw_only=True)
class RelearningOptions:
    """`config.eval.relearning`: fine-tuning until the forgotten image is back, for relearning_steps."""

    steps: tuple = (10, 20, 40, 80, 160)  # where the curve is measured; its last step censors it
    learning_rate: float = 1e-4
    batch_size: int = 64

    def __post_init__(self):
        rise = all(isinstance(b, int) and a < b for a, b in zip((0, *self.steps), self.steps, strict=False))
        check(rise and len(self.steps) > 0, f"steps is {tuple(self.steps)}; give whole numbers that rise from above 0")
        check_number("learning_rate", self.learning_rate, 0.0, above=True)
        check_int("batch_size", self.batch_size)


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """`config.eval`: which metrics, by which networks."""

    metrics: tuple | None = ("fid",)  # None: those of the kind of model (config/rules.py)
    features: str = "inception"  # behind fid kid precision recall inception_score: inception, or digits (trained here)
    score_network: str = "features"  # behind the inception scores: features, the network behind fid, or mnist_resnet
    weights_dir: str = "~/.cache/retrack_jax/weights"  # feature networks' files
    fid_resize: str = "torchmetrics"  # or tf1
    fid_reference: str = "remain"  # or all: every training image
    frequency_threshold: float = 0.0  # L2 in [0, 1] pixels to the forgotten image, below which a sample counts as one
    nll_probes: int = 1  # Rademacher probes of the divergence
    official_draws: bool = False  # noise of sscd and probes of the likelihood by the run's seed, not by sampling.seed
    classifier: str = "joblib"  # of concepts: the shipped k-means, read without unpickling; or labels: refitted from the labels
    relearning: RelearningOptions = RelearningOptions()
    mark_name: str = "forgotten image"  # what the report calls what is forgotten
    grid_images: int = 64  # samples shown in samples.png

    def __post_init__(self):
        check_choice("features", self.features, NETWORKS)
        check_choice("score_network", self.score_network, SCORE_NETWORKS)
        check_choice("fid_resize", self.fid_resize, RULES)
        check_choice("fid_reference", self.fid_reference, ("remain", "all"))
        check_choice("classifier", self.classifier, CLASSIFIERS)
        check_number("frequency_threshold", self.frequency_threshold, 0.0)
        check_int("nll_probes", self.nll_probes)
        check_int("grid_images", self.grid_images)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """`config.compute`: what costs or saves memory and time."""

    dtype: str = "float32"  # or bfloat16: the network computes in it, weights stay float32
    param_dtype: str = "float32"  # of the network in sampling alone, which changes samples; bfloat16 takes half the memory
    remat: bool | None = False  # compute activations again in the backward pass, to save memory
    cpu_devices: int = 1  # where jax runs on the CPU: devices that share each batch; with 2, digits use two cores fully
    steps_per_call: int = 1  # training steps in one call of the device's program; fewer before a checkpoint

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("param_dtype", self.param_dtype, DTYPES)
        check_int("cpu_devices", self.cpu_devices)
        check_int("steps_per_call", self.steps_per_call)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A whole config."""

    name: str = ""  # reports' title; the default workdir is runs/NAME of the config file
    method: str = "retrack"  # what follows the colon in --config=FILE.py:METHOD
    mode: str = "run"  # every stage not done yet; or one of pretrain unlearn sample eval report; or check
    seeds: tuple = (0,)  # each seed x target is one run
    targets: tuple = ("",)  # a name, a+b+c, @list.txt, a glob, label:7, random:0.05; commas separate runs
    checkpoint: str = ""  # diffusers' folder, the hub's org/name[@revision], Stable Diffusion in one file; empty: pretrain here
    pipeline: str = ""  # folder or hub id with configs and tokenizer of a checkpoint that is one file; empty: by the file
    export: str | None = "unet"  # what a run leaves: the network, the whole pipeline, a single_file, or none; None: by the rules
    log_every: int = 1  # steps
    checkpoint_every: int = 100  # steps; unlearning and pretraining also save at their end
    tensorboard: bool = False  # event files as well, with what log.jsonl, the report and the verdict say
    profile: int = 0  # steps, or calls of several, of each training run that jax's profiler records into profile/
    save_float: bool = False  # keep float samples in samples.npz as well as the uint8 ones
    data: DataOptions = DataOptions()
    network: str = "unet"  # of a model that is pretrained here: unet, whose fields are config.model, or dit, config.dit
    model: ModelOptions = ModelOptions()
    dit: DiTOptions = DiTOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    pretrain: PretrainOptions = PretrainOptions()
    unlearn: UnlearnOptions = UnlearnOptions()
    methods: Mapping[str, UnlearnOptions] = field(default_factory=dict)  # `unlearn` as each method takes it
    sampling: SamplingOptions = SamplingOptions()
    eval: EvalOptions = EvalOptions()
    compute: ComputeOptions = ComputeOptions()

    def __post_init__(self):
        check_choice("method", self.method, (*METHODS, PRETRAINED, ALL))
        check_choice("mode", self.mode, MODES)
        check_choice("network", self.network, NETWORK_KINDS)
        check(len(self.seeds) > 0, "seeds is empty; give at least one, such as --config.seeds=0")
        for seed in self.seeds:
            check_int("seeds", seed, minimum=0, maximum=MAX_SEED)
        check_int("log_every", self.log_every)
        check_int("checkpoint_every", self.checkpoint_every, minimum=0)
        check_int("profile", self.profile, minimum=0)
        if self.export is not None:
            check_choice("export", self.export, EXPORTS)

    def recipe(self, method: str) -> UnlearnOptions:
        """Returns the options of unlearning as `method` takes them."""
        return self.methods.get(method, self.unlearn)

    def lora(self, method: str) -> LoraOptions | None:
        """Returns the adapter that `method` trains; None: it trains the whole network, as retraining always does."""
        if method not in METHODS or METHODS[method].from_scratch or not self.recipe(method).has_adapter:
            return None
        return self.recipe(method).lora

    @property
    def new_network(self) -> ModelOptions | DiTOptions:
        """The fields of a network that is pretrained here."""
        return self.model if self.network == "unet" else self.dit

    @property
    def target_specs(self) -> list[str]:
        """The targets, one a run; commas inside an entry separate targets as well."""
        return target_specs(self.targets)

    @property
    def method_names(self) -> list[str]:
        """The methods to run: under `all`, those that make sense for the config, the retrained model first."""
        if self.method != ALL:
            return [self.method]
        # Retraining needs the pretraining recipe; a config whose model comes from a checkpoint has none.
        names = [name for name, method in METHODS.items() if not (method.from_scratch and self.checkpoint)]
        return sorted(names, key=lambda name: not METHODS[name].from_scratch)
