"""DiT and its checkpoints against the installed PyTorch diffusers: random configs, the published size, round trips."""

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
from retrack_jax.models.dit import DiT
from retrack_jax.sampling import make_sampler

SEEDS = range(8)
# Every value must occur in some config of SEEDS; the test below checks that.
OPTIONS = {
    "num_attention_heads": (1, 3),
    "attention_head_dim": (4, 8),
    "in_channels": (1, 3),
    "out_channels": (None, 6),
    "num_layers": (1, 3),
    "attention_bias": (True, False),
    "sample_size": (8, 12),
    "patch_size": (1, 2, 4),
    "num_embeds_ada_norm": (1, 5),
    "norm_eps": (1e-5, 1e-3),
}


def random_config(seed: int) -> dict:
    """Returns a tiny config, the same for a seed on every machine."""
    draw = random.Random(seed)
    return {name: draw.choice(values) for name, values in OPTIONS.items()}


def reference(seed: int) -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(seed)
    return diffusers.DiTTransformer2DModel(**random_config(seed)).eval()


def test_the_configs_cover_every_option():
    configs = [random_config(seed) for seed in SEEDS]
    assert all({config[name] for config in configs} == set(values) for name, values in OPTIONS.items())


@pytest.mark.parametrize("seed", SEEDS)
def test_forward_and_round_trip(seed, tmp_path):
    """The same output to 1e-5, at the config's size and at another, and back to PyTorch bit for bit."""
    torch_model = reference(seed)
    torch_model.save_pretrained(tmp_path / "theirs")
    module, params = import_diffusers(tmp_path / "theirs")
    config, draw = random_config(seed), np.random.default_rng(seed)
    labels = draw.integers(0, config["num_embeds_ada_norm"] + 1, 2)  # the null label too
    if config["num_embeds_ada_norm"] == 1:
        labels[:] = 0
    t = np.float32([3.0, 812.5])
    for side in (config["sample_size"], 2 * config["sample_size"]):
        x = draw.normal(size=(2, side, side, config["in_channels"])).astype(np.float32)
        with torch.no_grad():
            theirs = torch_model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(labels)).sample
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        condition = () if module.num_labels is None else (jnp.asarray(labels, jnp.int32),)
        ours = np.asarray(module.apply({"params": params}, jnp.asarray(x), jnp.asarray(t), *condition))
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)

    export_diffusers(tmp_path / "ours", module, params, schedule=Schedule.rectified_flow(shift=3.0))
    read = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    for name, tensor in torch_model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    assert scheduler.config.shift == 3.0


def test_the_former_name_of_the_class_is_read(tmp_path):
    reference(0).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel"}
    off = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    path.write_text(json.dumps(config | off))
    module, _ = import_diffusers(tmp_path)
    assert module == DiT.from_config(random_config(0))


def test_the_published_size():
    """DiT-XL/2 at 256 pixels: the shapes initialize, and there are as many parameters as in diffusers' module.

    The published 675.1 M count the embedding of time and label once, and the positions. In diffusers each block has an embedding.
    """
    published = dict(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32)
    with torch.device("meta"):
        theirs = diffusers.DiTTransformer2DModel(**published, patch_size=2, num_embeds_ada_norm=1000)
    module = DiT.from_config(published | {"patch_size": 2, "num_embeds_ada_norm": 1000})
    inputs = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    embedding = sum(leaf.size for leaf in jax.tree.leaves(shapes["transformer_blocks_0"]["norm1"]["emb"]))
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) == 749_826_464
    assert count - 27 * embedding + 16 * 16 * 1152 == 675_129_632


def test_defaults_are_diffusers_own():
    theirs = {
        name: parameter.default
        for name, parameter in inspect.signature(diffusers.DiTTransformer2DModel.__init__).parameters.items()
        if name in OPTIONS
    }
    assert theirs == {name: getattr(DiT(), name) for name in OPTIONS}


@pytest.mark.parametrize("settings", [{}, {"clip_sample": False, "beta_schedule": "scaled_linear"}])
def test_ddpm_with_a_learned_variance(settings, monkeypatch):
    """Every step of a chain, with arbitrary outputs of twice as many channels."""
    theirs = diffusers.DDPMScheduler(variance_type="learned_range", **settings)
    theirs.alphas_cumprod = torch.cumprod(1 - theirs.betas.double(), 0)
    theirs.set_timesteps(20)
    sampler = make_sampler("ddpm", Schedule.from_config(json.loads(theirs.to_json_string())), 20)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 4, 4, 3)).astype(np.float32)
    for j, t in enumerate(theirs.timesteps):
        output = np.tanh(draw.normal(size=(2, 4, 4, 6))).astype(np.float32)
        noise = draw.normal(size=x.shape).astype(np.float32)
        drawn = torch.from_numpy(noise).permute(0, 3, 1, 2).double()
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, drawn=drawn, **__: drawn)
        to_torch = [torch.from_numpy(one).permute(0, 3, 1, 2).double() for one in (output, x)]
        expected = theirs.step(to_torch[0], int(t), to_torch[1]).prev_sample.permute(0, 2, 3, 1).numpy()
        row = {name: value[j] for name, value in sampler.rows.items()}
        (ours,) = sampler.step((jnp.asarray(x),), jnp.asarray(output), jnp.asarray(noise), row)
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)
        x = np.float32(np.clip(expected, -3, 3))
