"""KID, inception score, precision and recall against loops; the joint pass and its cache."""

import math

import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.metrics import feature_metrics
from retrack_jax.metrics.feature_metrics import cached_feature_stats, evaluate_features, feature_stats, stats_of, too_few
from retrack_jax.metrics.features.network import FeatureNetwork, to_rgb, unit_grey
from retrack_jax.metrics.inception_score import few_samples_note, inception_score, split_scores
from retrack_jax.metrics.kid import kid
from retrack_jax.metrics.precision_recall import precision_recall


def _normal(*shape, seed=0, shift=0.0):
    return (np.random.default_rng(seed).normal(size=shape) + shift).astype(np.float32)


def test_kid_of_one_full_subset_is_the_estimator_written_out():
    x, y = _normal(7, 3), _normal(7, 3, seed=1, shift=0.5)

    def k(a, b):
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 42
    between = sum(k(x[i], y[j]) for i, j in pairs) / 49
    result = kid(x, y, seed=0, num_subsets=1)
    assert result.mean == pytest.approx(within - 2 * between, rel=1e-5)
    assert (result.num_subsets, result.subset_size) == (1, 7)
    assert result.std is None  # every subset would be the whole set


@pytest.mark.parametrize(("samples", "reference", "known"), [(600, 600, True), (100, 600, False), (600, 100, False)])
def test_kid_has_a_spread_only_where_subsets_of_both_sides_differ(samples, reference, known):
    result = kid(_normal(samples, 8), _normal(reference, 8, seed=1), seed=0, num_subsets=5, subset_size=100)
    assert (result.std is not None) == known and (not known or result.std > 0)


def test_kid_is_unbiased_around_zero_for_one_distribution_and_grows_with_the_shift():
    x = _normal(600, 8)
    same = kid(x, _normal(600, 8, seed=1), seed=0, num_subsets=50, subset_size=100)
    far = kid(x, _normal(600, 8, seed=1, shift=1.0), seed=0, num_subsets=50, subset_size=100)
    assert abs(same.mean) < 3 * same.std / math.sqrt(50) + 0.02
    assert far.mean > 10 * abs(same.mean)


def test_inception_score_by_hand():
    sure = np.array([[100.0, 0.0], [0.0, 100.0]] * 2, np.float32)
    np.testing.assert_allclose(split_scores(sure, 2), [2.0, 2.0], rtol=1e-12)  # sure and varied: the number of classes
    np.testing.assert_allclose(split_scores(np.zeros((4, 5), np.float32), 1), [1.0], rtol=1e-12)  # never sure: 1
    p = np.array([[0.9, 0.1], [0.5, 0.5]])
    marginal = p.mean(0)
    expected = math.exp(sum(p[i, c] * math.log(p[i, c] / marginal[c]) for i in range(2) for c in range(2)) / 2)
    np.testing.assert_allclose(split_scores(np.log(p), 1), [expected], rtol=1e-12)


def test_official_splits_are_cut_as_torch_chunk_cuts():
    logits = np.random.default_rng(0).normal(size=(25, 4)).astype(np.float32)
    for count, sizes in ((25, [3] * 8 + [1]), (20, [2] * 10), (11, [2] * 5 + [1])):  # torch.arange(count).chunk(10)
        ends = np.cumsum(sizes)
        expected = [split_scores(logits[end - size : end], 1)[0] for size, end in zip(sizes, ends, strict=True)]
        np.testing.assert_array_equal(split_scores(logits[:count], 10, official=True), expected)
    assert len(split_scores(logits, 10)) == 10


def test_inception_score_permutes_before_it_splits():
    by_class = np.repeat(np.eye(2, dtype=np.float32) * 100, 50, axis=0)  # sorted: every split has one class, and scores 1
    assert split_scores(by_class, 10).mean() == pytest.approx(1.0)
    assert inception_score(by_class, seed=0).mean > 1.8


