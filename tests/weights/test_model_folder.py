"""What people give as a model's folder, and what they are told."""

import pytest

from retrack_jax.checks import UserError
from retrack_jax.weights.folder import model_folder


@pytest.mark.parametrize(
    "given, words",
    [
        ("https://huggingface.co/google/ddpm-cifar10-32", "co/google/ddpm-cifar10-32 is an address; give its name on the hub"),
        ("gs://bucket/model", "gs://bucket/model is an address; give its name on the hub .org/name., or download it"),
        ("weights.safetensors", "weights.safetensors is a file; give the folder that holds it"),
        ("empty", "its unet/, unet_ema/ or transformer/ .there.; give a folder that diffusers saved$"),
        ("a/b/c", "because there is no such folder.; give a folder that diffusers saved$"),
    ],
)
def test_what_is_no_model_folder(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        model_folder(given)
