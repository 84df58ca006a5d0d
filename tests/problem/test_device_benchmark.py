"""The prepared measurement of accelerators (tests/benchmarks/device.py), on this CPU with a toy network."""

import json
import os
import subprocess
import sys
from pathlib import Path

from jax.profiler import ProfileData

from tests.benchmarks.device import CELLS, SPELLING, cells_to_measure
from tests.benchmarks.device_cell import Cell, seconds_by_kind
from tests.tiny import TINY

ROOT = Path(__file__).parents[2]
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CONFIG = """
from retrack_jax.config.base import base_config, with_method

def get_config(method=None):
    config = base_config("toy")
    config.data.source = "digits_tshirt"
    config.model.update(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1)
    config.update_from_flattened_dict({fields!r})
    return with_method(config, method)
"""


def measured(out: Path, cases: str, minutes: float = 5.0) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.device", f"--out={out}", f"--cases={cases}", f"--minutes={minutes}"]
    environment = os.environ | {"XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_a_toy_is_measured_once(tmp_path):
    (tmp_path / "toy.py").write_text(CONFIG.format(fields=TINY))
    out, cell = tmp_path / "device.json", f"{tmp_path}/toy:float32+k2"
    assert f"too few for matmul:float32; not measured: matmul:float32, {cell}" in measured(out, cell, minutes=0.01)
    assert not out.exists()
    assert "2 cells to measure, 0 known" in measured(out, cell)
    cells = json.loads(out.read_text())["cells"]
    assert list(cells) == ["matmul:float32", cell]
    row = cells[cell]
    assert row["images"] == 2 * 2 * TINY["unlearn.batch_size"]
    assert row["images_per_second"] == row["images"] / row["seconds"] and 3 <= len(row["all_seconds"]) <= 10
    assert row["share_of_limit"] == row["flops"] / row["seconds"] / cells["matmul:float32"]["rate"] > 0
    # One forward pass and its gradient are three times the work; the compiler adds the optimizer, and counts one step of the two.
    assert 0.5 < row["compiled_flops"] / (row["flops"] / 2) < 2
    before = out.read_text()
    assert "0 cells to measure, 2 known" in measured(out, cell)
    assert out.read_text() == before


def test_a_cell_that_is_no_cell_is_refused(tmp_path):
    assert "no cell is called cifar10:float16" in measured(tmp_path / "device.json", "cifar10:float16")


def test_what_is_left_to_measure():
    names, on = ["a:tf32", "a:bfloat16", "a:bfloat16+torch", "b:tf32"], {"torch": None}
    assert cells_to_measure(names, {}, on) == ["matmul:tf32", "a:tf32", "matmul:bfloat16", "a:bfloat16", "b:tf32"]
    known = {"a:tf32": {"error": "no memory"}, "matmul:tf32": {"rate": 1.0}, "b:tf32": {"seconds": 1.0}}
    assert cells_to_measure(names, known, {"torch": "cuda"}) == ["matmul:bfloat16", "a:bfloat16", "a:bfloat16+torch", "a:tf32"]
    assert all(SPELLING.fullmatch(name) for name in CELLS) and len(set(CELLS)) == len(CELLS)
    assert Cell("a:bfloat16+k8+xla").number("k") == 8 and Cell("a:bfloat16+k8").number("a") is None


def test_kernels_are_told_apart_by_name():
    names = ("sm90_xmma_fprop_implicit_gemm_tf32", "nvjet_tst_128x256", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop",
             "input_reduce_fusion_3", "loop_convert_fusion", "MemcpyD2D", "strange")  # fmt: skip
    metadata = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names, 1))
    events = "".join(f"events {{ metadata_id: {i} duration_ps: {i}000000000 }}" for i in range(1, len(names) + 1))
    lines = f'lines {{ name: "Stream #13(Compute)" {events} }} lines {{ name: "XLA Modules" {events} }}'
    text = f'planes {{ name: "/device:GPU:0" {lines} {metadata} }} planes {{ name: "/host:CPU" {lines} {metadata} }}'
    found = seconds_by_kind(ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text)))
    kinds = ("convolution", "matrix product", "attention", "reduction", "elementwise", "copy", "other")
    assert {kind: round(1000 * seconds) for kind, seconds in found.items()} == {kind: i for i, kind in enumerate(kinds, 1)}
