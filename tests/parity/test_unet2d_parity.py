"""UNet2D and its checkpoints against the installed PyTorch diffusers: random configs, counts, defaults, round trips."""

import inspect
import json
import random

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from retrack_jax.checkpoints import export_diffusers, import_diffusers
from retrack_jax.diffusion import Schedule
from retrack_jax.models.unet2d import UNet2D

SEEDS = range(12)
# Every value must occur in some config of SEEDS; the test below checks that.
OPTIONS = {
    "in_channels": (1, 3),
    "out_channels": (3, 2),
    "center_input_sample": (False, True),
    "time_embedding_type": ("positional", "positional", "fourier", "learned"),
    "time_embedding_dim": (None, 24),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D", None),
    "layers_per_block": (1, 2),
    "mid_block_scale_factor": (1, 1.4142135),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "dropout": (0.0, 0.3),
    "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
    "attention_head_dim": (4, 8, None),
    "norm_num_groups": (2, 4),
    "attn_norm_num_groups": (None, 8),
    "norm_eps": (1e-5, 1e-6),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True, False),
}
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
DDPM = {
    35_746_307: dict(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
    ),
    113_673_219: dict(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        attention_head_dim=None,
    ),
}


def random_config(seed: int) -> dict:
    """Returns a tiny config, the same for a seed on every machine."""
    draw = random.Random(seed)
    config = {name: draw.choice(values) for name, values in OPTIONS.items()}
    widths = draw.choice(((8,), (8, 16), (16, 8), (8, 8, 16)))
    return config | {
        "sample_size": 8,
        "block_out_channels": widths,
        "down_block_types": tuple(draw.choice(DOWN) for _ in widths),
        "up_block_types": tuple(draw.choice(UP) for _ in widths),
        "num_train_timesteps": 1000,
    }


def reference(seed: int) -> diffusers.UNet2DModel:
    """Returns diffusers' model with the norms and biases off their initial values."""
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**random_config(seed)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.startswith("time_proj"):
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    return model


def test_the_random_configs_cover_every_option():
    configs = [random_config(seed) for seed in SEEDS]
    for name, values in OPTIONS.items():
        assert {config[name] for config in configs} == set(values), name
    for name, kinds in (("down_block_types", DOWN), ("up_block_types", UP)):
        assert {kind for config in configs for kind in config[name]} == set(kinds)


@pytest.mark.parametrize("seed", SEEDS)
def test_output_within_1e_5_and_round_trip_bit_exact(seed, tmp_path):
    model = reference(seed)
    model.save_pretrained(tmp_path / "theirs")
    module, params = import_diffusers(tmp_path / "theirs")
    # The fourier embedding takes log t: at t = 0 diffusers returns NaN, so its first step is 1.
    t = np.asarray([1 if module.time_embedding_type == "fourier" else 0, 500, 999], np.int32)
    x_t = np.random.default_rng(seed).normal(size=(3, 8, 16, module.in_channels)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x_t.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample.numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray(x_t), jnp.asarray(t)))
    errors = [np.linalg.norm(y - y_ref) / np.linalg.norm(y_ref) for y, y_ref in zip(ours, theirs, strict=True)]
    print(f"seed {seed}: ‖y - y_ref‖/‖y_ref‖ at t = {t.tolist()}: {', '.join(f'{error:.1e}' for error in errors)}")
    assert max(errors) <= 1e-5

    export_diffusers(
        tmp_path / "ours", module, params, schedule=Schedule.from_config({}), source=tmp_path / "theirs", note="nothing"
    )
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    expected, found = model.state_dict(), back.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    for name in inspect.signature(diffusers.UNet2DModel.__init__).parameters.keys() - {"self"}:
        value, value_ref = back.config[name], model.config[name]
        assert (tuple(value) if isinstance(value, list) else value) == value_ref, name
    back.save_pretrained(tmp_path / "again", safe_serialization=False)
    again, params_again = import_diffusers(tmp_path / "again")
    assert again == module
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, params_again))


def test_scale_shift_network_of_before_0_17(tmp_path):
    """Until then its middle attention had a group norm that no option tells of; diffusers has had one for it since 0.22."""
    torch.manual_seed(0)
    widths = dict(block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    model = diffusers.UNet2DModel(
        sample_size=8, norm_num_groups=4, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4, **widths
    ).eval()
    torch.nn.init.normal_(model.mid_block.attentions[0].group_norm.weight)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["attn_norm_num_groups"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.14.0"}))
    module, params = import_diffusers(tmp_path)
    x_t, t = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32), np.asarray([0, 999], np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x_t.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample.numpy().transpose(0, 2, 3, 1)
    ours = np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray(x_t), jnp.asarray(t)))
    assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_the_pipeline_loads_an_export_with_its_schedule(tmp_path):
    model = reference(1)
    model.save_pretrained(tmp_path / "theirs")
    module, params = import_diffusers(tmp_path / "theirs")
    export_diffusers(tmp_path / "ours", module, params, schedule=Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"}))
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    found = pipeline.unet.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_defaults_are_diffusers():
    signature = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    ours = UNet2D().to_config()
    ours.pop("_class_name")
    theirs = {
        name: list(p.default) if isinstance(p.default, tuple) else p.default for name, p in signature.items() if name != "self"
    }
    assert ours == theirs


@pytest.mark.parametrize("count", DDPM)
def test_parameter_count_of_the_ddpm_models(count):
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**DDPM[count])
    module = UNet2D(**DDPM[count])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(p.numel() for p in model.parameters()) == count
