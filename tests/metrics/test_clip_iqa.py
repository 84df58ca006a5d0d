"""CLIP-IQA on a toy CLIP, against a NumPy oracle (parity/test_clip_parity.py has the real module); bad weights and images."""

import gc
import json
import weakref

import jax
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.clip_iqa import make_clip_iqa, prompt_ids
from retrack_jax.metrics.features.clip_image import towers_from_openai
from retrack_jax.models.tokenizer import load_tokenizer
from tests.openai_clip import openai_tensors


@pytest.fixture(scope="module")
def weights(pipeline):
    return openai_tensors(pipeline.tokenizer.eos_id + 1)


@pytest.fixture(scope="module")
def metric(pipeline, weights):
    return make_clip_iqa(towers_from_openai(weights), pipeline.tokenizer, "digest", batch_size=2)


def test_the_text_tower_is_let_go_after_its_anchors(pipeline, weights):
    towers = towers_from_openai(weights)
    kept = [weakref.ref(leaf) for leaf in jax.tree.leaves(towers.text_params)]
    metric = make_clip_iqa(towers, pipeline.tokenizer, "digest")
    del towers
    gc.collect()
    assert metric.anchors.shape[0] == 2 and not any(ref() is not None for ref in kept)


def test_a_tokenizer_of_longer_prompts_gives_the_same_anchors(pipeline_folder, metric, weights):
    config = pipeline_folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 248}))
    longer = load_tokenizer(pipeline_folder / "tokenizer", positions=248)
    assert prompt_ids(longer).shape == (2, 248)
    np.testing.assert_allclose(make_clip_iqa(towers_from_openai(weights), longer, "digest").anchors, metric.anchors, atol=1e-6)


def images(count, height=64, width=32):
    return np.random.default_rng(1).random((count, 2, 1, 3)).astype(np.float32).repeat(height // 2, 1).repeat(width, 2)


def oracle_image(w, x):
    """Features of one image [H, W, 3], by loops over PyTorch's tensors."""

    def norm(name, x):
        scale = w[f"{name}.weight"] / np.sqrt(w[f"{name}.running_var"] + 1e-5)
        return (x - w[f"{name}.running_mean"]) * scale + w[f"{name}.bias"]

    def conv(name, x, stride=1):
        kernel = w[f"{name}.weight"].astype(np.float64)
        size = kernel.shape[-1]
        x = np.pad(x, ((size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        rows, columns = (range(0, side - size + 1, stride) for side in x.shape[:2])
        return np.array([[np.einsum("oihw,hwi->o", kernel, x[r : r + size, c : c + size]) for c in columns] for r in rows])

    def pool(x, size):
        return x if size == 1 else x.reshape(x.shape[0] // size, size, x.shape[1] // size, size, -1).mean((1, 3))

    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    x = (x.astype(np.float64) - mean) / std
    for index in (1, 2, 3):
        x = np.maximum(norm(f"visual.bn{index}", conv(f"visual.conv{index}", x, 2 if index == 1 else 1)), 0)
    x = pool(x, 2)
    for stage in range(4):
        block, stride = f"visual.layer{stage + 1}.0", 1 if stage == 0 else 2
        h = np.maximum(norm(f"{block}.bn1", conv(f"{block}.conv1", x)), 0)
        h = np.maximum(norm(f"{block}.bn2", conv(f"{block}.conv2", h)), 0)
        h = norm(f"{block}.bn3", conv(f"{block}.conv3", pool(h, stride)))
        x = np.maximum(h + norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", pool(x, stride))), 0)
    tokens = x.reshape(-1, x.shape[-1])
    tokens = np.concatenate([tokens.mean(0, keepdims=True), tokens])

    def dense(name, x):
        return x @ w[f"visual.attnpool.{name}.weight"].T + w[f"visual.attnpool.{name}.bias"]

    q, k, v = dense("q_proj", tokens[:1]), dense("k_proj", tokens), dense("v_proj", tokens)
    heads, mixed = 2, []  # width 4: 4 * 32 / 64 heads
    for q_h, k_h, v_h in zip(*(np.split(part, heads, axis=1) for part in (q, k, v)), strict=True):
        logits = q_h @ k_h.T / np.sqrt(q_h.shape[1])
        share = np.exp(logits - logits.max())
        mixed.append(share / share.sum() @ v_h)
    return dense("c_proj", np.concatenate(mixed, axis=1))[0]


def test_image_features_match_the_oracle(metric, weights):
    given = images(3)
    found = metric.network(given)["features"]
    expected = np.stack([oracle_image(weights, image) for image in given])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert np.ptp(expected, axis=0).max() > 1e-2


def test_score_is_the_share_of_the_good_prompt(metric):
    given = images(3)
    found = metric.network(given)["features"].astype(np.float64)
    logits = 100 * found / np.linalg.norm(found, axis=1, keepdims=True) @ metric.anchors.T
    np.testing.assert_allclose(metric(given), 1 / (1 + np.exp(logits[:, 1] - logits[:, 0])), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(metric.anchors, axis=1), 1, atol=1e-6)


def test_prompts_are_padded_with_zeros_behind_the_first_end(pipeline):
    ids = prompt_ids(pipeline.tokenizer)
    for row in ids:
        end = list(row).index(pipeline.tokenizer.eos_id)
        assert (row[end + 1 :] == 0).all() and row[0] == pipeline.tokenizer.bos_id
    assert not np.array_equal(*ids)


@pytest.mark.parametrize("shape", [(2, 33, 32, 3), (2, 32, 32, 1)])
def test_images_of_another_shape_are_refused(metric, shape):
    with pytest.raises(UserError, match="multiples of 32"):
        metric(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("visual.bn1.bias"), "visual|bn1.bias"),
        (lambda w: w.pop("ln_final.weight"), "ln_final.weight"),
        (lambda w: w.update({"extra": np.zeros(2)}), "extra"),
        (lambda w: w.update({"ln_final.weight": np.zeros(3)}), "shape|does not"),
        (lambda w: w.update({"visual.proj": np.zeros(3)}), "ViT"),
        (lambda w: w.pop("text_projection"), "text_projection"),
    ],
)
def test_weights_of_another_network_are_refused(weights, spoil, message):
    spoilt = dict(weights)
    spoil(spoilt)
    with pytest.raises(UserError, match=message):
        towers_from_openai(spoilt)
