"""Class labels: what is refused, whose neighbors are whose, the exact class-conditional optimum, and a label that is gone."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits_label
from retrack_jax.checks import UserError
from retrack_jax.config.options import DataOptions, Options, SamplingOptions
from retrack_jax.config.reading import read_config
from retrack_jax.config.recipes import UnlearnOptions
from retrack_jax.data.dataset import image_set, pixels_to_model
from retrack_jax.data.labels import most_neighbors
from retrack_jax.diffusion.schedule import Schedule
from retrack_jax.problem import labels
from retrack_jax.problem.codec import PixelCodec
from retrack_jax.problem.evaluation import EvaluatedModel
from retrack_jax.problem.problem import build_problem
from retrack_jax.problem.target import make_target, with_labels
from retrack_jax.problem.unread import check_unread
from retrack_jax.unlearn import losses
from retrack_jax.unlearn.options import RetrackOptions

NUM, NULL = 24, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, 3, 3, 1), dtype=np.uint8)
PIXELS[7] = PIXELS[1]  # a copy, under the same label
PIXELS[5] = PIXELS[0]  # a copy, under another
LABELS = np.arange(NUM) % 3
IMAGES = image_set("dots", PIXELS, [f"{i:02d}" for i in range(NUM)], LABELS)


def target_of(*forget, null=NULL):
    forget = np.array(forget)
    target = make_target("some", IMAGES, forget, np.setdiff1d(np.arange(NUM), forget))
    return with_labels(target, None if null is None else np.array([null]))


def options(sampling=None, **data) -> Options:
    return Options(data=DataOptions(source="digits_tshirt", **data), sampling=SamplingOptions(**(sampling or {})))


# ---- Neighbors


def test_copies_under_different_labels_are_different_examples():
    target = target_of(0, 5, 1, 7)
    assert len(target.unique) == 3
    np.testing.assert_array_equal(PIXELS[target.unique][target.copy_of], PIXELS[target.forget])
    np.testing.assert_array_equal(LABELS[target.unique][target.copy_of], LABELS[target.forget])


@pytest.mark.parametrize("null", [None, NULL])
def test_neighbors_have_the_label_of_the_forgotten_image_and_under_the_null_label_any(tmp_path, null):
    target, k = target_of(0, 1, 9, 11, null=null), 4
    found = PixelCodec(tmp_path).forget_data(target, k, "exact")
    flat = pixels_to_model(PIXELS).reshape(NUM, -1).astype(np.float64)

    def nearest(row, allowed):
        distances = np.linalg.norm(flat[allowed] - flat[row], axis=1)
        return allowed[np.argsort(distances, kind="stable")[:k]]

    for at, row in enumerate(target.unique):
        mine = nearest(row, target.remain[LABELS[target.remain] == LABELS[row]])
        np.testing.assert_array_equal(found.neighbor_positions[at], mine)
        np.testing.assert_array_equal(found.neighbors["pixels"][found.neighbor_rows[at]], PIXELS[mine])
        np.testing.assert_allclose(found.distances[at], np.linalg.norm(flat[mine] - flat[row], axis=1), rtol=1e-5)
        if null is not None:
            of_any = PIXELS[nearest(row, target.remain)]
            np.testing.assert_array_equal(found.neighbors["pixels"][found.null_neighbor_rows[at]], of_any)
    assert (found.null_neighbor_rows is None) == (null is None)


def test_targets_searched_together_have_the_neighbors_of_each_alone(tmp_path):
    targets = [target_of(0, 1), target_of(2)]
    together, alone = PixelCodec(tmp_path / "together"), PixelCodec(tmp_path / "alone")
    together.prepare(targets, 3, "exact")
    for target in targets:
        one, other = (codec.forget_data(target, 3, "exact") for codec in (together, alone))
        np.testing.assert_array_equal(one.neighbor_positions, other.neighbor_positions)


def class_conditional_noise(x_t, label, forget, gamma, sigma):
    """E[eps | x_t, c] if the data are the remaining images of label c, each as likely: loops over float64, from Bayes' rule."""
    remaining = [PIXELS[i] / 127.5 - 1.0 for i in range(NUM) if LABELS[i] == label and i not in forget]
    log_weights = [-np.sum((x_t - gamma * a) ** 2) / (2 * sigma**2) for a in remaining]
    weights = [np.exp(w - max(log_weights)) for w in log_weights]
    mean = sum(w * a for w, a in zip(weights, remaining, strict=True)) / sum(weights)
    return (x_t - gamma * mean) / sigma


