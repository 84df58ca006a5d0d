"""A text-to-image model that remembers two captioned pictures forgets them by ReTrack and keeps the others: the whole command."""

import json

import numpy as np

from retrack_jax.main import main
from tests.remembering_sd import REMEMBERED, flags, write_pictures, write_pipeline


def test_two_remembered_pictures_are_forgotten_and_the_others_are_kept(tmp_path):
    write_pipeline(tmp_path / "pipeline", write_pictures(tmp_path / "pictures"))
    assert main(flags(tmp_path, sampling__num_images=2, sampling__num_steps=2)) == 0
    (folder,) = (tmp_path / "work" / "retrack").glob("seed0-*")
    verdict = json.loads((folder / "metrics.json").read_text())["verdict"]
    assert (verdict["remembered_before"], verdict["forgotten"], verdict["kept"]) == (True, "forgotten", "kept"), verdict["why"]
    assert {one["name"] for one in verdict["files"]} == set(REMEMBERED)
    assert all(one["after"] > 1.5 * one["before"] for one in verdict["files"])
    report = (folder / "report.html").read_text()
    assert all(caption.split(",")[0].replace("'", "&#39;") in report for caption in REMEMBERED.values())
    with np.load(folder / "samples.npz") as archive:
        assert {"forgotten_00", "forgotten_01", "kept_00", "kept_01"} <= set(archive.files)
