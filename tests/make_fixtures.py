"""Writes tests/fixtures/diffusers with the real PyTorch and diffusers; run by hand in the environment of `make parity`:

    python tests/make_fixtures.py

Each model folder is what a user may have, at toy width, with `io.npz` beside it: inputs x_t [B, H, W, C] and t, and what PyTorch
computes. `make test` reads these files and needs no PyTorch.
"""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent / "fixtures" / "diffusers"
TINY = {
    "sample_size": 8,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
LINEAR = {
    "_class_name": "DDPMScheduler",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "num_train_timesteps": 1000,
}
# What diffusers' EMAModel adds to the config that it saves.
EMA_KEYS = {
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 10,
    "power": 0.75,
    "update_after_step": 0,
    "use_ema_warmup": True,
}
OLD_NAMES = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


def make_model(seed: int, **options) -> diffusers.UNet2DModel:
    """Returns a model in which no parameter has the value that a new one has, so that none can be mixed up unseen."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**(TINY | options)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.startswith("time_proj"):
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return model


def record(model: diffusers.UNet2DModel, folder: Path, seed: int) -> None:
    """Writes io.npz: three noisy images at t = 0, 500, 999 and the model's output."""
    channels, size = model.config.in_channels, model.config.sample_size
    x_t = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, channels, size, size)).astype(np.float32))
    t = torch.tensor([0, 500, 999])
    with torch.no_grad():
        y = model(x_t, t).sample
    nhwc = (0, 2, 3, 1)
    np.savez_compressed(folder / "io.npz", x_t=x_t.permute(nhwc).numpy(), t=t.int().numpy(), y=y.permute(nhwc).numpy())


def write_config(model: diffusers.UNet2DModel, folder: Path, only: tuple[str, ...] = (), **extra) -> None:
    """Writes config.json, only the keys `only` if given, as older versions of diffusers did."""
    config = {key: model.config[key] for key in only} if only else dict(model.config)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"} | config | extra, indent=2) + "\n")


def safetensors_root() -> None:
    """What diffusers writes today: config.json and safetensors in one folder, no schedule."""
    folder = ROOT / "safetensors"
    model = make_model(0, attention_head_dim=2, dropout=0.1)
    model.save_pretrained(folder)
    record(model, folder, 0)


def old_pipeline() -> None:
    """As google/ddpm-*: an early config, a zip .bin with the old attention names, schedule in the root, licence and card."""
    folder = ROOT / "old_pipeline"
    folder.mkdir(parents=True)
    options = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
    model = make_model(1, **options)
    keys = (*TINY, *options, "act_fn", "center_input_sample", "in_channels", "mid_block_scale_factor", "out_channels")
    write_config(model, folder, only=(*keys, "time_embedding_type"), _diffusers_version="0.0.4")
    torch.save(_old_names(model.state_dict()), folder / "diffusion_pytorch_model.bin")
    (folder / "scheduler_config.json").write_text(json.dumps(LINEAR | {"clip_sample": True, "variance_type": "fixed_small"}))
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "LICENSE").write_text("A licence that must travel along.\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A tiny model\n")
    record(model, folder, 1)


def _old_names(state: dict) -> dict:
    for new, old in OLD_NAMES:
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    return state


def sharded_pipeline() -> None:
    """A pipeline root with unet/ in two safetensors shards and scheduler/."""
    folder = ROOT / "sharded_pipeline"
    options = {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attn_norm_num_groups": 2,
    }
    model = make_model(2, act_fn="gelu", mid_block_scale_factor=1.5, **options)
    diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    model.save_pretrained(folder / "unet", max_shard_size="20KB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    record(model, folder / "unet", 2)


def averaged() -> None:
    """As SISS's MNIST model: unet_ema/ with an average's keys, a .bin of before PyTorch 1.6, only a scheduler.bin."""
    folder = ROOT / "averaged" / "unet_ema"
    folder.mkdir(parents=True)
    options = {"time_embedding_type": "learned", "num_train_timesteps": 1000, "act_fn": "mish", "add_attention": False}
    model = make_model(3, in_channels=1, out_channels=1, **options)
    write_config(model, folder, **EMA_KEYS)
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.save({"base_lrs": [1e-4], "last_epoch": 10}, folder.parent / "scheduler.bin")
    record(model, folder, 3)


def half() -> None:
    """Weights in float16 and bfloat16; the reference computes in float32 with the rounded weights."""
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        folder = ROOT / name
        folder.mkdir(parents=True)
        model = make_model(4, time_embedding_type="fourier", center_input_sample=True, mid_block_type=None).to(dtype)
        write_config(model, folder)
        save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        model.float()
        x_t = torch.from_numpy(np.random.default_rng(4).normal(size=(3, 3, 8, 8)).astype(np.float32))
        t = torch.tensor([1, 500, 999])  # log(0) makes this kind of embedding infinite at t = 0, in diffusers too
        with torch.no_grad():
            y = model(x_t, t).sample
        nhwc = (0, 2, 3, 1)
        np.savez_compressed(folder / "io.npz", x_t=x_t.permute(nhwc).numpy(), t=t.int().numpy(), y=y.permute(nhwc).numpy())


class Scripted(torch.nn.Module):
    """A TorchScript module with nested modules, a buffer, half weights and a list of numbers among its attributes."""

    sizes: list[int]

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Linear(4, 2).half()
        self.register_buffer("mean", torch.tensor([0.5, 0.25, 0.125]))
        self.sizes = [1, 2, 3]

    def forward(self, x):
        """Uses every part, so that scripting keeps it."""
        return self.head(self.backbone(x - self.mean[None, :, None, None]).mean((2, 3)).half())


def torch_files() -> None:
    """One dict of many kinds of tensors in both containers, a TorchScript archive, and what they hold."""
    folder = ROOT / "torch"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(4, 6, generator=generator)
    value = {
        "float32": base,
        "transposed": base.t(),
        "slice": base[1:3, ::2],
        "tied": base,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "float64": base.double(),
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "bool": base > 0,
        **{str(dtype)[6:]: (base * 40).to(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8)},
        "uint8": (base.abs() * 40).to(torch.uint8),
        "parameter": torch.nn.Parameter(base.clone()),
        "nested": {"list": [torch.ones(2), torch.zeros(3)], "epoch": 3, "name": "tiny", "rate": 0.5, "none": None},
    }
    torch.save(value, folder / "zip.bin")
    torch.save(value, folder / "sequence.bin", _use_new_zipfile_serialization=False)
    flat = {name: tensor for name, tensor in value.items() if name != "nested"}
    flat |= {f"nested.list.{i}": tensor for i, tensor in enumerate(value["nested"]["list"])}
    # npz has no bfloat16; as float32 it is exact.
    arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy() for name, t in flat.items()}
    np.savez_compressed(folder / "tensors.npz", **arrays)

    torch.manual_seed(6)
    script = torch.jit.script(Scripted().eval())
    script.save(str(folder / "script.pt"))
    np.savez_compressed(folder / "script.npz", **{name: t.detach().numpy() for name, t in script.state_dict().items()})


if __name__ == "__main__":
    shutil.rmtree(ROOT, ignore_errors=True)
    for make in (safetensors_root, old_pipeline, sharded_pipeline, averaged, half, torch_files):
        make()
    for file in sorted(ROOT.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:8d} {file.relative_to(ROOT)}")