def test_all_neighbors_of_the_label_give_the_optimum_of_a_retrained_network(tmp_path):
    """With K = |R_c| the target is the exact class-conditional posterior mean, at every noise level."""
    target = target_of(0, 1, 2, 9, 10, 11)
    k = most_neighbors(target.labels, target.forget, NUM)
    assert k == 6  # of each label eight less two
    found = PixelCodec(tmp_path).forget_data(target, k, "exact")
    neighbors = pixels_to_model(found.neighbors["pixels"])[found.neighbor_rows]
    schedule, draws = Schedule.from_config({}), np.random.default_rng(1)
    for t in (20, 300, 700, 999):
        gamma, sigma = float(schedule.gamma[t]), float(schedule.sigma[t])
        x_t = gamma * pixels_to_model(PIXELS[target.unique]) + sigma * draws.normal(size=(6, 3, 3, 1)).astype(np.float32)
        ours, _ = losses.retrack_target(jnp.asarray(x_t), jnp.asarray(neighbors), *(jnp.full(6, v) for v in (gamma, sigma)))
        for row, x, eps in zip(target.unique, x_t, ours, strict=True):
            exact = class_conditional_noise(x.astype(np.float64), LABELS[row], set(target.forget.tolist()), gamma, sigma)
            np.testing.assert_allclose(eps, exact, rtol=2e-4, atol=2e-4)


def test_beside_a_reference_of_all_images_no_sample_is_left_out(tmp_path):
    config = digits_label.get_config()
    for reference, left_out in (("remain", True), ("all", False)):
        config.update_from_flattened_dict({"data.copies": 8, "data.cache_dir": str(tmp_path), "eval.fid_reference": reference})
        problem = build_problem(read_config(config))
        model = EvaluatedModel(params=None, pretrained=None, arrays={}, path=tmp_path / "evaluation.json", workdir=tmp_path)
        task = problem.evaluation._task(problem.target("tshirt_*"), model)
        assert (task.of_forgotten is not None) == left_out and len(task.reference) == (1797 if left_out else 1805)


def test_without_samples_under_labels_of_forgotten_images_labels_are_as_frequent_as_among_the_remaining():
    """Six of the eight images of label 0 are forgotten, and one of label 1."""
    target = target_of(0, 3, 6, 9, 12, 15, 1)
    given = labels.Labels(options({"labels": (0, 1)}), IMAGES, 3)
    assert given.of_forgotten(target) is None  # they are what the user wants to see
    drawn = labels.Labels(options(), IMAGES, 3)
    under = drawn.of_forgotten(target)
    sampled = drawn.sampled(target)["samples"]
    assert under.sum() == 7 and sorted(sampled) == sorted(LABELS)
    np.testing.assert_array_equal(np.bincount(sampled[~under]), np.bincount(LABELS[target.remain]))


# ---- A label of which nothing remains


def recipe(**fields) -> UnlearnOptions:
    return UnlearnOptions(own=RetrackOptions(**fields))


def test_a_whole_class_needs_a_decision():
    gone = target_of(*np.flatnonzero(LABELS == 2), 0)
    with pytest.raises(UserError, match="no image of label 2 remains besides some, .*whole_class to null .* or nearest"):
        labels.check_whole_class(gone, recipe())
    labels.check_whole_class(gone, recipe(whole_class="null"))
    labels.check_whole_class(gone, recipe(whole_class="nearest"))
    labels.check_whole_class(target_of(2, 5), recipe())
    without_null = dataclasses.replace(gone, null=None)
    with pytest.raises(UserError, match="whole_class is null, and the network has no null label"):
        labels.check_whole_class(without_null, recipe(whole_class="null"))
    with pytest.raises(UserError, match="whole_class is 'nul'; choose one of null, nearest"):
        recipe(whole_class="nul")


