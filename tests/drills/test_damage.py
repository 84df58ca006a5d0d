"""Damaged checkpoints, full disks, read-only folders: the run goes on from what is whole or says in one line why not."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from retrack_jax.checks import UserError
from retrack_jax.train.run_store import RunStore
from tests.drills import cli

RUN = "retrack/seed0-label_10"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"flip": flip, "truncate": truncate, "delete": Path.unlink}


def state(step: int):
    """A small tree with every kind of leaf that a run saves."""
    rng = np.random.default_rng(step)
    arrays = {
        "params": {
            "conv": {
                "kernel": rng.normal(size=(3, 3, 8, 16)).astype(np.float32),
                "bias": np.full(16, step, np.float32),
            }
        }
    }
    return jax.tree.map(
        jax.numpy.asarray,
        {**arrays, "step": np.int32(step), "opt_state": [np.zeros((), np.int32), (rng.random(5, np.float32),)]},
    )


def shapes(step: int):
    """What a restore of any step is asked for."""
    return jax.eval_shape(lambda: state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store with checkpoints 2 and 4, and the files of the newest."""
    folder = tmp_path_factory.mktemp("store") / "checkpoints"
    with RunStore(folder) as store:
        store.save(2, state(2), {"seconds": 1.0})
        store.save(4, state(4), {"seconds": 2.0})
    files = [path.relative_to(folder) for path in (folder / "4").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 4
    return folder, files


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_of_the_newest_falls_back_or_changes_nothing(damage, saved, tmp_path, caplog):
    """Every file in turn. Wrong weights are never used: what is restored is checkpoint 4 or 2, bit for bit, or a UserError."""
    folder, files = saved
    fell_back = set()
    for index, name in enumerate(files):
        copy = shutil.copytree(folder, tmp_path / str(index))
        DAMAGES[damage](copy / name)
        caplog.clear()
        with RunStore(copy) as store:
            found, meta = store.restore(shapes)
        assert meta["step"] in (2, 4), name
        jax.tree.map(np.testing.assert_array_equal, found, state(meta["step"]))
        if meta["step"] == 2:
            fell_back.add(name)
            assert "/4 is damaged" in caplog.text.replace(str(copy), "") and "/2" in caplog.text, name
    print(f"{damage}: {len(fell_back)} of {len(files)} files made the run fall back to the checkpoint before")
    weights = max(files, key=lambda name: (folder / name).stat().st_size)
    index = {name for name in files if name.match("4/state/d/*")}
    assert index and fell_back >= {
        weights,
        *index,
        *(Path("4") / name for name in ("meta/metadata", "state/_METADATA", "state/manifest.ocdbt")),
    }


def test_a_newest_checkpoint_that_is_an_empty_folder(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "store")
    shutil.rmtree(copy / "4")
    (copy / "4").mkdir()
    with RunStore(copy) as store:
        _, meta = store.restore(shapes)
    assert meta["step"] == 2


def test_a_checkpoint_that_was_being_deleted_is_swept_at_the_next_start(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "store")
    shutil.copytree(copy / "2", copy / "1")
    shutil.rmtree(copy / "1" / "state")
    with RunStore(copy) as store:
        assert sorted(path.name for path in copy.iterdir() if path.name.isdigit()) == ["2", "4"]
        assert store.restore(shapes)[1]["step"] == 4


def test_no_whole_checkpoint_left_is_one_line(saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "store")
    for name in copy.rglob("*"):
        if name.is_file() and "/d/" in str(name):
            flip(name)
    with RunStore(copy) as store, pytest.raises(UserError, match="no whole checkpoint is left"):
        store.restore(shapes)


def test_the_command_goes_on_from_the_checkpoint_before(finished, cache, copy_of):
    """The newest unlearning checkpoint is damaged and what came after it is gone: the command ends with the same bits."""
    work = copy_of(finished)
    expected = cli.outcome(finished)
    for name in ("metrics.json", "report.html", "samples.npz", "samples.png", "evaluation.json"):
        (work / RUN / name).unlink(missing_ok=True)
    newest = work / RUN / "checkpoints" / str(cli.checkpoint_steps(work / RUN)[-1])
    before = cli.checkpoint_steps(work / RUN)[-2]
    # The arrays; a byte of what describes them may be one that nobody reads, and another file is the largest from time to time.
    for path in newest.glob("state/**/d/*"):
        flip(path)
    done = cli.succeed(cli.flags(work), cache)
    assert f"{newest} is damaged" in done.stderr and f"{newest.parent}/{before}" in done.stderr
    cli.assert_same(expected, cli.outcome(work))


@pytest.mark.parametrize("name", ["metrics.json", "config.json", "samples.npz"])
def test_other_damaged_files_are_one_line_or_made_again(name, finished, cache, copy_of):
    work = copy_of(finished)
    truncate(work / RUN / name)
    (work / RUN / "report.html").unlink()
    done = cli.run(cli.flags(work), cache)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr[-3000:]
    if done.returncode == 2:
        assert done.stderr.strip().splitlines()[-1].startswith("error: ") and name in done.stderr
    else:
        cli.assert_same(cli.outcome(finished), cli.outcome(work))


@pytest.fixture
def mounted(tmp_path):
    """Returns a function that mounts a small tmpfs; skips where this machine refuses."""
    points = []

    def mount(size_kib):
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(point)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command on this machine")
        if done.returncode:
            pytest.skip(f"mounting is refused here: {done.stderr.strip()}")
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)], check=True)


