"""Targets name images stably, and a wrong name gets the nearest right ones."""

import re
import time
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.data.dataset import image_set, part
from retrack_jax.data.sources.cifar10 import other_name
from retrack_jax.data.sources.load import known_names
from retrack_jax.data.target_names import described, is_random, resolve_target, slug
from retrack_jax.problem.target import make_target


@pytest.fixture(scope="module")
def images():
    ids = [f"{row:05d}.jpg" for row in range(10)] + ["a/cat.png", "b/cat.png", "b/dog.png", "x+y.png"]
    return image_set("folder", np.zeros((14, 2, 2, 1), np.uint8), ids, np.arange(14) % 4)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        ("00003.jpg", [3]),
        (" 00003.jpg ", [3]),
        ("00003.jpg+00001.jpg+00003.jpg", [1, 3]),
        ("0000[12].jpg", [1, 2]),
        ("b/*", [11, 12]),
        ("*.png", [13]),  # as in a shell, * stays within a folder
        ("**/*.png", [10, 11, 12, 13]),
        ("**.png", [10, 11, 12, 13]),
        ("?/cat.png", [10, 11]),
        ("0000[!0-7].jpg", [8, 9]),
        ("[ab]/d*", [12]),
        ("label:1", [1, 5, 9, 13]),
        ("label:1+00002.jpg+b/*", [1, 2, 5, 9, 11, 12, 13]),
        ("dog.png", [12]),
        ("x+y.png", [13]),
    ],
)
def test_rows(images, spec, rows):
    found = resolve_target(spec, images)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, rows)


