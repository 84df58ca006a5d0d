"""Files of many kinds: read as they are, or refused in one line, before they take the memory."""

import errno
import io
import logging
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retrack_jax.checks import UserError
from retrack_jax.data.decode import DecodeOptions, decode
from retrack_jax.data.sources import npz
from retrack_jax.data.sources.load import known_names, load_images


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(3):
        Image.fromarray(np.full((8, 8, 3), row, np.uint8)).save(folder / f"{row}.png")
    return folder


def load(folder, source="folder", **fields):
    return load_images({"source": source, "dir": str(folder), "cache_dir": str(folder.parent / "cache")} | fields)


def empty_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and whose rows are missing: to decode it would be an error, after the memory is taken."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestUnreadable:
    """What the system does not let us read is not broken: to leave it out, and to remember that, would be wrong."""

    def test_a_folder(self, folder, monkeypatch):
        (folder / "person_3").mkdir()
        scandir = os.scandir

        def refusing(path):
            if Path(path).name == "person_3":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        for skip in (False, True):
            with pytest.raises(UserError, match=r"cannot read .*person_3 \(Permission denied\)"):
                load(folder, skip_corrupt=skip)

    @pytest.mark.parametrize("inside", [False, True])
    def test_a_folder_that_may_be_listed_or_linked_to_but_not_entered(self, folder, monkeypatch, inside):
        """The system then names what is in it, or the link, and says nothing else."""
        link = folder / "person_3" / "0.png" if inside else folder / "person_3"
        link.parent.mkdir(exist_ok=True)
        link.symlink_to("/private/person_3")
        real = os.stat

        def refusing(path, **options):
            if options.get("follow_symlinks", True) and str(path) == str(link):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, **options)

        monkeypatch.setattr(os, "stat", refusing)
        with pytest.raises(UserError, match=r"cannot read .*person_3.* \(Permission denied\)"):
            load(folder, skip_corrupt=True)

    def test_the_file_systems_own_folder_is_no_folder_of_images(self, folder):
        (folder / "lost+found").mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "lost+found" / "a.png")
        assert load(folder).ids == ("0.png", "1.png", "2.png")

    def test_a_file(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot read image a.png \(Is a directory\)"):
            decode("a.png", tmp_path, DecodeOptions(skip_corrupt=True))


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("a.bmp", {}),
            ("a.tif", {}),
            ("A.TIFF", {}),
            ("a.webp", {"lossless": True}),
            ("a.jfif", {"quality": 100, "format": "jpeg"}),
            ("a.avif", {"quality": 100}),
        ],
    )
    def test_what_pillow_reads(self, folder, name, options):
        Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(folder / name, **options)
        images = load(folder)
        assert name in images.ids and len(images) == 4
        assert (abs(images.images[images.ids.index(name)].astype(int) - 128) <= 1).all()

    def test_the_first_frame_is_taken_and_that_is_said(self, folder, caplog):
        frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
        frames[0].save(folder / "moves.gif", save_all=True, append_images=frames[1:])
        frames[1].save(folder / "still.gif")
        with caplog.at_level(logging.WARNING):
            images = load(folder, channels=3)
        assert (images.images[images.ids.index("moves.gif")] == [255, 0, 0]).all()
        assert (images.images[images.ids.index("still.gif")] == [0, 0, 255]).all()
        assert "images with several frames, of which the first is taken: 1 (moves.gif)" in caplog.text

    def test_other_kinds_are_counted_in_one_line(self, folder, caplog):
        for name in ("a.heic", "b.HEIC", "notes.txt", "LICENSE", ".hidden.psd"):
            (folder / name).write_text("not read")
        with caplog.at_level(logging.INFO):
            assert len(load(folder)) == 3
        (line,) = [record.getMessage() for record in caplog.records if "other kinds" in record.getMessage()]
        assert line == f"{folder}: 4 files of other kinds are left out (2 .heic, 1 .txt, 1 none)"

    def test_a_folder_of_other_kinds_says_which(self, tmp_path):
        (tmp_path / "heic").mkdir()
        (tmp_path / "heic" / "a.heic").write_text("not read")
        with pytest.raises(UserError, match="no image in .* it has 1 .heic; set config.data.dir"):
            load(tmp_path / "heic")


