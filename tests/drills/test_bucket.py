"""`gs://` workdirs, as far as a machine without a bucket can drill them.

A stand-in object store answers for `gs://` below etils.epath: objects, no rename, no append, no empty folders. What Orbax
writes goes to the cloud through TensorStore's own driver and is not drilled here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from etils.epath import backend, gpath

from retrack_jax import files
from retrack_jax.checkpoints import export_diffusers, import_diffusers
from retrack_jax.checkpoints.diffusers_export import is_whole
from retrack_jax.log import Writer, read_log
from retrack_jax.report.comparison import comparison_report
from retrack_jax.report.html import run_report
from retrack_jax.run import samples
from retrack_jax.run.workdir import Workdir
from retrack_jax.sampling.generate import generate
from tests import toys

DATA = Path(__file__).parents[1] / "fixtures" / "diffusers"


class ObjectStore(backend._OsPathBackend):
    """Files of a local folder under `gs://` names; what an object store cannot do is an error."""

    def __init__(self, root):
        self.root = root

    def _local(self, path):
        path = str(path)
        assert path.startswith("gs://"), path
        return str(self.root / path.removeprefix("gs://"))

    def open(self, path, mode):
        assert "a" not in mode and "+" not in mode, f"an object store cannot append: {path} {mode}"
        if "w" in mode:
            local = self.root / str(path).removeprefix("gs://")
            local.parent.mkdir(parents=True, exist_ok=True)
        return super().open(self._local(path), mode)

    def rename(self, path, dst):
        raise AssertionError(f"an object store has no rename: {path}")

    replace = rename

    def glob(self, path):
        return ["gs://" + found.removeprefix(f"{self.root}/") for found in super().glob(self._local(path))]


for _name in ("exists", "isdir", "listdir", "makedirs", "mkdir", "rmtree", "remove", "stat"):

    def _forward(self, path, *args, _name=_name, **kwargs):
        return getattr(backend._OsPathBackend, _name)(self, self._local(path), *args, **kwargs)

    setattr(ObjectStore, _name, _forward)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    store = ObjectStore(tmp_path / "store")
    store.root.mkdir()
    monkeypatch.setattr(
        gpath._GPath, "_backend", property(lambda path: store if path._uri_scheme == "gs" else backend.os_backend)
    )
    return "gs://bucket/work"


def test_files_of_a_run_lie_in_the_bucket(bucket, tmp_path):
    work = Workdir(bucket)
    folder = work.run("retrack", 0, "t")
    assert str(folder) == f"{bucket}/retrack/seed0-t"
    work.record(folder, {"model": {"a": 1}})
    work.check(folder, {"model": {"a": 1}})
    with pytest.raises(files.UserError, match="another config's run"):
        work.check(folder, {"model": {"a": 2}})
    with Writer(folder / "log.jsonl") as log:
        for step in range(5):
            log.scalars(step, {"unlearn_loss": 1.0 / (step + 1)})
    with Writer(folder / "log.jsonl") as log:
        log.truncate_after(2)
    assert [record["step"] for record in read_log(folder / "log.jsonl")] == [0, 1, 2]
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    files.write_npz(folder / "samples.npz", samples=images)
    np.testing.assert_array_equal(samples.read(folder)["samples"], images)
    values = {"frequency": 0.0, "fid": 3.0}
    files.write_json(
        folder / "metrics.json",
        {"method": "retrack", "seed": 0, "target": "t", "pretrained": values, "unlearned": values},
    )
    run_report(folder, before=images, after=images)
    spread = {name: {"mean": value, "std": None, "runs": 1} for name, value in values.items()}
    files.write_json(
        work.root / "summary.json",
        {"methods": {name: {"runs": 1, "metrics": spread} for name in ("pretrained", "retrack")}},
    )
    comparison_report(work.root, samples={"retrack": images})
    there = {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert there == {
        "config.json",
        "log.jsonl",
        "samples.npz",
        "metrics.json",
        "report.html",
        "samples.png",
        "summary.json",
        "comparison.svg",
    }
    page = (tmp_path / "store" / "bucket" / "work" / "report.html").read_text()
    assert 'href="retrack/seed0-t/report.html"' in page
    stored = json.loads((tmp_path / "store/bucket/work/retrack/seed0-t/config.json").read_text())
    assert stored["model"] == {"a": 1} and set(stored) == {"format", "model"}


def test_sampling_goes_on_from_parts_in_the_bucket(bucket):
    import jax

    calls = []

    def p_sample(params, rng, index):
        calls.append(index.size)
        return np.broadcast_to(index[..., None, None, None] / 100, (*index.shape, 2, 2, 1)).astype(np.float32), np.ones(
            index.shape, bool
        )

    def make(count):
        return generate(
            p_sample,
            {},
            rng=jax.random.key(0),
            num_images=count,
            batch_size=8,
            out_dir=f"{bucket}/parts",
            fingerprint="x",
        )

    first = make(16)
    before = len(calls)
    again = make(24)
    np.testing.assert_array_equal(again[:16], first)
    assert before == 2 and len(calls) == 3


def test_an_export_that_was_cut_short_is_made_again(bucket):
    module, params = import_diffusers(DATA / "safetensors")
    path = Workdir(bucket).root / "diffusers"

    broken = dict(params, time_embedding={"linear_1": {"bias": toys.Interrupted()}})
    with pytest.raises(KeyboardInterrupt):
        export_diffusers(path, module, broken)
    assert path.exists() and not is_whole(path)
    export_diffusers(path, module, params)
    assert is_whole(path)
