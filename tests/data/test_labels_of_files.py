"""Labels of a folder's images: its subfolders, or a file of labels in the formats that people have."""

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.data.labels import labels_of_files
from retrack_jax.data.sources.folder import load_folder, named_images
from retrack_jax.data.sources.table import complete_fields

NAMES = ("10/a.png", "10/deep/c.png", "2/b.png", "cat/d.png")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), 60 * number, np.uint8)).save(path)
    return tmp_path / "images"


def data(folder, **fields):
    return complete_fields({"source": "folder", "dir": str(folder), "cache_dir": str(folder.parent / "cache"), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"source": "digits_tshirt", "dir": "/my/pictures", "labels": ""},
            "config.data.dir is '/my/pictures', which 'digits_tshirt' does",
        ),
        ({"source": "celebahq", "split": "validation"}, "config.data.split is 'validation', which format 'folder' does not read"),
        ({"source": "celebahq", "format": "tfds", "labels": "folders"}, "config.data.labels is 'folders', which format 'tfds'"),
    ],
)
def test_a_field_that_the_source_or_its_format_does_not_read_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        complete_fields({"dir": "", **fields})


def test_a_folder_has_no_labels_unless_they_are_asked_for(folder):
    assert load_folder(data(folder)).labels is None and named_images(data(folder)).labels is None


def test_folders_are_numbered_in_the_order_of_their_names_as_text(folder):
    """As torchvision's ImageFolder and the imagefolder of datasets number them, with which models were trained."""
    fields = data(folder, labels="folders")
    images = load_folder(fields)
    assert images.ids == NAMES and list(images.labels) == [0, 0, 1, 2]
    assert list(named_images(fields).labels) == [0, 0, 1, 2]


def test_a_folder_that_was_emptied_leaves_the_others_their_labels(folder):
    (folder / "2" / "b.png").unlink()
    (folder / ".thumbnails").mkdir()
    assert list(load_folder(data(folder, labels="folders")).labels) == [0, 0, 2]
    for name in ("__MACOSX", "lost+found", ".git"):  # none of them can hold an image
        (folder / name).mkdir()
    assert list(load_folder(data(folder, labels="folders")).labels) == [0, 0, 2]
    (folder / "10" / "a.png").write_bytes(b"damaged")
    (folder / "10" / "deep" / "c.png").write_bytes(b"damaged")
    assert list(load_folder(data(folder, labels="folders", skip_corrupt=True)).labels) == [2]


def test_fields_are_refused_by_sources_that_do_not_read_them(folder):
    with pytest.raises(UserError, match="config.data.split is 'test', which 'folder' does not read, but cifar10 or .*parquet"):
        data(folder, split="test")
    with pytest.raises(UserError, match="config.data.labels is 'folders', which 'npz' does not read, but celebahq or folder"):
        data(folder, source="npz", labels="folders")
    with pytest.raises(UserError, match="config.data.copies is 5, which 'folder' does not read, but digits_tshirt or .*mnist5k"):
        data(folder, copies=5)


FILES = {
    "metadata.csv": "file_name,text,label\n" + "".join(f"{name},what,{9 - i}\n" for i, name in enumerate(NAMES)),
    "metadata.jsonl": "".join(f'{{"file_name": "{name}", "label": {9 - i}}}\n' for i, name in enumerate(NAMES)),
    "dataset.json": '{"labels": [' + ", ".join(f'["{name}", {9 - i}]' for i, name in enumerate(NAMES)) + "]}",
}


@pytest.mark.parametrize("name", FILES)
def test_labels_of_a_file(folder, name):
    (folder / name).write_text(FILES[name])
    assert list(load_folder(data(folder, labels=name)).labels) == [9, 8, 7, 6]
    # A changed file counts at once: labels are not cached with the pixels.
    (folder / name).write_text(FILES[name].replace("9", "3"))
    assert list(load_folder(data(folder, labels=name)).labels) == [3, 8, 7, 6]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("labels.csv", None, "no file .*labels.csv; config.data.labels is"),
        ("labels.csv", "name,label\na,1\n", "line 2: there is no 'file_name' among name, label"),
        ("labels.csv", "file_name,label\na,cat\n", "line 2: the label is 'cat'; it must be a whole number"),
        ("labels.json", '{"labels": null}', 'holds no {"labels": .*; write it so'),
        ("labels.json", '{"labels": [["a", 1.5]]}', "row 1: the label is 1.5; it must be a whole number"),
        ("labels.jsonl", "{broken", "line 1 is no JSON"),
        ("labels.csv", "file_name,label\na,1\na,2\n", "line 3: a second row is for a; keep the right one"),
        ("labels.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("labels.json", "[" * 100_000, "labels.json is not valid JSON|nested"),
        ("labels.csv", "file_name,label\n10/a.png,1\n", "has no label for 3 of 4 images: 10/deep/c.png, 2/b.png, cat/d.png"),
    ],
)
def test_a_file_that_is_not_of_labels_is_refused(folder, name, text, words):
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=words):
        load_folder(data(folder, labels=name))


def test_an_image_outside_the_subfolders_has_no_label(folder):
    with pytest.raises(UserError, match="e.png is in no subfolder"):
        labels_of_files(("10/a.png", "e.png"), {"labels": "folders"}, folder)


def test_names_are_one_in_any_form_of_unicode(tmp_path):
    (tmp_path / "labels.csv").write_text("file_name,label\ncafe\u0301.png,4\n")
    assert labels_of_files(("caf\u00e9.png",), {"labels": "labels.csv"}, tmp_path).tolist() == [4]
