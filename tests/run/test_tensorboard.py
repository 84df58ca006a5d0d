"""Event files of TensorBoard, read back by protobuf's own parser; and the profiler's trace."""

import gzip
import importlib.util
import json

import jax
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.config.options import Options
from retrack_jax.run.tensorboard import check_tensorboard, scalars_of_training, show_results
from retrack_jax.train.profile import profiled

tensorboardX = pytest.importorskip("tensorboardX")
from PIL import Image  # noqa: E402
from tensorboardX.proto.event_pb2 import Event  # noqa: E402
from tensorboardX.record_writer import RecordWriter  # noqa: E402, F401

ON = Options(tensorboard=True)


def values_in(folder) -> dict[str, list]:
    """name -> (step, value) of each record, in order; the value of a picture or text is its kind."""
    found = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                shown = value.simple_value if value.WhichOneof("value") == "simple_value" else value.WhichOneof("value")
                found.setdefault(value.tag, []).append((event.step, shown))
    return found


def test_losses_and_learning_rate(tmp_path):
    with scalars_of_training(ON, tmp_path, "unlearn", lambda step: step / 10, 0) as record:
        for step in (1, 2):
            record(step, {"unlearn_loss": 3.0 - step})
    found = values_in(tmp_path)
    assert found["unlearn_loss"] == [(1, 2.0), (2, 1.0)]
    assert found["unlearn_learning_rate"] == [(1, 0.0), (2, np.float32(0.1))]


def test_results(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "samples.png")
    verdict = {"forgotten": "forgotten", "kept": "kept", "remembered_before": True, "why": "all losses rose", "files": []}
    show_results(ON, tmp_path, {"unlearned": {"fid": 2.5}, "steps": 7, "verdict": verdict})
    found = values_in(tmp_path)
    assert found["metrics/fid"] == [(7, 2.5)] and found["samples"] == [(7, "image")]
    assert found["verdict/text_summary"] == [(7, "tensor")]


def test_nothing_is_written_unless_asked_for(tmp_path):
    with scalars_of_training(Options(), tmp_path, "unlearn", float, 0) as record:
        assert record is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot write .*/run/tensor"),
        scalars_of_training(ON, tmp_path / "file" / "run", "unlearn", float, 0),
    ):
        pass


def test_what_cannot_be_recorded_is_known_before_a_run(tmp_path, monkeypatch):
    check_tensorboard(ON, tmp_path)
    check_tensorboard(Options(), "gs://bucket/run")
    with pytest.raises(UserError, match="local folders only"):
        check_tensorboard(ON, "gs://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        check_tensorboard(ON, tmp_path)


def test_the_profiler_records_the_steps_after_the_first_two(tmp_path):
    step = jax.jit(lambda x: x @ x)
    x = np.eye(8, dtype=np.float32)
    for index in profiled(range(6), tmp_path, 2):
        with jax.profiler.TraceAnnotation(f"step {index}"):
            x = step(x)
    (file,) = tmp_path.rglob("*.trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"step 2", "step 3"} <= names and not names & {"step 1", "step 4"}
