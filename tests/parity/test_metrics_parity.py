"""The feature networks, resize rules, FID, KID and inception score against PyTorch, torchmetrics and torch-fidelity themselves.

Weights are random: the real files are not here. They are saved by `torch.save` (or as TorchScript) and read back without PyTorch.
"""

import copy
import functools

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from retrack_jax.files import file_digest  # noqa: E402
from retrack_jax.metrics.feature_metrics import evaluate_features, feature_stats, stats_of  # noqa: E402
from retrack_jax.metrics.features.inception import inception_network  # noqa: E402
from retrack_jax.metrics.features.resize import resize_matrix  # noqa: E402
from retrack_jax.metrics.features.resnet import mnist_resnet_network, sscd_network  # noqa: E402
from retrack_jax.metrics.fid import fid  # noqa: E402
from retrack_jax.metrics.inception_score import split_scores  # noqa: E402
from retrack_jax.metrics.moments import moments_of  # noqa: E402
from tests.metrics.feature_weights import inception_shapes, mnist_shapes, random_images, random_state, sscd_shapes  # noqa: E402
from tests.parity import torch_twins  # noqa: E402
from tests.torch_files import read_torch  # noqa: E402

with torch_twins.torchvision_stand_in():
    pytest.importorskip("torch_fidelity")
pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(torch_twins.torch_state(random_state(inception_shapes())), path)
    return path


@pytest.fixture(scope="module")
def networks(inception_file):
    """Our network and theirs for each rule, built and compiled once: `networks(rule) -> (ours, theirs)`."""

    @functools.cache
    def build(rule):
        ours = inception_network(read_torch(inception_file), file_digest(inception_file), resize=rule, batch_size=8)
        return ours, _extractor(rule, inception_file, ["2048", "logits_unbiased"])

    return build


def _relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def _nchw(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _extractor(kind, path, features):
    if kind == "tf1":
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3("inception", features, feature_extractor_weights_path=str(path))
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception", features, feature_extractor_weights_path=str(path))


@pytest.mark.parametrize("rule", ["torchmetrics", "tf1"])
@pytest.mark.parametrize("sides", [(32, 299), (256, 299), (299, 299), (512, 299), (28, 299)])
def test_resize_rules(rule, sides):
    image = random_images(1, sides[0]).astype(np.float32)
    matrix = resize_matrix(rule, *sides)
    ours = np.einsum("ih,jw,bhwc->bijc", matrix, matrix, image, optimize=True)
    if rule == "tf1":
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        theirs = interpolate_bilinear_2d_like_tensorflow1x(_nchw(image), size=(sides[1],) * 2, align_corners=False)
    else:
        theirs = torch.nn.functional.interpolate(
            _nchw(image), size=(sides[1],) * 2, mode="bilinear", align_corners=False, antialias=True
        )
    np.testing.assert_allclose(
        ours, theirs.permute(0, 2, 3, 1).numpy(), atol=6e-3
    )  # of 255; PyTorch computes the centres in float32


@pytest.mark.parametrize(("rule", "side"), [("torchmetrics", 32), ("tf1", 32), ("torchmetrics", 320)])
def test_inception_features_and_logits(networks, rule, side):
    images = random_images(3, side)
    network, extractor = networks(rule)
    ours = network(images)
    forward = extractor._torch_fidelity_forward if rule == "torchmetrics" else extractor.forward
    with torch.no_grad():
        features, logits = (value.numpy() for value in forward(_nchw(images)))
    errors = _relative(ours["features"], features), _relative(ours["logits"], logits)
    print(f"{rule} {side}: features {errors[0]:.1e}, logits {errors[1]:.1e} relative")
    assert max(errors) < 1e-4


@pytest.mark.parametrize("rule", ["torchmetrics", "tf1"])
def test_fid_and_inception_score_of_the_same_images(networks, rule):
    real, fake = random_images(16, 32), random_images(16, 32, seed=5) // 2 + 60
    network, extractor = networks(rule)
    samples, reference = feature_stats(network, fake), feature_stats(network, real)
    ours = fid(samples.moments, reference.moments)
    if rule == "torchmetrics":
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore

        metric = FrechetInceptionDistance(feature=extractor)
        metric.update(_nchw(real), real=True)
        metric.update(_nchw(fake), real=False)
        theirs = metric.compute().item()
        classifier = copy.copy(extractor)
        classifier.features_list = ["logits_unbiased"]
        score = InceptionScore(feature=classifier, splits=2)
        score.update(_nchw(fake))
        torch.manual_seed(3)
        their_score = score.compute()[0].item()
        torch.manual_seed(3)
        order = torch.randperm(16).numpy()
    else:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_isc import isc_features_to_metric

        with torch.no_grad():
            fake_features, logits = extractor(_nchw(fake))
            real_features, _ = extractor(_nchw(real))
        statistics = [fid_features_to_statistics(features) for features in (fake_features, real_features)]
        theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
        their_score = isc_features_to_metric(logits, splits=2, shuffle=False)["inception_score_mean"]
        order = np.arange(16)
    ours_score = split_scores(samples.logits[order], 2).mean()
    print(f"{rule}: FID {ours:.6f}, theirs {theirs:.6f}; inception score {ours_score:.7f}, theirs {their_score:.7f}")
    assert abs(ours - theirs) < 1e-3 + 1e-3 * abs(theirs)
    assert ours_score == pytest.approx(their_score, rel=1e-4)


def test_kid_of_the_same_subsets():
    from torch_fidelity.metric_kid import kid_features_to_metric

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 64)).astype(np.float32), (rng.normal(size=(300, 64)) * 1.2 + 0.1).astype(np.float32)
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subsets=200, kid_subset_size=100, verbose=False, rng_seed=0
    )
    values, _ = evaluate_features(stats_of(x), stats_of(y), ("kid",))
    mean, std = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    # Other subsets: ours are of 300 rows, theirs of 100, so means agree within their error.
    assert abs(values["kid"] - mean) < 4 * std / np.sqrt(200) + 0.05 * abs(mean)


