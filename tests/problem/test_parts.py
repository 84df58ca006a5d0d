"""Each part of a problem alone: data and targets, codecs, conditioning."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.config.options import DataOptions, EvalOptions, Options, SamplingOptions
from retrack_jax.data.dataset import pixels_to_model
from retrack_jax.problem.codec import LatentCodec, PixelCodec, check_resolution
from retrack_jax.problem.conditioning import Conditioning, PairedPrompts
from retrack_jax.problem.evaluation import EvaluatedModel, ImageEvaluation
from retrack_jax.problem.training_data import ConceptData, ImageData
from tests.tiny_sd import CONCEPTS

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
PIXELS[7] = PIXELS[3]  # a copy
LABELS = np.arange(12) % 3


@pytest.fixture
def image_data(tmp_path):
    """Makes the data of twelve images, of which two are equal, with changed arrays or options."""

    def make(images=PIXELS, labels=LABELS, ids=tuple("abcdefghijkl"), **options) -> ImageData:
        np.savez(tmp_path / "images.npz", images=images, labels=labels, ids=np.array(ids))
        return ImageData(DataOptions(source="npz", dir=str(tmp_path / "images.npz"), **options))

    return make


def concept_options(tmp_path, folder=CONCEPTS) -> DataOptions:
    return DataOptions(source="concepts", dir=str(folder), resolution=32, cache_dir=str(tmp_path / "cache"))


# ---- Data and targets


def test_a_target_of_images_parts_the_whole_set_and_copies_share_a_row(image_data):
    target = image_data().target("d+h+e")
    assert list(target.forget) == [3, 4, 7] and sorted([*target.forget, *target.remain]) == list(range(12))
    assert len(target.unique) == 2 and target.concept is None
    np.testing.assert_array_equal(PIXELS[target.unique][target.copy_of], PIXELS[target.forget])
    pictures = [PIXELS[row].tobytes() for row in target.unique]
    assert pictures == sorted(pictures)  # whatever order the user or the files had
    assert list(image_data().target("label:1").forget) == [1, 4, 7, 10]


@pytest.mark.parametrize(("spec", "message"), [("z", "no image of npz is named 'z'"), ("*", "whole set")])
def test_a_target_of_no_images_or_of_all_is_refused(image_data, spec, message):
    with pytest.raises(UserError, match=message):
        image_data().target(spec)


def test_excluded_and_held_out_images_are_in_no_target(image_data):
    data = image_data(exclude="a", held_out=0.25)
    assert len(data.held_out) == 3 and len(data.images) in (8, 9) and "a" not in data.images.ids
    assert not {*data.images.ids} & {*data.held_out.ids}
    name = data.images.ids[0]
    assert len(data.target(name).remain) == len(data.images) - 1
    with pytest.raises(UserError, match="is named"):
        data.target(data.held_out.ids[0])


def test_digests_of_images_say_what_changed(image_data):
    first = image_data()
    digests = first.digests()

    def differing(changed: ImageData) -> set[str]:
        return {name for name, digest in changed.digests().items() if digest != digests[name]}

    assert not differing(image_data())
    assert differing(image_data(images=PIXELS[::-1].copy())) == {"images"}
    assert differing(image_data(labels=LABELS[::-1].copy())) == {"names or labels"}
    assert differing(image_data(ids=tuple("lkjihgfedcba"))) == {"names or labels"}
    with_target = [first.digests(first.target(spec)) for spec in ("a", "a", "b")]
    assert with_target[0] == with_target[1] and digests.items() < with_target[0].items()
    assert {name for name in with_target[0] if with_target[0][name] != with_target[2][name]} == {"forgotten images"}


def test_a_concept_is_a_target_and_a_group_of_them_is_refused(tmp_path):
    data = ConceptData(concept_options(tmp_path))
    target = data.target("red_circle")
    assert data.images is None and data.digests() == {}  # nothing is read before a target names it
    assert target.concept.prompts["original"] == "A Red Circle, on a green wall!"
    np.testing.assert_array_equal(target.images.labels[target.forget], 1)
    np.testing.assert_array_equal(target.images.labels[target.remain], 0)
    assert len(target.forget) + len(target.remain) == len(target.images)
    for group in ("red_circle+blue_square", "*", "@list.txt", "label:1", "red_[a-z]*"):
        with pytest.raises(UserError, match="one run forgets one concept"):
            data.target(group)


def test_digests_of_a_concept_say_what_changed(tmp_path, concepts):
    def digests() -> dict[str, str]:
        data = ConceptData(concept_options(tmp_path, concepts))
        return data.digests(data.target("red_circle"))

    def change(path, values):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def differing() -> set[str]:
        nonlocal before
        now = digests()
        names = {name for name in now if now[name] != before[name]}
        before = now
        return names

    before = digests()
    assert not differing()
    change(concepts / "modified_prompts.json", {"red_circle": "another picture"})
    assert differing() == {"prompts"}
    labels = json.loads((concepts / "red_circle" / "kmeans_labels.json").read_text())
    name = next(name for name, label in labels.items() if label == 0)
    change(concepts / "red_circle" / "kmeans_labels.json", {name: 1})
    assert "labels of pictures" in differing()


# ---- Codecs


def test_a_pixel_codec_gives_rows_and_their_nearest_images(image_data, tmp_path):
    target, codec = image_data().target("d+h+e"), PixelCodec(tmp_path / "cache")
    np.testing.assert_array_equal(
        codec.gather(target.images, target.remain)(np.array([2, 0]))["pixels"], PIXELS[target.remain[[2, 0]]]
    )
    np.testing.assert_array_equal(codec.forget_data(target, 0, "exact").forget["pixels"], PIXELS[target.unique])

    found = codec.forget_data(target, 3, "exact")
    np.testing.assert_array_equal(found.forget["pixels"], PIXELS[target.unique])
    flat = pixels_to_model(PIXELS).reshape(12, -1).astype(np.float64)
    all_distances = np.linalg.norm(flat[target.unique][:, None] - flat[target.remain], axis=-1)
    nearest = np.argsort(all_distances, axis=1)[:, :3]
    np.testing.assert_array_equal(found.neighbor_positions, target.remain[nearest])
    np.testing.assert_allclose(found.distances, np.take_along_axis(all_distances, nearest, 1), rtol=1e-5)
    np.testing.assert_array_equal(found.neighbors["pixels"][found.neighbor_rows], PIXELS[target.remain[nearest]])


def test_targets_searched_together_have_the_neighbors_of_each_alone(image_data, tmp_path):
    data = image_data()
    targets = [data.target(spec) for spec in ("a+b", "c")]
    together, alone = PixelCodec(tmp_path / "together"), PixelCodec(tmp_path / "alone")
    together.prepare(targets, 3, "exact")
    for target in targets:
        one, other = (codec.forget_data(target, 3, "exact") for codec in (together, alone))
        np.testing.assert_array_equal(one.neighbor_positions, other.neighbor_positions)
        np.testing.assert_allclose(one.distances, other.distances, rtol=1e-5)


@pytest.fixture
def latent_codec(tmp_path, pipeline) -> LatentCodec:
    return LatentCodec(pipeline.vae, pipeline.vae_params, pipeline.vae_digest, concept_options(tmp_path))


def test_a_latent_codec_streams_posteriors_and_draws_neighbors_once(tmp_path, latent_codec):
    data = ConceptData(concept_options(tmp_path))
    red, blue = data.target("red_circle"), data.target("blue_square")
    assert latent_codec.latent_shape == (8, 8, 4)

    found = latent_codec.forget_data(red, 3, "exact")
    assert found.forget["x_0"].shape == (len(red.unique), 8, 8, 4)
    neighbors = found.neighbors["x_0"][found.neighbor_rows]
    difference = np.linalg.norm((found.forget["x_0"][:, None] - neighbors).reshape(*neighbors.shape[:2], -1), axis=-1)
    np.testing.assert_allclose(difference, found.distances, rtol=1e-5)
    assert (np.diff(difference, axis=1) >= 0).all()
    assert np.isin(found.neighbor_positions, red.remain).all()
    again = latent_codec.forget_data(red, 3, "exact")
    np.testing.assert_array_equal(again.forget["x_0"], found.forget["x_0"])
    assert set(latent_codec.forget_data(red, 0, "exact").forget) == {"mean", "std"}  # other methods draw afresh

    streamed = latent_codec.gather(blue.images, blue.remain)(np.array([0, 2]))
    assert set(streamed) == {"mean", "std"} and streamed["mean"].shape == (2, 8, 8, 4)
    pixels = pixels_to_model(blue.images.images[blue.remain[[0, 2]]])
    mean, std = latent_codec.vae.apply({"params": latent_codec.params}, pixels, method="encode")
    np.testing.assert_allclose(streamed["mean"], mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(streamed["std"], std, rtol=1e-3, atol=1e-4)


def test_another_latent_seed_draws_other_latents(tmp_path, pipeline, latent_codec):
    target = ConceptData(concept_options(tmp_path)).target("red_circle")
    options = dataclasses.replace(concept_options(tmp_path), latent_seed=1)
    other = LatentCodec(pipeline.vae, pipeline.vae_params, pipeline.vae_digest, options)
    one, two = (codec.forget_data(target, 1, "exact").forget["x_0"] for codec in (latent_codec, other))
    assert np.abs(one - two).min() > 0


def test_a_codec_names_what_it_read(latent_codec, pipeline):
    assert latent_codec.digests == {"VAE in config.checkpoint": pipeline.vae_digest} and PixelCodec("cache").digests == {}


def test_a_resolution_that_the_networks_cannot_halve_is_refused(latent_codec):
    check_resolution(latent_codec, 32, 2, "the folder")
    with pytest.raises(UserError, match="resolution is 36; the VAE and the network of the folder need a multiple of 8"):
        check_resolution(latent_codec, 36, 2, "the folder")


# ---- Conditioning


def test_an_unconditional_network_has_no_table_and_one_kind_of_samples(image_data):
    target, conditioning = image_data().target("a"), Conditioning()
    assert conditioning.table(target) is None and conditioning.sampled(target) == {"samples": None}
    assert conditioning.describe("samples", target) == "" and not conditioning.of_target


def test_training_is_told_the_modified_prompt_and_samples_are_of_both(tmp_path):
    encoded = []

    def encode(prompt: str) -> np.ndarray:
        encoded.append(prompt)
        return np.full((1, 3, 2), len(prompt), np.float32)

    target = ConceptData(concept_options(tmp_path)).target("red_circle")
    prompts, conditioning = target.concept.prompts, PairedPrompts(encode, "blurry", "digest")
    assert len(prompts["original"]) != len(prompts["modified"]) and conditioning.of_target
    np.testing.assert_array_equal(conditioning.table(target), encode(prompts["modified"]))
    np.testing.assert_array_equal(conditioning.null, encode("blurry"))
    encoded.clear()
    sampled = conditioning.sampled(target)
    assert encoded == [prompts["original"]]  # the text encoder runs once for a prompt
    jax.tree.map(
        np.testing.assert_array_equal, sampled, {"original": encode(prompts["original"]), "modified": encode(prompts["modified"])}
    )
    assert [conditioning.describe(kind, target) for kind in sampled] == [prompts["original"], prompts["modified"]]


# ---- Evaluation


@pytest.mark.parametrize(("official", "run_seed", "seed"), [(False, 3, 7), (True, 3, 3), (True, None, 7)])
def test_the_official_protocol_draws_by_the_runs_seed(image_data, tmp_path, official, run_seed, seed):
    """The pretrained model, which has no run's seed, keeps the seed of samples."""
    data = image_data()
    denoiser = SimpleNamespace(shape=PIXELS.shape[1:], eps_fn=None, schedule=None)
    options = Options(
        eval=EvalOptions(metrics=("sscd",), official_draws=official), sampling=SamplingOptions(seed=7),
        data=DataOptions(cache_dir=str(tmp_path)),
    )  # fmt: skip
    paths = {"path": tmp_path / "evaluation.json", "workdir": tmp_path}
    model = EvaluatedModel(params=dict, pretrained=dict, arrays={}, seed=run_seed, **paths)
    task = ImageEvaluation(options, data, denoiser, PixelCodec(tmp_path), Conditioning())._task(data.target("d"), model)
    for rng, expected in ((task.protocol_rng, seed), (task.rng, 7)):  # losses are under the same noises for every model
        assert jax.random.key_data(rng).tolist() == jax.random.key_data(jax.random.key(expected)).tolist()
