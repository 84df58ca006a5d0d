"""Damaged files of every format: the right answer or one line, no hang, no memory far above what the honest file needs."""

import pytest

from tests.drills import mutations

# Of a format: 300. JSON is one, in as many files as these; a config that is right after all is laid out, which takes a second.
COUNTS = {name: 5 for name in ("config.json", "unet's config.json", "vae's config.json", "text encoder's config.json")}
JSON = 40


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A folder, and the formats whose files lie in it."""
    folder = tmp_path_factory.mktemp("mutations")
    return folder, mutations.formats(folder)


@pytest.mark.parametrize("name", mutations.NAMES)
def test_mutated_files_are_read_or_refused(name, every):
    folder, formats = every
    one = formats[name]
    json_like = one.name.endswith((".json", ".txt"))
    outcome = mutations.try_out(one, folder, COUNTS.get(name, JSON if json_like else 300))
    assert not outcome.faults, outcome.faults[:5]
    assert outcome.kinds["refused"] > 0
    assert outcome.bytes < mutations.LIMIT_BYTES


def test_every_format_has_its_test(every):
    assert tuple(every[1]) == mutations.NAMES
