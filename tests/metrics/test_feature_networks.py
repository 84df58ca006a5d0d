"""The imported feature networks against PyTorch's recorded arrays (tests/parity/record_metrics.py), and files of others."""

from pathlib import Path

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics.features.inception import inception_network
from retrack_jax.metrics.features.resize import pil_shorter_side, resize_matrix
from retrack_jax.metrics.features.resnet import mnist_resnet_network, sscd_network, torchvision_name
from tests.metrics.feature_weights import inception_shapes, mnist_shapes, random_images, random_state, sscd_shapes

RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "metrics" / "networks.npz")
DIGEST = "d" * 64


@pytest.fixture(scope="module")
def mnist_state():
    return random_state(mnist_shapes())


def _relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("rule", ["torchmetrics", "tf1"])
@pytest.mark.parametrize("size", [8, 20])
def test_resize_rules(rule, size):
    matrix = resize_matrix(rule, size, 13)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-6)
    image = random_images(1, size, 1)[0, :, :, 0].astype(np.float32)
    np.testing.assert_allclose(matrix @ image @ matrix.T, RECORDED[f"{rule}_{size}"], atol=1e-3)


def test_the_two_resize_rules_differ():
    assert np.abs(resize_matrix("tf1", 32, 299) - resize_matrix("torchmetrics", 32, 299)).max() > 0.1
    np.testing.assert_array_equal(resize_matrix("tf1", 299, 299), np.eye(299, dtype=np.float32))


def test_pillow_resizes_the_shorter_side():
    assert pil_shorter_side(random_images(1, 64)[0, :, :48], 288).shape == (384, 288, 3)
    assert pil_shorter_side(random_images(1, 64)[0, :50], 288).shape == (288, 368, 3)  # 368.64 is cut, not rounded
    whole = random_images(1, 288)[0]
    assert pil_shorter_side(whole, 288) is whole


def test_inception():
    network = inception_network(random_state(inception_shapes()), DIGEST, resize="tf1", batch_size=2)
    outputs = network(random_images(2, 32))
    assert _relative(outputs["features"], RECORDED["inception_features"]) < 1e-4
    assert _relative(outputs["logits"], RECORDED["inception_logits"]) < 1e-4


def test_sscd():
    outputs = sscd_network(random_state(sscd_shapes()), DIGEST, batch_size=2)(random_images(2, 64))
    assert _relative(outputs["features"], RECORDED["sscd"]) < 1e-4
    np.testing.assert_allclose(np.linalg.norm(outputs["features"], axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("official", [False, True])
def test_mnist_resnet(mnist_state, official):
    network = mnist_resnet_network(mnist_state, DIGEST, official=official, batch_size=6)
    logits = network(random_images(6, 28, 1).astype(np.float32) / np.float32(255))["logits"]
    assert _relative(logits, RECORDED["mnist_logits_official" if official else "mnist_logits"]) < 1e-4


def test_classy_visions_names_of_sscd_mean_the_same_weights():
    shapes = sscd_shapes()
    classy = {_to_classy(name): shape for name, shape in shapes.items()}
    assert len(classy) == len(shapes)
    assert {torchvision_name(name): shape for name, shape in classy.items()} == shapes
    assert {torchvision_name(name): shape for name, shape in shapes.items()} == shapes


def _to_classy(name):
    """torchvision's name -> Classy Vision's, written out as that library builds its modules."""
    if name.startswith("backbone.fc."):
        return name.replace("backbone.fc", "embeddings.1")
    if name.startswith(("backbone.conv1", "backbone.bn1")):
        return name.replace("backbone.conv1", "backbone.initial_block._module.0").replace(
            "backbone.bn1", "backbone.initial_block._module.1"
        )
    _, layer, index, *part = name.split(".")
    inside = {"conv1": "0", "bn1": "1", "conv2": "3", "bn2": "4", "conv3": "6"}
    if part[0] == "bn3":
        place = "bn"
    else:
        place = f"convolutional_block.{inside[part[0]]}" if part[0] in inside else ".".join(part[:-1])
    return f"backbone.blocks.{int(layer[-1]) - 1}.block{int(layer[-1]) - 1}-{index}.{place}.{part[-1]}"


def test_refuses_weights_that_are_not_this_networks(mnist_state):
    with pytest.raises(UserError, match="not fit FID's Inception v3.*missing.*surplus"):
        inception_network(mnist_state, DIGEST)
    with pytest.raises(UserError, match="not fit SSCD's ResNet-50"):
        sscd_network(mnist_state, DIGEST)
    lacking = {name: value for name, value in mnist_state.items() if name != "layer3.0.bn1.weight"}
    with pytest.raises(UserError, match="1 missing: layer3.0.bn1.weight$"):
        mnist_resnet_network(lacking, DIGEST)
    with pytest.raises(UserError, match=r"1 mis-shaped: fc.weight \[11, 512\] instead of \[10, 512\]"):
        mnist_resnet_network(mnist_state | {"fc.weight": np.zeros((11, 512), np.float32)}, DIGEST)
    with pytest.raises(UserError, match="holds NaN or infinity: 1 tensors: fc.bias"):
        mnist_resnet_network(mnist_state | {"fc.bias": np.full(10, np.nan, np.float32)}, DIGEST)


def test_counters_of_batch_normalisation_are_not_weights(mnist_state):
    counters = {name.replace("running_var", "num_batches_tracked"): np.array(3) for name in mnist_state if "running_var" in name}
    assert mnist_resnet_network(mnist_state | counters, DIGEST).digest == DIGEST


def test_refuses_images_that_it_does_not_take(mnist_state):
    network = mnist_resnet_network(mnist_state, DIGEST)
    with pytest.raises(UserError, match=r"takes \(28, 28, 1\)"):
        network(random_images(2, 32, 1))
    with pytest.raises(UserError, match="choose one of torchmetrics, tf1"):
        resize_matrix("tf2", 8, 13)
