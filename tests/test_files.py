"""Temporary files of killed processes go at the next start, those of living ones stay; what cannot be read is one line."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from retrack_jax import files
from retrack_jax.checks import UserError
from retrack_jax.run.workdir import Workdir

DAY = 86_400


@pytest.fixture
def beside_of_the_dead(monkeypatch):
    """Returns `files.beside` as a process would have called it that is gone now, perhaps on another host."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    def beside(path, ending="tmp", host=None):
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: gone.pid)
            if host is not None:
                patch.setattr(files.socket, "gethostname", lambda: host)
            return files.beside(path, ending)

    return beside


def test_the_next_start_sweeps_what_the_dead_left(tmp_path, beside_of_the_dead):
    run = tmp_path / "retrack" / "seed0-a"
    (beside_of_the_dead(run / "diffusers") / "unet").mkdir(parents=True)
    beside_of_the_dead(run / "diffusers", "old").mkdir()
    beside_of_the_dead(tmp_path / "summary.json").write_text("{")
    kept = [files.beside(run / "config.json"), run / "metrics.json", run / ".mine.tmp", tmp_path / ".hidden"]
    for path in kept:
        path.write_text("{}")
    files.sweep_temporaries(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_dir()) == sorted(kept)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == []

    left = beside_of_the_dead(tmp_path / "summary.json")
    left.write_text("{")
    workdir = Workdir(tmp_path)
    assert left.exists()  # it may be of a command that is at work, in a container that has this host's name
    with workdir.alone():
        assert not left.exists()


def test_where_nothing_locks_files_that_are_written_to_stay(tmp_path, beside_of_the_dead):
    new, old = (beside_of_the_dead(tmp_path / name) for name in ("new.npy", "old.npy"))
    for path in (new, old):
        path.write_text("{")
    os.utime(old, times=(time.time() - 700,) * 2)
    files.sweep_temporaries(tmp_path, untouched_seconds=600)
    assert new.exists() and not old.exists()


def test_another_hosts_are_left_for_a_day(tmp_path, beside_of_the_dead):
    """Its processes have numbers of their own: whether one lives cannot be seen from here."""
    new, old = (beside_of_the_dead(tmp_path / name, host="node-7.cluster") for name in ("new.npz", "old.npz"))
    for path in (new, old):
        path.write_text("{")
    os.utime(old, times=(time.time() - 2 * DAY,) * 2)
    assert len({new.name, files.beside(tmp_path / "new.npz").name, beside_of_the_dead(tmp_path / "new.npz").name}) == 3
    files.sweep_temporaries(tmp_path)
    assert new.exists() and not old.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON .*utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", "is not valid JSON"),
        (None, "is a folder"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        files.read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file"):
        files.read_json(tmp_path / "b.json")


def test_a_huge_file_is_not_read_as_json(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(10 << 30)  # sparse: it takes no space
    with pytest.raises(UserError, match="larger than 64 MB"):
        files.read_json(path)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "an array", "a folder", "no name", "objects"])
def test_arrays_that_cannot_be_read_are_one_line(tmp_path, damage):
    path = tmp_path / "a.npz"
    files.write_npz(path, a=np.arange(5), b=np.ones((2, 2)))
    assert set(files.read_npz(path)) == {"a", "b"} and set(files.read_npz(path, ["a"])) == {"a"}
    content = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "an array":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    elif damage == "objects":
        np.savez(path, a=np.array([{}], object))
    else:
        path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "text": b"hello"}.get(damage, content))
    with pytest.raises(UserError, match="is damaged .*; ask again") as error:
        files.read_npz(path, ["c"] if damage == "no name" else None, advice="ask again")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no file"):
        files.read_npz(tmp_path / "b.npz")


def test_a_cached_file_is_read_or_made_again(tmp_path, caplog):
    path, other = (files.cache_path(tmp_path, "room", key, "npz") for key in ({"a": 1, "b": 2}, {"a": 1, "b": 3}))
    assert path == files.cache_path(tmp_path, "room", {"b": 2, "a": 1}, "npz") != other
    assert files.read_cached(path, files.read_npz) is None and not caplog.text
    files.write_npz(path, a=np.arange(3))
    np.testing.assert_array_equal(files.read_cached(path, files.read_npz)["a"], np.arange(3))
    path.write_bytes(path.read_bytes()[:40])
    assert files.read_cached(path, files.read_npz) is None and "making it again" in caplog.text


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/a.json: File exists; free some space or set X"):
        files.write_json(tmp_path / "file" / "a.json", {}, advice="set X")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_folder_that_this_user_may_not_write_is_refused_before_anything_is_written(tmp_path):
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir(mode=0o777)
    mine.chmod(0o777)
    theirs.mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest's own are root's alone
        folder.chmod(folder.stat().st_mode | 0o055)
    (theirs / "file").touch()
    files.check_writable(theirs / "new" / "cache", "set X")
    os.setresuid(65534, 65534, 0)
    try:
        files.check_writable(mine / "new" / "cache", "set X")
        for folder, why in ((theirs / "new", "theirs is not writable"), (theirs / "file" / "new", "file is no folder")):
            with pytest.raises(UserError, match=f"cannot write to {folder}: .*{why}; set X"):
                files.check_writable(folder, "set X")
    finally:
        os.setresuid(0, 0, 0)
    files.check_writable("gs://bucket/cache", "set X")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "theirs"]
