"""CLIP's RN50 towers and CLIP-IQA against the module that torchmetrics' CLIP-IQA runs (piq 0.8), on random weights.

Needs `pip install --no-deps piq==0.8.0`: of piq only the file with CLIP is loaded, since the package itself asks for
torchvision.
"""

import importlib.util
import sys
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from retrack_jax.metrics.clip_iqa import make_clip_iqa, prompt_ids  # noqa: E402
from retrack_jax.metrics.features.clip_image import towers_from_openai  # noqa: E402
from retrack_jax.models.tokenizer import load_tokenizer  # noqa: E402
from tests.tiny_sd import PIPELINE  # noqa: E402
from tests.torch_files import read_torch  # noqa: E402

torch.set_num_threads(1)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def piq_clip():
    folder = importlib.util.find_spec("piq").submodule_search_locations[0]
    helper = types.ModuleType("piq.utils.common")  # used by its downloads alone
    helper.is_sha256_hash = lambda text: True
    names = {"piq": types.ModuleType("piq"), "piq.utils": types.ModuleType("piq.utils"), "piq.utils.common": helper}
    saved = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    spec = importlib.util.spec_from_file_location("piq_clip", f"{folder}/feature_extractors/clip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in saved.items():
        sys.modules.pop(name) if value is None else sys.modules.update({name: value})
    return module


@pytest.fixture(scope="module")
def network(piq_clip):
    tokenizer = load_tokenizer(PIPELINE / "tokenizer")
    torch.manual_seed(0)
    clip = piq_clip.CLIP(24, 64, (1, 2, 1, 1), 16, None, 77, tokenizer.eos_id + 1, 64, 1, 2)
    for module in clip.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return clip.eval(), tokenizer


def test_clip_iqa_equals_torchmetrics(network):
    clip, tokenizer = network
    # Blocks of colour: the mean over pixels of plain noise is the same for every image.
    images = np.random.default_rng(0).random((3, 3, 2, 3)).astype(np.float32).repeat(32, axis=1).repeat(32, axis=2)
    ids = torch.tensor(prompt_ids(tokenizer), dtype=torch.long)
    with torch.inference_mode():
        anchors = clip.encode_text(ids).float()
        anchors = anchors / anchors.norm(p=2, dim=-1, keepdim=True)
        # torchmetrics' _clip_iqa_update and _clip_iqa_compute, whose package cannot be imported without torchvision.
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        normal = (torch.tensor(images).permute(0, 3, 1, 2) - mean) / std
        features = clip.encode_image(normal, pos_embedding=False)
        features = features / features.norm(p=2, dim=-1, keepdim=True)
        expected = (100 * features @ anchors.t()).softmax(-1)[:, 0].numpy()
    weights = {name: value.numpy() for name, value in clip.state_dict().items()}
    ours = make_clip_iqa(towers_from_openai(weights), tokenizer, "digest", batch_size=2)
    np.testing.assert_allclose(ours.anchors, anchors.numpy(), atol=2e-6)
    found = ours.network(images)["features"]
    np.testing.assert_allclose(found / np.linalg.norm(found, axis=-1, keepdims=True), features.numpy(), atol=2e-6)
    np.testing.assert_allclose(ours(images), expected, atol=1e-5)
    assert np.ptp(features.numpy(), axis=0).max() > 1e-4  # the images differ by more than the tolerance


def test_half_precision_torchscript_is_read(network, tmp_path):
    """RN50.pt is a TorchScript archive of mostly float16 tensors, with three sizes as buffers."""
    clip, tokenizer = network

    class Sizes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in clip.named_children():
                setattr(self, name, child)
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(clip, name))
            for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", tokenizer.eos_id + 1)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, x):
            return x

    traced = torch.jit.trace(Sizes().half(), torch.zeros(1))
    traced.save(str(tmp_path / "RN50.pt"))
    clip.float()
    towers = towers_from_openai(read_torch(tmp_path / "RN50.pt"))
    expected = clip.state_dict()["text_projection"].half().float().numpy()
    np.testing.assert_array_equal(towers.text_params["text_projection"]["kernel"], expected)
