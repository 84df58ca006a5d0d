"""The digit classifier: it learns, repeats itself, survives the disk and refuses what is not a digit."""

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import image_set, part
from retrack_jax.data.sources.digits import digits_tshirt
from retrack_jax.evaluate.networks import feature_network
from retrack_jax.metrics.features.digit_net import load_digit_net, save_digit_net, train_digit_net


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.floor(data.images / 16 * 255).astype(np.uint8)[..., None], data.target


@pytest.fixture(scope="module")
def network(digits):
    images, labels = digits
    return train_digit_net(images[:1500], labels[:1500], num_epochs=15)


def test_knows_digits_that_it_has_not_seen(network, digits):
    images, labels = digits
    outputs = network(images[1500:])
    assert outputs["features"].shape == (297, 64) and outputs["logits"].shape == (297, 10)
    assert (outputs["logits"].argmax(1) == labels[1500:]).mean() > 0.9


def test_the_seed_decides_the_weights(digits):
    images, labels = digits[0][:256], digits[1][:256]
    one, same, other = (train_digit_net(images, labels, seed, num_epochs=1) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert one.description == f"digit-net (resize none, sha256 {one.digest[:16]})"


def test_learns_images_of_28_pixels_and_no_tshirt(digits, tmp_path):
    """The same digits, each pixel three times as large and with a border, and an image of label 10 among them."""
    images, labels = digits
    large = np.pad(images.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2), (0, 0)))
    with_tshirt = image_set("large", large[:257], [str(row) for row in range(257)], np.append(labels[:256], 10))
    network = feature_network("digits", with_tshirt, tmp_path, tmp_path, "tf1")
    assert (network(large[1500:])["logits"].argmax(1) == labels[1500:]).mean() > 0.8
    assert load_digit_net(tmp_path / "digit_net.npz").digest == network.digest
    with pytest.raises(UserError, match=r"takes \(28, 28, 1\)"):
        network(images)


def test_never_sees_a_tshirt_that_has_a_digits_label(tmp_path):
    """Forty digits and five T-shirts, these with the label 7, with their own, or left out: one network."""
    digests = set()
    for name, label, count in (("seven", 7, 45), ("own", None, 45), ("none", None, 40)):
        images = part(digits_tshirt(5, label), np.arange(1757, 1757 + count), name)
        (tmp_path / name).mkdir()
        digests.add(feature_network("digits", images, tmp_path / name, tmp_path, "tf1").digest)
    assert len(digests) == 1


def test_is_saved_whole_and_read_back(network, digits, tmp_path):
    save_digit_net(tmp_path / "net.npz", network)
    again = load_digit_net(tmp_path / "net.npz")
    assert again.digest == network.digest
    np.testing.assert_array_equal(again(digits[0][:5])["features"], network(digits[0][:5])["features"])


def test_refuses_damaged_missing_or_changed_files(network, tmp_path):
    path = tmp_path / "net.npz"
    with pytest.raises(UserError, match="no file"):
        load_digit_net(path)
    save_digit_net(path, network)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged .* trained again"):
        load_digit_net(path)
    path.write_bytes(whole)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["logits/bias"] = arrays["logits/bias"] + 1
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="does not have the digest"):
        load_digit_net(path)
    np.savez(path, digest="0")
    with pytest.raises(UserError, match="does not have the digest"):
        load_digit_net(path)


def test_other_images_are_not_a_class(digits):
    images, labels = digits[0][:64], digits[1][:64].copy()
    labels[0] = 10
    with pytest.raises(UserError, match="other images are not a class"):
        train_digit_net(images, labels)
    with pytest.raises(UserError, match=r"expected \(8, 8, 1\) or \(28, 28, 1\)"):
        train_digit_net(np.zeros((64, 9, 8, 1), np.uint8), digits[1][:64])
    with pytest.raises(UserError, match="as many labels"):
        train_digit_net(images, labels[:3])
