"""Two processes with two devices each draw the same images as one process, share the work, and resume each other's parts."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

if __name__ == "__main__":  # the processes meet before the imports below make any array
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))

from retrack_jax import parallel
from retrack_jax.checks import UserError
from retrack_jax.sampling import generate, pmap_sample_fn
from tests.drills import cli
from tests.sampling.test_generate import PARAMS, SAMPLE_FN

NUM_IMAGES = 22


def start(process, port, folder, result):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-m",
        "tests.drills.test_generate_processes",
        str(process),
        str(port),
        str(folder),
        str(result),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def run_two(folders, tmp_path):
    """Returns the exit status, the images (None if there are none) and the error output of both processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = [tmp_path / f"result{index}.npy" for index in range(2)]
    processes = [start(index, port, folder, results[index]) for index, folder in enumerate(folders)]
    errors = [process.communicate(timeout=cli.patience(300))[1] for process in processes]
    images = [np.load(result) if result.exists() else None for result in results]
    return [process.returncode for process in processes], images, errors


@pytest.fixture(scope="module")
def expected():
    return generate(pmap_sample_fn(SAMPLE_FN), PARAMS, rng=jax.random.key(5), num_images=NUM_IMAGES, batch_size=8)


def test_two_processes_equal_one(tmp_path, expected):
    folder = tmp_path / "parts"
    codes, images, errors = run_two([folder, folder], tmp_path)
    assert codes == [0, 0], errors
    for made in images:
        np.testing.assert_allclose(made, expected, atol=1e-5)
    counts = {path.name: int(path.stem.split("-")[2]) for path in folder.iterdir()}
    assert counts == {f"part-{first:09d}-4.npz": 4 for first in (0, 4, 8, 12, 16)} | {"part-000000020-2.npz": 2}


def test_two_processes_make_what_is_missing(tmp_path, expected):
    folder, options = (
        tmp_path / "parts",
        dict(rng=jax.random.key(5), num_images=12, batch_size=12, fingerprint="drill"),
    )
    generate(pmap_sample_fn(SAMPLE_FN), PARAMS, out_dir=folder, **options)
    codes, images, errors = run_two([folder, folder], tmp_path)
    assert codes == [0, 0], errors
    np.testing.assert_allclose(images[1], expected, atol=1e-5)
    assert {path.name for path in folder.iterdir()} == {
        "part-000000000-12.npz", "part-000000012-4.npz", "part-000000016-4.npz", "part-000000020-2.npz",
    }  # fmt: skip


def test_folders_that_are_not_shared_are_refused(tmp_path):
    options = dict(rng=jax.random.key(5), num_images=8, batch_size=8, fingerprint="drill")
    generate(pmap_sample_fn(SAMPLE_FN), PARAMS, out_dir=tmp_path / "0", **options)
    codes, _, errors = run_two([tmp_path / "0", tmp_path / "1"], tmp_path)
    assert codes == [2, 2], errors
    assert all(b"they need a workdir that they share" in error for error in errors)


if __name__ == "__main__":
    try:
        options = dict(num_images=NUM_IMAGES, batch_size=8, out_dir=sys.argv[3], fingerprint="drill")
        made = generate(pmap_sample_fn(SAMPLE_FN), parallel.replicate(PARAMS), rng=jax.random.key(5), **options)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    np.save(sys.argv[4], made)