def test_list(images, tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("00007.jpg\n\n b/dog.png \n00007.jpg\n")
    np.testing.assert_array_equal(resolve_target(f"@{path}", images), [7, 12])
    np.testing.assert_array_equal(resolve_target(f"00001.jpg+@{path}", images), [1, 7, 12])
    assert slug(f"00001.jpg+@{path}") != slug(f"00002.jpg+@{path}")


@pytest.mark.parametrize("line", ["@more.txt", "00001.jpg+@more.txt"])
def test_a_list_in_a_list_is_refused(images, tmp_path, line):
    path = tmp_path / "forget.txt"
    path.write_text(f"00007.jpg\n{line}\n")
    with pytest.raises(UserError, match=re.escape(f"names another list, {line!r}")):
        resolve_target(f"@{path}", images)


def test_a_list_as_other_systems_write_it(images, tmp_path):
    path = tmp_path / "forget.txt"
    path.write_bytes("00007.jpg\r\n00008.jpg\r\n".encode("utf-8-sig"))
    np.testing.assert_array_equal(resolve_target(f"@{path}", images), [7, 8])
    odd = image_set("folder", np.zeros((3, 2, 2, 1), np.uint8), ["@a.jpg", "b.jpg", "c.jpg"])
    path.write_text("@a.jpg\nb.jpg\n")
    np.testing.assert_array_equal(resolve_target(f"@{path}", odd), [0, 1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("00003.jpeg", "no image of folder is named '00003.jpeg'; did you mean 00003.jpg"),
        ("zzz", "names look like 00000.jpg, 00007.jpg, x\\+y.png"),
        ("cat.png", "2 images are named 'cat.png': a/cat.png, b/cat.png"),
        ("label:7", "no image of folder has label 7; its labels are 0, 1, 2, 3"),
        ("label:x", "a label is a whole number"),
        ("q*", "matches 'q\\*'"),
        ("**", "is the whole set of 14 images"),
        ("0000[2-", "no image of folder is named|matches"),
        ("", "a target is empty"),
        ("00001.jpg+", "a target is empty"),
        ("@nowhere.txt", "no file nowhere.txt"),
    ],
)
def test_bad_targets(images, spec, message):
    with pytest.raises(UserError, match=message):
        resolve_target(spec, images)


def test_no_labels(images):
    unlabelled = image_set("folder", images.images, images.ids)
    with pytest.raises(UserError, match="folder has no labels"):
        resolve_target("label:1", unlabelled)


@pytest.mark.parametrize("order", ["hf", "tfds"])
def test_cifar10_names_in_both_orders(order):
    ids = [f"hf:{row}" for row in range(10_002)] if order == "hf" else [f"tfds:train_{row:05d}" for row in range(20_002)]
    images = image_set("cifar10", np.zeros((len(ids), 1, 1, 3), np.uint8), ids)
    images = part(replace(images, other_name=other_name), np.arange(1, len(ids)), "training part")
    row = 10_000 if order == "hf" else 20_000
    assert resolve_target("hf:10001", images) == row and resolve_target("tfds:train_20001", images) == row
    with pytest.raises(UserError, match="did you mean"):
        resolve_target("hf:60000", images)


def test_only_a_share_alone_is_random():
    """Its images are exchangeable with those that were held out, which a group's are not."""
    assert is_random(" random:0.05 ") and not is_random("random:0.05+digit_0000") and not is_random("@random.txt")


def test_copies_share_a_row():
    pictures = np.random.default_rng(0).integers(0, 2, (30, 2, 2, 1), dtype=np.uint8)
    forget = np.arange(100, 130)
    images = image_set("a", np.concatenate([np.full((100, 2, 2, 1), 2, np.uint8), pictures]), [f"{row}" for row in range(130)])
    target = make_target("a", images, forget, np.arange(100))
    distinct, first, copy_of = np.unique(pictures.reshape(30, 4), axis=0, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(target.unique, forget[first])
    np.testing.assert_array_equal(target.copy_of, copy_of.reshape(-1))


def test_a_large_image_is_compared_as_bytes():
    """A field for each of its 196,608 values took a second of each of a sweep's targets, twice."""
    images = image_set("a", np.zeros((9, 256, 256, 3), np.uint8), list("abcdefghi"))
    start = time.process_time()
    assert make_target("a", images, np.arange(4), np.arange(4, 9)).unique.tolist() == [0]
    assert time.process_time() - start < 0.3


def test_slug():
    assert slug("10001.jpg") == "10001.jpg" and slug("label:10") == "label_10" and slug("tfds:train_20000") == "tfds_train_20000"
    specs = ["label:1", "label_1", "a+b", "a_b", "a/b", "../a", "a", ".a", "*", "?", "a" * 200, "a" * 201, "é", "ü"]
    slugs = [slug(spec) for spec in specs]
    assert len(set(slugs)) == len(specs)
    for found in slugs:
        assert found and len(found) <= 100 and set(found) <= set("-._") | set(map(chr, range(48, 123))) and found[0] not in ".-"


def test_described_names_what_a_list_holds_and_no_folder(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("\n".join(f"{row}.jpg" for row in range(10)))
    assert described(f"@{path}") == "forget.txt (0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg, 6.jpg, 7.jpg and 2 more)"
    path.write_text("b.jpg\na.jpg\n")
    assert described(f"c.jpg+@{path}") == "c.jpg + forget.txt (b.jpg, a.jpg)" and described("label:7") == "label:7"


def test_slug_of_a_list_follows_its_content(tmp_path):
    path = tmp_path / "forget.txt"
    path.write_text("a\nb\n")
    first = slug(f"@{path}")
    path.write_text("b\na\n\n")
    assert slug(f"@{path}") == first
    path.write_text("b\nc\n")
    assert slug(f"@{path}") != first


class TestPaths:
    """Names as people write them; `names/` holds 1.png, 2.png, sub/1.png and a photo whose name looks like a pattern."""

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("1.png", "2.png", "sub/1.png", "photo [1].png", "b+c.png", unicodedata.normalize("NFD", "café.png")):
            path = tmp_path / "names" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(path)
        return tmp_path / "names"

    def named(self, spec, folder):
        images = known_names({"source": "folder", "dir": str(folder)})
        return [unicodedata.normalize("NFC", images.ids[row]) for row in resolve_target(spec, images)]

    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_unicode_forms_are_equal(self, folder, tmp_path, form):
        spec = unicodedata.normalize(form, "café.png")
        assert self.named(spec, folder) == ["café.png"] and self.named(f"1.png+{spec}", folder) == ["1.png", "café.png"]
        assert self.named(unicodedata.normalize(form, "*é.png"), folder) == ["café.png"]
        (tmp_path / "list.txt").write_text(f"{folder}/{spec}\n")
        assert self.named(f"@{tmp_path / 'list.txt'}", folder) == ["café.png"]

    def test_names_that_look_the_same_are_refused(self, folder):
        Image.new("RGB", (2, 2)).save(folder / unicodedata.normalize("NFC", "café.png"))
        with pytest.raises(UserError, match="2 images are named 'café.png': .* Unicode form .*; rename one"):
            self.named("café.png", folder)
        assert self.named("1.png", folder) == ["1.png"]

    @pytest.mark.parametrize(
        ("spec", "name"),
        [
            ("./1.png", "1.png"),
            ("names/1.png", "1.png"),
            ("{folder}/1.png", "1.png"),
            ("{folder}/sub/../sub/1.png", "sub/1.png"),
            ("{folder}/sub/1.png", "sub/1.png"),
            ("names/sub/1.png", "sub/1.png"),
            ("names/b+c.png", "b+c.png"),
            ("./photo [1].png", "photo [1].png"),
            ("{folder}/2*", "2.png"),
            ("{folder}/sub/*", "sub/1.png"),
            ("./2.p?g", "2.png"),
        ],
    )
    def test_paths(self, folder, spec, name):
        assert self.named(spec.format(folder=folder), folder) == [name]

    def test_a_path_from_the_working_folder_and_through_a_link(self, folder, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "link").symlink_to(folder)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert self.named("../names/2.png", folder) == ["2.png"]
        assert self.named("../link/sub/1.png", folder) == ["sub/1.png"]

    @pytest.mark.parametrize("spec", ["/elsewhere/1.png", "other/1.png", "{folder}/3.png", "ames/1.png"])
    def test_a_path_to_another_place_is_not_this_image(self, folder, spec):
        with pytest.raises(UserError, match="no image of folder is named"):
            self.named(spec.format(folder=folder), folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_in_other_encodings(tmp_path, encoding, end):
    images = image_set("folder", np.zeros((3, 2, 2, 1), np.uint8), ["ü.jpg", "b\u2028c.jpg", "d.jpg"])
    (tmp_path / "forget.txt").write_bytes(end.join(["ü.jpg", "", "b\u2028c.jpg", ""]).encode(encoding))
    np.testing.assert_array_equal(resolve_target(f"@{tmp_path / 'forget.txt'}", images), [0, 1])


def test_a_list_that_is_no_text_is_one_line(images, tmp_path):
    (tmp_path / "forget.txt").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    with pytest.raises(UserError, match="cannot read .*forget.txt"):
        resolve_target(f"@{tmp_path / 'forget.txt'}", images)


def test_long_lists_of_paths_are_read_at_once(tmp_path):
    ids = [f"sub/{row:06d}.png" for row in range(50_000)]
    images = replace(image_set("folder", np.zeros((50_000, 1, 1, 1), np.uint8), ids), folder=tmp_path)
    (tmp_path / "forget.txt").write_text("\n".join(f"{tmp_path}/{name}" for name in ids[:5000]))
    start = time.process_time()
    assert len(resolve_target(f"@{tmp_path / 'forget.txt'}", images)) == 5000
    assert time.process_time() - start < 3
