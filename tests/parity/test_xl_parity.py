"""Stable Diffusion XL's parts against diffusers and transformers, on random weights of random shapes."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from retrack_jax.models.unet2d_condition import UNet2DCondition  # noqa: E402
from retrack_jax.weights.names import from_torch  # noqa: E402
from tests.parity.test_sd_parity import nchw, nhwc, plain, relative, shaken, weights  # noqa: E402

torch.set_num_threads(1)
PLAIN_DOWN, PLAIN_UP = "DownBlock2D", "UpBlock2D"
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def unet_options(seed: int) -> tuple[dict, int]:
    """Returns the options of a UNet2DConditionModel of a random shape in XL's manner, and the features of its pooled prompt."""
    numbers = np.random.default_rng(seed)
    blocks = 2 + seed % 2
    attends = [bool(numbers.integers(2)) for _ in range(blocks - 1)] + [True]
    layers = [int(number) for number in numbers.integers(1, 4, blocks)]
    pooled, dim = int(numbers.integers(3, 9)), 2 * int(numbers.integers(2, 5))
    options = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32)[:blocks],
        "norm_num_groups": 8,
        "layers_per_block": int(numbers.integers(1, 3)),
        "down_block_types": [CROSS_DOWN if one else PLAIN_DOWN for one in attends],
        "up_block_types": [CROSS_UP if one else PLAIN_UP for one in reversed(attends)],
        "attention_head_dim": [int(numbers.choice([1, 2, 4])) for _ in range(blocks)],
        "cross_attention_dim": int(numbers.integers(5, 12)),
        "transformer_layers_per_block": layers,
        "use_linear_projection": seed != 3,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": dim,
        "projection_class_embeddings_input_dim": pooled + 6 * dim,
    }
    if seed % 3 == 1:
        options["reverse_transformer_layers_per_block"] = [int(number) for number in numbers.integers(1, 4, blocks)]
    if seed == 5:
        options |= {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 24, "act_fn": "gelu"}
    return options, pooled


@pytest.mark.parametrize("seed", range(7))
def test_unet(seed):
    torch.manual_seed(seed)
    options, pooled = unet_options(seed)
    theirs = shaken(diffusers.UNet2DConditionModel(**options))
    ours = UNet2DCondition.from_config(plain(theirs.config))
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=(2, 8, 8, 4)).astype(np.float32)
    t = np.array([3, 999], np.int32)
    condition = {
        "encoder_hidden_states": numbers.normal(size=(2, 5, options["cross_attention_dim"])).astype(np.float32),
        "text_embeds": numbers.normal(size=(2, pooled)).astype(np.float32),
        "time_ids": np.array([[1024, 768, 0, 128, 1024, 1024], [512, 512, 0, 0, 1024, 1024]], np.float32),
    }
    target = jax.eval_shape(ours.init, jax.random.key(0), x, t, condition)["params"]
    params = from_torch(weights(theirs), target)

    def of(network):
        added = {name: torch.tensor(condition[name]) for name in ("text_embeds", "time_ids")}
        prompt = torch.tensor(condition["encoder_hidden_states"])
        with torch.no_grad():
            return nhwc(network(nchw(x), torch.tensor(t), prompt, added_cond_kwargs=added).sample)

    expected = of(theirs)
    assert relative(jax.jit(ours.apply)({"params": params}, x, t, condition), expected) < 1e-5
    # diffusers builds the same network from the config that we write
    again = diffusers.UNet2DConditionModel.from_config(ours.to_config())
    again.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(of(again.eval()), expected)