@pytest.mark.parametrize("layout", ["torchscript", "state_dict"])
def test_sscd_embeddings(tmp_path, layout):
    twin = torch_twins.TorchSscd()
    twin.load_state_dict(torch_twins.torch_state(random_state(sscd_shapes())))
    twin.eval()
    path = tmp_path / "sscd.pt"
    if layout == "torchscript":
        torch.jit.save(torch.jit.trace(twin, torch.zeros(1, 3, 64, 64)), path)
        state = read_torch(path)
    else:
        torch.save(twin.state_dict(), path)
        state = read_torch(path)
    network = sscd_network(state, file_digest(path), batch_size=2)
    images = random_images(2, 64)[:, :48]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    # The official transform, torchvision's Resize(288), on 48 x 64: the shorter side by Pillow's bilinear filter.
    resized = np.stack([Image.fromarray(image).resize((384, 288), Image.Resampling.BILINEAR) for image in images])
    with torch.no_grad():
        theirs = twin(((torch.from_numpy(resized) / 255 - mean) / std).permute(0, 3, 1, 2)).numpy()
    ours = network(images)["features"]
    assert (np.einsum("nd,nd->n", ours, theirs) > 1 - 1e-5).all()
    assert _relative(ours, theirs) < 1e-4
    # The metric itself, the cosine of two images, within 1e-3.
    assert ours[0] @ ours[1] == pytest.approx(float(theirs[0] @ theirs[1]), abs=1e-3)


@pytest.mark.parametrize("official", [False, True])
def test_mnist_resnet(tmp_path, official):
    twin = torch_twins.torch_mnist()
    twin.load_state_dict(torch_twins.torch_state(random_state(mnist_shapes())))
    torch.save(twin.state_dict(), tmp_path / "mnist.pt")
    network = mnist_resnet_network(read_torch(tmp_path / "mnist.pt"), "d" * 64, official=official, batch_size=8)
    twin.train(official)
    images = random_images(20, 28, 1).astype(np.float32) / 255
    with torch.no_grad():
        theirs = np.concatenate([twin(_nchw(images[start : start + 8])).numpy() for start in range(0, 20, 8)])
    assert _relative(network(images)["logits"], theirs) < 1e-4


def test_moments_are_torchmetrics_covariance():
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 32)), rng.normal(size=(500, 32)) * 1.3 + 0.2
    stats = [(torch.from_numpy(z.mean(0)), torch.from_numpy(np.cov(z, rowvar=False))) for z in (x, y)]
    assert fid(moments_of(x), moments_of(y)) == pytest.approx(_compute_fid(*stats[0], *stats[1]).item(), rel=1e-8)
