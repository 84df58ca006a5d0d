"""Where the committed tiny pipeline and concepts lie (tests/make_tiny_sd.py makes them)."""

from pathlib import Path

ROOT = Path(__file__).parents[1] / "data" / "tiny_sd"
PIPELINE = ROOT / "pipeline"
CONCEPTS = ROOT / "concepts"
RECORDED = Path(__file__).parents[1] / "data" / "sd_parity.npz"
