"""Captions of pictures: tables, text files and columns of parquet; what is missing, doubled or empty is named."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.config.options import DataOptions
from retrack_jax.data.dataset import part
from retrack_jax.data.sources.load import load_captioned_images, load_images
from retrack_jax.problem.training_data import ImageData

NAMES = ("a.png", "b.png", "in/c.png")
TEXTS = {"a.png": "a red circle", "b.png": 'a "blue", big square', "in/c.png": "ein Bär\nbei Nacht"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "in").mkdir(parents=True)
    for value, name in enumerate(NAMES):
        Image.fromarray(np.full((8, 8, 3), 40 * value, np.uint8)).save(folder / name)
    return folder


def load(folder, source="folder", **fields):
    return load_captioned_images({"source": source, "dir": str(folder), "cache_dir": str(folder.parent / "cache")} | fields)


def rows(table=None, name="file_name", text="text"):
    return "".join(json.dumps({name: key, text: value}) + "\n" for key, value in (table or TEXTS).items())


def captions_of(images) -> dict:
    return dict(zip(images.ids, images.captions, strict=True))


def test_a_table_of_json_lines(folder):
    (folder / "metadata.jsonl").write_text(rows() + "\n")
    assert captions_of(load(folder)) == TEXTS


def test_a_table_with_commas_and_quotes_and_another_column(folder):
    lines = ["file_name,notes,caption", "a.png,,a red circle", 'b.png,,"a ""blue"", big square"']
    lines += ['in/c.png,,"ein Bär\nbei Nacht"']
    (folder / "metadata.csv").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    assert captions_of(load(folder, caption_column="caption")) == TEXTS
    with pytest.raises(UserError, match="line 2: there is no 'text' among file_name, notes, caption; set config.data.caption_c"):
        load(folder)


def test_a_table_in_a_subfolder_names_its_own_pictures(folder):
    (folder / "metadata.jsonl").write_text(rows({name: TEXTS[name] for name in NAMES[:2]}))
    (folder / "in" / "metadata.csv").write_text('file_name,text\n./c.png,"ein Bär\nbei Nacht"\n')
    assert captions_of(load(folder)) == TEXTS


def test_text_files_next_to_the_pictures(folder):
    for name, text in TEXTS.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n")
    assert captions_of(load(folder)) == TEXTS
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 3 pictures have no caption in a .txt of the same name: b.png; add them"):
        load(folder)


def test_pictures_without_a_row_are_refused_by_name(folder):
    (folder / "metadata.jsonl").write_text(rows({"b.png": "x"}))
    (folder / "a.txt").write_text("not read, because there is a table")
    with pytest.raises(UserError, match=r"2 of 3 pictures have no caption in .*metadata.jsonl: a.png, in/c.png"):
        load(folder)


def test_rows_without_a_picture_are_warned_about_by_name(folder, caplog):
    (folder / "metadata.jsonl").write_text(rows({**TEXTS, "gone.png": "x", "b.jpg": "y"}))
    with caplog.at_level(logging.WARNING):
        assert captions_of(load(folder)) == TEXTS
    assert "2 rows name no picture" in caplog.text and "gone.png, b.jpg" in caplog.text


def test_two_rows_for_one_picture_are_refused(folder):
    (folder / "metadata.jsonl").write_text(rows() + rows({"./a.png": "another"}))
    with pytest.raises(UserError, match=r"two rows are for the picture a.png: .*metadata.jsonl:1 and .*metadata.jsonl:4"):
        load(folder)


def test_empty_captions_are_taken_and_named(folder, caplog):
    (folder / "metadata.jsonl").write_text(rows({**TEXTS, "a.png": "", "b.png": "  "}))
    with caplog.at_level(logging.WARNING):
        assert captions_of(load(folder))["a.png"] == ""
    assert "2 captions are empty" in caplog.text and "a.png, b.png" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["one", "two"]}', r"line 1: the caption is \['one', 'two'\]"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null}', "line 1: the caption is None"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "red \\ud83d"}',
            "line 1: the caption .* has half of a surrogate pair",
        ),
        ("metadata.jsonl", '{"file_name": 3, "text": "x"}', "line 1: file_name is 3"),
        ("metadata.jsonl", '\n{"file_name": "a.png"', "line 2 is no JSON"),
        ("metadata.jsonl", '["a.png", "x"]', "line 1 is no JSON object"),
        ("metadata.jsonl", b"\xff\xfe\x00x", "cannot read .*metadata.jsonl .*UTF-8"),
        ("metadata.csv", "file_name,text\na.png,x,y\n", "line 2 has more values than the header"),
        ("metadata.csv", "file_name,text\na.png\n", "line 2: the caption is None"),
        ("metadata.csv", 'file_name,text\na.png,"x', "is no CSV"),
        ("metadata.csv", "name,text\na.png,x\n", "there is no 'file_name' among name, text"),
        ("other.csv", "", "no captions in .*: looked for metadata.jsonl, metadata.csv .* and for a .txt next to each picture"),
    ],
)
def test_what_is_no_table_of_captions(folder, name, content, message):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load(folder)


def test_both_tables_in_one_folder_are_refused(folder):
    (folder / "metadata.jsonl").write_text(rows())
    (folder / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match="has metadata.jsonl and metadata.csv; keep one"):
        load(folder)


def test_a_column_of_parquet(parquet_file):
    folder, _ = parquet_file([0, 1, 2], caption=["one", "two", "three"])
    images = load(folder, source="parquet", caption_column="caption")
    assert captions_of(images) == {"hf:0": "one", "hf:1": "two", "hf:2": "three"}
    with pytest.raises(UserError, match="no column 'text' of captions among .*caption; set config.data.caption_column"):
        load(folder, source="parquet")


def test_captions_stay_with_their_pictures(folder):
    (folder / "metadata.jsonl").write_text(rows())
    images = part(load(folder), np.array([2, 0]), "some")
    assert captions_of(images) == {name: TEXTS[name] for name in ("in/c.png", "a.png")}


def test_a_source_without_captions_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="'npz' have no captions; config.data.source may be folder or parquet"):
        load(tmp_path / "x.npz", source="npz")


def test_captions_are_part_of_what_was_read_and_tell_copies_apart(folder):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "twin.png")  # as a.png

    def data(captioned=True, **changed):
        (folder / "metadata.jsonl").write_text(rows({**TEXTS, "twin.png": "a red circle", **changed}))
        return ImageData(DataOptions(source="folder", dir=str(folder), cache_dir=str(folder.parent / "cache")), captioned)

    assert len(data().target("a.png+twin.png").unique) == 1
    assert len(data(**{"twin.png": "another"}).target("a.png+twin.png").unique) == 2
    first, second = (data(**{"b.png": text}).digests() for text in ("one", "two"))
    assert {name for name in first if first[name] != second[name]} == {"captions"}
    assert "captions" not in data(captioned=False).digests()


def test_without_a_need_for_captions_none_are_read(folder):
    (folder / "metadata.jsonl").write_text("not JSON")
    images = load_images({"source": "folder", "dir": str(folder), "cache_dir": str(folder.parent / "cache")})
    assert images.captions is None
