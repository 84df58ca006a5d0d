"""What users mistype: status 2 and one line, no traceback, no hang; 200 in process, 10 through a real process."""

import itertools
import os
import re
import time

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from retrack_jax.main import main
from tests.drills import cli, malformed

LIMIT_SECONDS = 10.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where generated files lie; no case may leave a finished run there."""
    return tmp_path_factory.mktemp("malformed")


@pytest.fixture(autouse=True, scope="module")
def own_cache(cache):
    """The command chooses a compilation cache, which is put back."""
    home = os.environ["HOME"]
    os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["HOME"] = str(cache / "xla"), str(cache)
    yield
    os.environ["HOME"] = home
    del os.environ["JAX_COMPILATION_CACHE_DIR"]


def check_one_line(errors: str, what: str) -> None:
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and errors.strip().splitlines()[-1] == lines[0], f"{what}: {errors[-2000:]}"
    assert "Traceback" not in errors and 20 < len(lines[0]) < 1500, f"{what}: {errors[-2000:]}"


def test_two_hundred_in_process(place, capsys):
    seen, number = {}, itertools.count()
    assert (
        main(["retrack_jax.main"]) == main(["retrack_jax.main", *cli.flags(place / "first", unlearn__retrack__lam=2)]) == 2
    )  # imports jax

    @settings(
        max_examples=200, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=True,
    )  # fmt: skip
    @given(malformed.cases(place))
    def check(case):
        what, flags = case
        work = str(place / f"work{next(number)}")  # each its own: a run of another config there would hide the mistake
        flags = [str(flag).replace(malformed.WORK, work) for flag in flags]
        capsys.readouterr()
        began = time.monotonic()
        status = main(["retrack_jax.main", *flags])
        took = time.monotonic() - began
        errors = capsys.readouterr().err
        assert status == 2, f"{what}: status {status}; {errors[-1500:]}"
        check_one_line(errors, what)
        field, is_value, value = what.partition("=")
        if is_value and field in malformed.FIELDS and field != "data.copies":  # without copies it is the target that is missing
            parts = [part for part in field.split(".")[-1].split("_") if len(part) > 1]
            assert any(part.rstrip("s") in errors for part in [*parts, value]), (
                f"{what}: the message does not name the field: {errors[-500:]}"
            )
        assert took < cli.patience(LIMIT_SECONDS), f"{what}: took {took:.1f} s"
        seen[re.sub(r"[^a-z. ]", "", what)] = took

    check()
    print(f"{len(seen)} kinds of mistakes, the slowest in {max(seen.values()):.1f} s")


TEN = [
    ("no flag at all", lambda work: []),
    ("a config file that is not there", lambda work: [f"--config={cli.ROOT}/configs/digit_tshirt.py"]),
    ("a method that is not there", lambda work: [f"--config={cli.ROOT}/configs/digits_tshirt.py:retrak"]),
    ("a field that is not there", lambda work: [*cli.flags(work), "--config.unlearn.retrack.lamda=0.1"]),
    ("a value of the wrong kind", lambda work: [*cli.flags(work), "--config.unlearn.num_steps=many"]),
    ("a value out of range", lambda work: cli.flags(work, unlearn__retrack__lam=1.5)),
    ("more neighbors than images", lambda work: cli.flags(work, unlearn__num_neighbors=5000)),
    ("a target that is not there", lambda work: cli.flags(work, targets="label:99")),
    ("data that are not there", lambda work: cli.flags(work, data__source="folder", data__dir="/no/such/folder", data__copies=0)),
    ("a checkpoint that is not there", lambda work: cli.flags(work, checkpoint="/no/such/checkpoint")),
]


@pytest.mark.parametrize("what,flags", TEN, ids=[what for what, _ in TEN])
def test_ten_through_a_real_process(what, flags, cache, tmp_path):
    began = time.monotonic()
    done = cli.run(flags(tmp_path / "work"), cache, timeout=60)
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stderr[-2000:])
    check_one_line(done.stderr, what)
    assert time.monotonic() - began < cli.patience(LIMIT_SECONDS)


@pytest.mark.parametrize(
    "mistake",
    [
        {"model__norm_num_groups": 7},
        {"unlearn__num_neighbors": 5000},
        {"data__source": "folder", "data__dir": "/no", "data__copies": 0},
    ],
)
def test_a_mistake_does_not_claim_the_workdir(mistake, cache, tmp_path):
    """After the mistake is mended the same workdir takes the run: nothing there says that it is another config's."""
    assert main(["retrack_jax.main", *cli.flags(tmp_path, **mistake)]) == 2
    claimed = [path for path in tmp_path.rglob("config.json")]
    assert not claimed, f"a run that never began claimed {claimed}"
