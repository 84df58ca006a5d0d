"""Two commands at once: on one workdir the second is refused (tests/run), on one cache it waits."""

import numpy as np
from PIL import Image

from tests.drills import cli


def test_two_commands_at_once_share_an_empty_cache(cache, tmp_path):
    """One decodes the images and the other waits for them; both end with the same bits."""
    (tmp_path / "images").mkdir()
    for index, image in enumerate(np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02}.png")
    places = {"data__dir": tmp_path / "images", "data__cache_dir": tmp_path / "empty"}
    changes = {
        "data__source": "folder",
        "data__copies": 0,
        **places,
        "targets": "03.png",
        "mode": "pretrain",
        "pretrain__num_steps": 2,
    }
    works = [tmp_path / "one", tmp_path / "other"]
    calls = (lambda work=work: cli.succeed(cli.flags(work, **changes), cache) for work in works)
    said = [done.stderr for done in cli.in_parallel(*calls)]
    assert sum("decode" in text for text in said) == 1, said
    one, other = (cli.last_state(work / "pretrained") for work in works)
    cli.assert_same(one, other)
