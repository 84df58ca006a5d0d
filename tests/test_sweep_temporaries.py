"""What a killed process left half written is removed at the next start; what a living one writes is not."""

import os
import subprocess
import sys

from retrack_jax.files import sweep_temporaries
from retrack_jax.workdir import Workdir


def test_the_next_start_sweeps_what_the_dead_left(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = tmp_path / "retrack" / "seed0-a"
    (run / f".diffusers.{gone.pid}.tmp" / "unet").mkdir(parents=True)
    (run / f".diffusers.{gone.pid}.old").mkdir()
    (tmp_path / f".summary.json.{gone.pid}.tmp").write_text("{")
    kept = [run / f".config.json.{os.getpid()}.tmp", run / "metrics.json", run / ".mine.tmp", tmp_path / ".hidden"]
    for path in kept:
        path.write_text("{}")
    sweep_temporaries(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_dir()) == sorted(kept)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == []

    (tmp_path / f".summary.json.{gone.pid}.tmp").write_text("{")
    Workdir(tmp_path)
    assert not (tmp_path / f".summary.json.{gone.pid}.tmp").exists()
