"""Concept folders and prompts: every way in which one can be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.data.sources.concepts import list_concepts, prompts_of
from retrack_jax.data.sources.load import load_concepts, load_images

NAME = "red_circle"


def all_concepts(root, resolution=32, **fields):
    data = {"source": "concepts", "dir": str(root), "resolution": resolution, "cache_dir": str(root.parent / "cache")}
    return load_concepts(data | fields)


def load(root, name=NAME, resolution=32):
    return all_concepts(root, resolution)(name)


def edit(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value)))


def test_a_whole_concept(concepts):
    concept = load(concepts)
    assert concept.images.images.shape == (16, 32, 32, 3)
    assert len(concept.forget) == 6 and len(concept.remain) == 10
    assert sorted([*concept.forget, *concept.remain]) == list(range(16))
    assert concept.memorised_name == "red_circle_004.png"
    row = concept.images.ids.index("red_circle_004.png")
    assert row in concept.forget
    np.testing.assert_array_equal(concept.memorised, concept.images.images[row])
    assert list_concepts(concepts) == ["blue_square", "red_circle"]


def test_pictures_that_are_not_square_are_cropped_or_refused(concepts):
    path = concepts / NAME / "images" / "red_circle_000.png"
    Image.open(path).resize((48, 32)).save(path)
    assert load(concepts).images.images.shape == (16, 32, 32, 3)
    with pytest.raises(UserError, match="red_circle_000.png is 48x32, not square"):
        all_concepts(concepts, crop="none")(NAME)


def test_prompts_come_with_the_pictures(concepts, tmp_path):
    """From files below the folder unless their paths are absolute."""
    (tmp_path / "other.json").write_text('{"red_circle": "a disc"}')
    assert load(concepts).prompts == prompts_of(NAME, concepts / "original_prompts.json", concepts / "modified_prompts.json")
    other = all_concepts(concepts, modified_prompts=str(tmp_path / "other.json"))(NAME)
    assert other.prompts["modified"] == "a disc" and other.prompts["original"] == load(concepts).prompts["original"]


def test_each_kind_of_source_has_its_door(concepts):
    with pytest.raises(UserError, match="'concepts', which holds concepts with prompts"):
        load_images({"source": "concepts", "dir": str(concepts)})
    with pytest.raises(UserError, match="'folder', which has no prompts; choose one of concepts"):
        load_concepts({"source": "folder", "dir": str(concepts)})


def test_a_memorised_picture_without_a_label(concepts):
    edit(concepts / NAME / "kmeans_labels.json", lambda labels: {k: v for k, v in labels.items() if "_004" not in k})
    concept = load(concepts)
    assert len(concept.images) == 15 and concept.memorised.shape == (32, 32, 3)


def test_pictures_without_a_label_are_left_out_and_counted(concepts, caplog):
    edit(concepts / NAME / "kmeans_labels.json", lambda labels: {k: v for k, v in labels.items() if k[-5] not in "12"})
    with caplog.at_level("INFO", "retrack_jax"):
        concept = load(concepts)
    left_out = 16 - len(concept.images)
    assert left_out > 1 and f"red_circle: {left_out} pictures without a label" in caplog.text


def test_pictures_of_another_size_are_brought_to_the_resolution(concepts):
    assert load(concepts, resolution=16).images.images.shape == (16, 16, 16, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "kmeans_labels.json").unlink(), "no kmeans_labels.json in"),
        (lambda f: (f / "kmeans_labels.json").write_text("[1, 0]"), "holds no JSON object"),
        (
            lambda f: edit(f / "kmeans_labels.json", lambda labels: {**labels, "a.png": 2}),
            "JSON object of file name: 0 or 1",
        ),
        (
            lambda f: edit(f / "kmeans_labels.json", lambda labels: {**labels, "gone.png": 1}),
            "labels 1 of 17 pictures .* such as gone.png",
        ),
        (lambda f: edit(f / "kmeans_labels.json", lambda labels: dict.fromkeys(labels, 0)), "nothing to forget"),
        (lambda f: edit(f / "kmeans_labels.json", lambda labels: dict.fromkeys(labels, 1)), "to remain"),
        (lambda f: (f / "clustering_info.json").unlink(), "no clustering_info.json in"),
        (lambda f: (f / "clustering_info.json").write_text("{}"), "mem_idx is None"),
        (lambda f: (f / "clustering_info.json").write_text('{"mem_idx": 77}'), "no memorised picture .*red_circle_077.png"),
        (lambda f: (f / "clustering_info.json").write_text(f'{{"mem_idx": {10**300}}}'), "no memorised picture .*_1000"),
        (
            lambda f: edit(f / "kmeans_labels.json", lambda labels: {**labels, "red_circle_004.png": 0}),
            "clustering_info.json names red_circle_004.png .*kmeans_labels.json labels it 0, to remain",
        ),
        (lambda f: (f / "images" / "red_circle_003.png").write_bytes(b"no picture"), "red_circle_003.png"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(concepts, spoil, message):
    spoil(concepts / NAME)
    with pytest.raises(UserError, match=message):
        load(concepts)


def test_a_concept_that_is_not_there_is_refused(concepts, tmp_path):
    with pytest.raises(UserError, match="did you mean 'red_circle'"):
        load(concepts, "red_circel")
    with pytest.raises(UserError, match="no folder"):
        list_concepts(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no concept in"):
        list_concepts(tmp_path / "empty")


def test_a_concept_needs_both_of_its_prompts(concepts):
    paths = concepts / "original_prompts.json", concepts / "modified_prompts.json"
    pair = prompts_of(NAME, *paths)
    assert pair["original"] == "A Red Circle, on a green wall!" and pair["modified"].startswith("a picture")
    for path, kind in zip(paths, ("original", "modified"), strict=True):
        whole = path.read_text()
        edit(path, lambda prompts: {"red_circl": "x"})
        with pytest.raises(UserError, match=f"no {kind} prompt for the concept 'red_circle' .*did you mean 'red_circl'"):
            prompts_of(NAME, *paths)
        path.write_text('{"red_circle": 3}')
        with pytest.raises(UserError, match="all strings"):
            prompts_of(NAME, *paths)
        path.unlink()
        with pytest.raises(UserError, match=f"no file .*{kind}_prompts.json"):
            prompts_of(NAME, *paths)
        path.write_text(whole)