class TestBrokenLinks:
    def test_they_are_named_or_left_out(self, folder, caplog):
        (folder / "a.png").symlink_to(folder / "gone.png")
        (folder / "loop.png").symlink_to("loop.png")
        message = rf"2 of 5 images in {folder} are no files: {folder}/a.png \(a link to {folder}/gone.png, which does not exist\)"
        for read in (load, lambda folder: known_names({"source": "folder", "dir": str(folder)})):
            with pytest.raises(UserError, match=message):
                read(folder)
        assert load(folder, skip_corrupt=True).ids == ("0.png", "1.png", "2.png")


class TestBudget:
    @pytest.mark.parametrize(
        ("size", "resolution", "message"),
        [
            ((13_000, 13_000), 0, "13000x13000, more than 89 million pixels"),
            ((13_000, 13_000), 8, "13000x13000, more than 89 million pixels"),
            ((60_000, 60_000), 8, "more than 89 million pixels"),  # Pillow does not open it
            ((1, 1_000_000), 64, "1x1000000, which becomes 64x64000000 at config.data.resolution=64, more than 89 million"),
            ((1_000_000, 1), 64, "1000000x1, which becomes 64000000x64 at config.data.resolution=64, more than 89 million"),
        ],
    )
    @pytest.mark.filterwarnings("error")
    def test_an_image_is_refused_by_its_header(self, folder, caplog, size, resolution, message):
        (folder / "big.png").write_bytes(empty_png(*size))
        with pytest.raises(UserError, match=rf"1 of 4 images cannot be decoded: big.png \({message}.*skip_corrupt=True"):
            load(folder, resolution=resolution)
        with caplog.at_level(logging.WARNING):
            assert len(load(folder, resolution=resolution, skip_corrupt=True)) == 3
        assert f"left out corrupt image big.png ({message}" in caplog.text

    def test_a_long_image_that_fits_is_read(self):
        file = io.BytesIO()
        Image.new("RGB", (2, 40_000), (1, 2, 3)).save(file, "png")
        assert (decode("a.png", file.getvalue(), DecodeOptions(resolution=8)).pixels == [1, 2, 3]).all()

    def claim(self, path, shape):
        """An .npz whose array `images` claims `shape` and holds 64 bytes."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", header.getvalue() + bytes(64))

    def test_an_array_that_claims_more_than_its_file_holds(self, tmp_path):
        self.claim(tmp_path / "a.npz", (10_000, 512, 512, 3))
        with pytest.raises(UserError, match="the array images claims 7.86 GB and holds 6.4e-08; it is damaged"):
            load(tmp_path / "a.npz", "npz")
        self.claim(tmp_path / "a.npz", (1, 8, 8, 1))
        assert load(tmp_path / "a.npz", "npz").images.shape == (1, 8, 8, 1)

    def test_arrays_that_do_not_fit_the_memory(self, tmp_path, monkeypatch):
        """Packed they are small; other arrays of the file are not read and do not count."""
        path = tmp_path / "a.npz"
        np.savez_compressed(path, images=np.zeros((100, 32, 32, 3), np.uint8), more=np.zeros(10**6))
        monkeypatch.setattr(npz, "available_memory", lambda: 307_200)
        assert len(load(path, "npz")) == 100
        monkeypatch.setattr(npz, "available_memory", lambda: 307_199)
        with pytest.raises(UserError, match="its arrays need 0.0 GB of memory, and 0.0 GB are free; save the images as .npy"):
            load(path, "npz")

    def test_later_versions_of_the_header(self, tmp_path):
        for version in ((1, 0), (2, 0), (3, 0)):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.full((2, 4, 4), version[0], np.uint8), version=version)
            with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
                archive.writestr("images.npy", member.getvalue())
            assert (load(tmp_path / "a.npz", "npz").images == version[0]).all()


def test_arrays_of_another_size_than_the_model_takes(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="images of 32x32 and config.data.resolution is 8, but arrays are taken as they are"):
        load(tmp_path / "a.npz", "npz", resolution=8)
    for resolution in (0, 32):
        assert len(load(tmp_path / "a.npz", "npz", resolution=resolution)) == 2
