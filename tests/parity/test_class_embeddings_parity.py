"""Class-conditional UNet2D against the installed PyTorch diffusers: every kind of class embedding over random configs."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from retrack_jax.checkpoints import export_diffusers, import_diffusers
from tests.parity.test_unet2d_parity import random_config

NUM_LABELS = 7
KINDS = {
    "rows": {"num_class_embeds": NUM_LABELS},
    "timestep": {"class_embed_type": "timestep"},
    "timestep and rows": {"class_embed_type": "timestep", "num_class_embeds": NUM_LABELS},
    "identity": {"class_embed_type": "identity"},
}


@pytest.mark.parametrize("seed", range(20, 23))
@pytest.mark.parametrize("kind", KINDS)
def test_output_within_1e_5_and_round_trip_bit_exact(kind, seed, tmp_path):
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**random_config(seed), **KINDS[kind]).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.startswith("time_proj"):
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
    model.save_pretrained(tmp_path / "theirs")
    module, params = import_diffusers(tmp_path / "theirs")
    assert module.takes_labels and ("class_embedding" in params) == (kind != "identity")

    draws = np.random.default_rng(seed)
    t = np.asarray([1, 500, 999], np.int32)
    x_t = draws.normal(size=(3, 8, 16, module.in_channels)).astype(np.float32)
    labels = np.asarray([1, 4, 6], np.int32)
    if kind == "identity":
        labels = draws.normal(size=(3, *module.smallest_label[0].shape[1:])).astype(np.float32)
    with torch.no_grad():
        noisy = torch.from_numpy(x_t.transpose(0, 3, 1, 2))
        theirs = model(noisy, torch.from_numpy(t), torch.from_numpy(labels)).sample.numpy().transpose(0, 2, 3, 1)
    apply = jax.jit(module.apply)
    ours = np.asarray(apply({"params": params}, jnp.asarray(x_t), jnp.asarray(t), jnp.asarray(labels)))
    errors = [np.linalg.norm(y - y_ref) / np.linalg.norm(y_ref) for y, y_ref in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-5
    shifted = np.asarray(apply({"params": params}, jnp.asarray(x_t), jnp.asarray(t), jnp.asarray(np.roll(labels, 1, 0))))
    assert np.abs(shifted - ours).max() > 1e-4  # the labels matter

    export_diffusers(tmp_path / "ours", module, params, source=tmp_path / "theirs", note="nothing")
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    expected, found = model.state_dict(), back.state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(back.config[name] == model.config[name] for name in ("class_embed_type", "num_class_embeds"))
    again, params_again = import_diffusers(tmp_path / "ours")
    assert again == module
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))