@pytest.mark.parametrize(("num_samples", "warned"), [(10, True), (30, True), (100, False)])
def test_an_inception_score_near_the_number_of_images_of_a_split_is_noted(num_samples, warned):
    """Of one image a split the score is 1, whatever the model; here the images are of two sure classes in turns."""
    logits = np.tile(np.eye(2, dtype=np.float32) * 100, (num_samples // 2, 1))
    note = few_samples_note(inception_score(logits, seed=0), num_samples)
    assert bool(note) == warned and (not warned or f"at most about {num_samples // 10}" in note["inception_score_warning"])


def test_precision_and_recall_agree_with_loops():
    x, y = _normal(30, 3), _normal(25, 3, seed=1, shift=1.2)

    def share(points, manifold, k):
        distances = [[np.linalg.norm(a.astype(np.float64) - b) for b in manifold] for a in manifold]
        radii = [sorted(d for j, d in enumerate(row) if j != i)[k - 1] for i, row in enumerate(distances)]
        inside = [
            any(np.linalg.norm(p.astype(np.float64) - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points
        ]
        return np.mean(inside)

    result = precision_recall(x, y, k=3)
    assert result.precision == pytest.approx(share(x, y, 3))
    assert result.recall == pytest.approx(share(y, x, 3))
    assert 0 < result.precision < 1 and 0 < result.recall < 1


def test_precision_and_recall_tell_collapse_from_noise():
    reference = _normal(300, 4)
    collapsed = reference[:1] + 0.01 * _normal(300, 4, seed=1)
    assert precision_recall(collapsed, reference).precision > 0.95
    assert precision_recall(collapsed, reference).recall < 0.05
    wide = 10 * _normal(300, 4, seed=2)
    assert precision_recall(wide, reference).precision < 0.05


def test_precision_survives_features_far_from_zero():
    x, y = _normal(50, 4), _normal(50, 4, seed=1)
    near, far = precision_recall(x, y), precision_recall(x + 1000, y + 1000)
    assert near.precision == pytest.approx(far.precision, abs=0.041)
    assert near.recall == pytest.approx(far.recall, abs=0.041)


def _network(digest="d" * 64, scale=1.0):
    weights = _normal(16, 6) * scale
    calls = []

    def prepare(images):
        calls.append(len(images))
        return unit_grey(4)(images)

    network = FeatureNetwork(
        name="toy",
        digest=digest,
        resize="none",
        params=weights,
        apply_fn=lambda w, x: {"features": x.reshape(len(x), -1) @ w, "logits": x.reshape(len(x), -1) @ w[:, :3]},
        prepare=prepare,
        batch_size=8,
    )
    return network, calls


def _images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)


def test_one_pass_gives_every_metric_and_the_last_batch_is_not_special():
    network, calls = _network()
    images = _images(21)
    outputs = network(images)
    np.testing.assert_allclose(
        outputs["features"], images.reshape(21, -1) / np.float32(255) @ network.params, rtol=1e-5, atol=1e-6
    )
    calls.clear()
    samples = feature_stats(network, images)
    assert calls == [8, 8, 5]
    values, notes = evaluate_features(samples, feature_stats(network, _images(30, seed=1)))
    assert set(values) == set(feature_metrics.FEATURE_METRICS)
    assert all(math.isfinite(value) for value in values.values())
    assert notes["num_samples"] == 21 and notes["num_reference"] == 30 and "fid_warning" not in notes


def test_warns_in_its_notes_with_the_number_of_images():
    stats = stats_of(_normal(5, 8), _normal(5, 3))
    _, notes = evaluate_features(stats, stats_of(_normal(50, 8)), ("fid",))
    assert "FID from 5 images" in notes["fid_warning"]


def test_cache_is_read_back_and_keyed_by_data_transform_and_network(tmp_path):
    network, calls = _network()
    images = _images(20)
    first = cached_feature_stats(network, images, "data-a", tmp_path)
    calls.clear()
    again = cached_feature_stats(network, images, "data-a", tmp_path)
    assert not calls
    np.testing.assert_array_equal(first.moments.scatter, again.moments.scatter)
    np.testing.assert_array_equal(first.rows, again.rows)
    np.testing.assert_array_equal(first.logits, again.logits)
    cached_feature_stats(network, images, "data-b", tmp_path)
    cached_feature_stats(_network(digest="e" * 64, scale=2.0)[0], images, "data-a", tmp_path)
    assert len(list((tmp_path / "features").glob("*.npz"))) == 3


def test_a_pass_with_a_name_shows_its_progress_and_one_from_the_cache_has_none(tmp_path, capsys):
    for shown in ("features: reference: 20/20 (100%), ", ""):
        cached_feature_stats(_network()[0], _images(20), "data", tmp_path, desc="features: reference")
        printed = capsys.readouterr().err
        assert printed.startswith(shown) and len(printed.splitlines()) == bool(shown)
    feature_stats(_network()[0], _images(20))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("content", [slice(100), slice(0), slice(-200)])
def test_a_file_that_cannot_be_read_is_computed_again(tmp_path, caplog, content):
    network, calls = _network()
    first = cached_feature_stats(network, _images(20), "data", tmp_path)
    (path,) = (tmp_path / "features").glob("*.npz")
    path.write_bytes(path.read_bytes()[content])
    calls.clear()
    again = cached_feature_stats(network, _images(20), "data", tmp_path)
    assert calls and "making it again" in caplog.text
    np.testing.assert_array_equal(first.moments.scatter, again.moments.scatter)
    calls.clear()
    cached_feature_stats(network, _images(20), "data", tmp_path)
    assert not calls


def test_large_sets_keep_a_choice_of_rows_but_all_moments(monkeypatch):
    monkeypatch.setattr(feature_metrics, "MAX_ROWS", 10)
    features = _normal(40, 3)
    stats = stats_of(features)
    assert stats.rows.shape == (10, 3) and stats.moments.count == 40
    assert all(any((row == feature).all() for feature in features) for row in stats.rows)


def test_refuses():
    stats, few = stats_of(_normal(20, 4), _normal(20, 3)), stats_of(_normal(3, 4), _normal(3, 3))
    other = stats_of(_normal(20, 4), network="another network")
    with pytest.raises(UserError, match="use one network for both"):
        evaluate_features(stats, other)
    with pytest.raises(UserError, match="did you mean 'fid'"):
        evaluate_features(stats, stats, ("fud",))
    with pytest.raises(UserError, match="has no classes"):
        evaluate_features(stats_of(_normal(20, 4)), stats, ("inception_score",))
    with pytest.raises(UserError, match="more than 3 images on each side, found 3"):
        evaluate_features(few, stats, ("precision",))
    with pytest.raises(UserError, match="10 splits needs as many images, found 3"):
        evaluate_features(few, stats, ("inception_score",))
    network, _ = _network()
    nan = np.zeros((20, 4, 4, 1), np.float32)
    nan[11] = np.nan
    with pytest.raises(UserError, match="hold NaN or infinity"):
        network(nan)
    with pytest.raises(UserError, match=r"takes \(4, 4, 1\)"):
        network(np.zeros((2, 5, 5, 1), np.uint8))
    with pytest.raises(UserError, match="2 channels"):
        to_rgb(np.zeros((1, 4, 4, 2), np.uint8))


def test_grey_images_become_three_equal_channels():
    grey = _images(2)
    np.testing.assert_array_equal(to_rgb(grey), np.concatenate([grey] * 3, axis=-1))


def test_says_which_metrics_so_few_images_do_not_define(caplog):
    assert too_few(feature_metrics.FEATURE_METRICS, 10, 4) == {}
    reasons = too_few(feature_metrics.FEATURE_METRICS, 9, 3)
    assert set(reasons) == {"inception_score", "precision", "recall"} and reasons["recall"].endswith("4 images, found 3")
    for count in (9, 10):  # the bounds are those of the metrics themselves
        stats = stats_of(_normal(count, 4), _normal(count, 3))
        defined = [name for name in feature_metrics.FEATURE_METRICS if name not in too_few([name], count, count)]
        assert set(evaluate_features(stats, stats, defined)[0]) == set(defined)
    for count in (2, 4):
        stats = stats_of(_normal(count, 4))
        defined = [name for name in ("fid", "kid", "precision") if name not in too_few([name], count, count)]
        assert set(evaluate_features(stats, stats, defined)[0]) == set(defined)
    assert "FID from 2 images" in caplog.text  # the number, where the run is followed
