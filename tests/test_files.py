"""What a killed process left half written is removed at the next start; what a living one writes is not."""

import os
import subprocess
import sys
import time

import pytest

from retrack_jax import files
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
    Workdir(tmp_path)
    assert not left.exists()


def test_another_hosts_are_left_for_a_day(tmp_path, beside_of_the_dead):
    """Its processes have numbers of their own: whether one lives cannot be seen from here."""
    new, old = (beside_of_the_dead(tmp_path / name, host="node-7.cluster") for name in ("new.npz", "old.npz"))
    for path in (new, old):
        path.write_text("{")
    os.utime(old, times=(time.time() - 2 * DAY,) * 2)
    assert len({new.name, files.beside(tmp_path / "new.npz").name, beside_of_the_dead(tmp_path / "new.npz").name}) == 3
    files.sweep_temporaries(tmp_path)
    assert new.exists() and not old.exists()