def folder_kib(folder) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) // 1024


def whole_json_files(folder):
    for path in Path(folder).rglob("*.json"):
        if path.name in ("config.json", "metrics.json", "summary.json", "evaluation.json"):
            json.loads(path.read_text())


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_full_disk_is_one_line_and_leaves_what_was_there(share, finished, cache, mounted):
    """The disk holds the pretrained model and a part of what the run would add."""
    disk = mounted(int((folder_kib(finished / "pretrained") + share * folder_kib(finished / "retrack")) * 1.1) + 64)
    work = disk / "work"
    shutil.copytree(finished / "pretrained", work / "pretrained")
    before = {path: path.read_bytes() for path in (work / "pretrained").rglob("*") if path.is_file()}
    done = cli.run(cli.flags(work), cache, TMPDIR=cache)
    assert done.returncode == 2, (done.returncode, done.stderr[-4000:])
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr, done.stderr[-4000:]
    after = {path: path.read_bytes() for path in before}
    assert after == before
    whole_json_files(work)
    bigger = mounted(4 * folder_kib(finished) + 4096)  # with room again, the same files go on to the end
    shutil.copytree(work, bigger / "work")
    cli.succeed(cli.flags(bigger / "work"), cache)
    cli.assert_same(cli.outcome(finished), cli.outcome(bigger / "work"))


def test_a_full_cache_disk_is_one_line_and_a_full_tmpdir_does_no_harm(finished, cache, mounted, tmp_path):
    full = mounted(64)
    done = cli.run(cli.flags(tmp_path / "first"), full)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: cannot write {full}") and "free some space or set config.data.cache_dir" in line
    cli.succeed(cli.flags(tmp_path / "first"), cache)  # the run that failed is continued, with a cache that has room
    cli.succeed(cli.flags(tmp_path / "second"), cache, TMPDIR=full)
    for work in ("first", "second"):
        cli.assert_same(cli.outcome(finished), cli.outcome(tmp_path / work))


def test_a_read_only_install_is_enough(finished, cache, tmp_path):
    install = tmp_path / "install"
    install.mkdir()
    if subprocess.run(["mount", "--bind", str(cli.ROOT), str(install)], capture_output=True).returncode:
        pytest.skip("mounting is refused here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(install)], check=True)
        arguments = [one.replace(f"--config={cli.ROOT}", f"--config={install}") for one in cli.flags(tmp_path / "work")]
        cli.succeed(arguments, cache, PYTHONPATH=install)
    finally:
        subprocess.run(["umount", str(install)], check=True)
    cli.assert_same(cli.outcome(finished), cli.outcome(tmp_path / "work"))


def test_read_only_mount_is_one_line(finished, cache, mounted):
    disk = mounted(2 * folder_kib(finished) + 4096)
    shutil.copytree(finished, disk / "work")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = cli.run(cli.flags(disk / "work", seeds="0,1"), cache)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and str(disk / "work") in line and "Read-only" in line


def test_a_file_in_the_workdirs_place_is_one_line(cache, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        done = cli.run(cli.flags(place), cache)
        assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: --workdir")


def test_limit_on_file_size_acts_like_a_full_disk(finished, cache, copy_of):
    """Where mounting is refused this still drills a write that fails half way: `ulimit -f` cuts every file at 8 KiB."""
    work = copy_of(finished)
    shutil.rmtree(work / "retrack")
    command = " ".join(cli.command([f"'{flag}'" for flag in cli.flags(work)]))
    env = cli.environment(cache) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 8; {command}"],
        cwd=cli.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=cli.patience(240),
    )
    assert done.returncode == 2, (done.returncode, done.stderr[-4000:])
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert os.path.exists(work / "pretrained" / "samples.npz")
    whole_json_files(work)
