"""The log survives restarts, kills and full disks; progress is lines in a log and a bar on a terminal."""

import io
import json
import sys
import time

import pytest

from retrack_jax import log as writer
from retrack_jax.checks import UserError
from retrack_jax.log import Writer, progress, read_log, say


def steps(path):
    return [record["step"] for record in read_log(path)]


def test_records_are_json_lines_with_numbers(tmp_path):
    with Writer(tmp_path / "run" / "log.jsonl") as log:
        log.scalars(1, {"train_loss": 2.5})
        log.scalars(2, {"train_loss": float("nan"), "train_norm": float("inf")})
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[0]["train_loss"] == 2.5 and lines[0]["step"] == 1 and lines[0]["time"] > 1e9
    assert lines[1]["train_loss"] == "nan" and lines[1]["train_norm"] == "inf"


def test_every_and_force_decide_what_is_recorded(tmp_path):
    path = tmp_path / "log.jsonl"
    with Writer(path, every=10) as log:
        for step in range(1, 34):
            log.scalars(step, {"a": step}, force=step == 33)
    assert steps(path) == [10, 20, 30, 33]


def test_every_line_is_readable_before_close(tmp_path):
    log = Writer(tmp_path / "log.jsonl")
    log.scalars(1, {"a": 1})
    assert steps(tmp_path / "log.jsonl") == [1]
    log.close()
    log.close()


def test_restart_drops_what_it_will_repeat_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "log.jsonl"
    with Writer(path) as log:
        for step in range(1, 8):
            log.scalars(step, {"a": step})
    with Writer(path) as log:
        log.truncate_after(4)
        log.scalars(5, {"a": 50})
    assert [(record["step"], record["a"]) for record in read_log(path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("tail", [b'{"step": 3, "a"', b'{"step": 3, "a": 1}', b"\xff\xfe\n", b'"text"\n'])
def test_broken_tail_is_cut_at_open(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    with Writer(path) as log:
        log.scalars(1, {"a": 1})
        log.scalars(2, {"a": 2})
    with path.open("ab") as file:
        file.write(tail)
    assert steps(path) == [1, 2]
    with Writer(path) as log:
        log.scalars(3, {"a": 3})
    assert steps(path) == [1, 2, 3]


def test_other_processes_write_nothing(tmp_path):
    with Writer(tmp_path / "x" / "log.jsonl", is_main=False) as log:
        log.scalars(1, {"a": 1})
        log.truncate_after(0)
    assert not list(tmp_path.iterdir())


def test_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*log.jsonl.*--workdir"):
        Writer(tmp_path / "file" / "log.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
def test_full_disk_is_one_line():
    log = Writer.__new__(Writer)
    log._path, log._is_main, log._every, log._remote = "/dev/full", True, 1, False

    class Full(io.FileIO):
        def truncate(self, size=None):  # a device cannot be truncated; on a real disk this cuts the partial line
            return 0

        def seek(self, *args):
            return 0

        def tell(self):
            return 0

    log._file = Full("/dev/full", "r+b")
    with pytest.raises(UserError, match="No space left"):
        log.scalars(1, {"a": 1.0})
    log.close()


def test_progress_prints_whole_lines_in_a_log(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress(range(3, 5), "unlearn", total=5, initial=3)) == [3, 4]
    assert list(progress(4, "sample")) == [0, 1, 2, 3]
    list(progress(4, "quiet", is_main=False))
    say("hello")
    lines = screen.getvalue().splitlines()
    assert "\r" not in screen.getvalue() and len(lines) == 3 and lines[2] == "hello"
    assert lines[0].startswith("unlearn: 5/5 (100%), ") and lines[1].startswith("sample: 4/4 (100%), ")


def test_progress_lines_tell_rate_and_time_left_from_the_second_update_on(monkeypatch):
    """The first update takes as long as its compilation, which says nothing about the others."""
    screen, clock = io.StringIO(), iter([0.0, 60.0, 60.0, 60.0, 70.0, 70.0, 70.0, 70.0])
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(writer.time, "monotonic", lambda: next(clock, 70.0))
    with progress(100, "pretrain", unit="step") as bar:
        bar.update(20)
        bar.update(40)
    lines = screen.getvalue().splitlines()
    assert lines == ["pretrain: 20/100 (20%)", "pretrain: 60/100 (60%), 4.00step/s, 00:10 left"]


def test_a_long_compilation_says_so_once_and_a_short_one_nothing(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(writer, "_COMPILE_SECONDS", 0.05)
    for compiles, is_main, seconds in ((True, True, 0.4), (True, True, 0.0), (False, True, 0.4), (True, False, 0.4)):
        with progress(3, "pretrain", compiles=compiles, is_main=is_main) as bar:
            time.sleep(seconds)
            bar.update()
            time.sleep(0.1)
    lines = [line for line in screen.getvalue().splitlines() if not line.startswith("pretrain: 1/3")]
    assert lines == ["pretrain: compiling, which may take up to a minute"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress(4, "sample") as bar:
        for _ in range(4):
            bar.update()
            time.sleep(0.15)  # tqdm draws ten times a second
    drawn = screen.getvalue().split("\r")
    assert "4/4" in drawn[-1] and "it/s" in drawn[-1]
    early = [text for text in drawn if "| 0/4" in text or "| 1/4" in text]
    assert early and not any("?" in text or "it" in text for text in early)


def test_object_store_is_written_whole(tmp_path, monkeypatch):
    """No bucket here: the remote path is mapped to a local file, the rest of the code is what `gs://` runs."""
    monkeypatch.setattr(writer, "_remote_path", lambda path: tmp_path / str(path).replace("://", "_").replace("/", "_"))
    for kept, new in ((0, (1, 2, 3)), (2, (3, 4))):
        with Writer("gs://bucket/log.jsonl") as log:
            log.truncate_after(kept)
            for step in new:
                log.scalars(step, {"a": step})
    assert [record["step"] for record in read_log("gs://bucket/log.jsonl")] == [1, 2, 3, 4]