def test_images_of_a_label_that_is_gone_are_anchored_or_have_neighbors_of_any_label(tmp_path):
    gone = target_of(*np.flatnonzero(LABELS == 2), 0)
    conditioning = labels.Labels(options(null_label=NULL), IMAGES, 4)
    anchor = conditioning.anchor(gone, None, recipe(whole_class="null"))
    np.testing.assert_array_equal(anchor.used, LABELS[gone.unique] == 2)
    assert (anchor.condition == NULL).all()
    assert conditioning.anchor(gone, None, recipe(whole_class="nearest")) is None
    assert conditioning.anchor(target_of(2), None, recipe(whole_class="null")) is None
    found = PixelCodec(tmp_path).forget_data(gone, 3, "exact")
    of_gone = LABELS[gone.unique] == 2
    assert set(LABELS[found.neighbor_positions[of_gone]].ravel()) == {0, 1}
    np.testing.assert_array_equal(found.neighbor_rows[of_gone], found.null_neighbor_rows[of_gone])
    assert "label 2 remains; under it the model was led to what the pretrained model" in labels.in_words(
        gone, recipe(whole_class="null")
    )
    assert "nearest remaining images" in labels.in_words(gone, recipe(whole_class="nearest"))
    assert labels.in_words(target_of(2), recipe()) == ""


def test_neighbors_are_bounded_by_the_smallest_label():
    target = target_of(*np.flatnonzero(LABELS == 1)[:5], 0)
    assert most_neighbors(target.labels, target.forget, NUM) == 3
    assert most_neighbors(None, target.forget, NUM) == NUM - 6
    whole = target_of(*np.flatnonzero(LABELS == 1), 0)
    assert most_neighbors(whole.labels, whole.forget, NUM) == 7


# ---- The conditioning


def test_every_image_has_its_own_label_and_samples_have_those_of_the_data():
    conditioning, target = labels.Labels(options(null_label=NULL), IMAGES, 4), target_of(0)
    np.testing.assert_array_equal(conditioning.of_images(IMAGES)(np.array([4, 0])), [1, 0])
    assert conditioning.table(target) is None and conditioning.dropout == 0.1 and list(conditioning.null) == [NULL]
    (drawn,) = conditioning.sampled(target).values()
    assert drawn.dtype == np.int32 and np.array_equal(np.bincount(drawn), np.bincount(LABELS))
    chosen = labels.Labels(options({"labels": (2, 3)}, null_label=NULL, label_dropout=0.3), IMAGES, 4)
    assert list(chosen.sampled(target)["samples"]) == [2, 3] and chosen.dropout == 0.3
    assert chosen.describe("samples", target) != conditioning.describe("samples", target)
    assert labels.Labels(options(), IMAGES, 3).dropout == 0.0


@pytest.mark.parametrize(
    ("num_labels", "sampling", "data", "words"),
    [
        (2, {}, {}, "02 of dots has label 2, and the network knows 0 to 1"),
        (3, {"labels": (3,)}, {}, "config.sampling.labels is 3; .*at most 2"),
        (3, {"labels": ("seven",)}, {}, "config.sampling.labels is 'seven'"),
        (3, {}, {"null_label": 3}, "config.data.null_label is 3; .*at most 2"),
        (3, {}, {"null_label": 2}, "config.data.null_label is 2, and 8 images have this label"),
        (3, {}, {"label_dropout": 0.1}, "config.data.label_dropout is 0.1 and there is no null label"),
        (3, {"label_guidance": 2.0}, {}, "guidance leads away from a null label; set config.data.null_label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(num_labels, sampling, data, words):
    with pytest.raises(UserError, match=words):
        labels.Labels(options(sampling, **data), IMAGES, num_labels)


def test_a_network_with_labels_and_images_without_are_refused():
    with pytest.raises(UserError, match="the network takes class labels, and dots has none; of a folder config.data.labels says"):
        labels.Labels(options(), dataclasses.replace(IMAGES, labels=None), 3)
    with pytest.raises(UserError, match="-00 of dots has label -1, and the network knows any from 0 on"):
        negative = image_set("dots", PIXELS, [f"-{i:02d}" for i in range(NUM)], LABELS - 1)
        labels.Labels(options(), negative, None)


@pytest.mark.parametrize(
    ("sampling", "data"),
    [
        ({}, {"null_label": 3}),
        ({}, {"label_dropout": 0.1}),
        ({}, {"label_vectors": "x.npy"}),
        ({"labels": (1,)}, {}),
        ({"label_guidance": 2.0}, {}),
    ],  # fmt: skip
)
def test_fields_of_labels_are_refused_for_an_unconditional_network(sampling, data):
    check_unread(options(), "labels")
    with pytest.raises(UserError, match="the network takes no class labels and has no use for it; leave it out"):
        check_unread(options(sampling, **data), "labels")
