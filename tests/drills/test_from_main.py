"""What process 0 made arrives whole on the other, however many chunks it is sent in."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

if __name__ == "__main__":  # the processes meet before the imports below make any array
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))

from retrack_jax import parallel
from tests.drills import cli

MADE = {"rows": np.arange(700), "images": np.arange(256, dtype=np.uint8).reshape(4, 8, 8), "words": ["few", None]}


def start(process, port, result):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.drills.test_from_main", str(process), str(port), str(result)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=cli.ROOT)


def test_what_process_0_made_arrives_in_chunks(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = [tmp_path / f"{index}" for index in range(2)]
    processes = [start(index, port, results[index]) for index in range(2)]
    errors = [process.communicate(timeout=cli.patience(120))[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    size = len(pickle.dumps(MADE))
    for result in results:
        for chunk in (size + 1, size, size - 1, size // 7):
            received = pickle.loads((result / str(chunk)).read_bytes())
            assert received["words"] == MADE["words"], chunk
            for name in ("rows", "images"):
                np.testing.assert_array_equal(received[name], MADE[name])


def make():
    assert parallel.is_main_process(), "process 0 alone makes it"
    return MADE


if __name__ == "__main__":
    result, size = Path(sys.argv[3]), len(pickle.dumps(MADE))
    result.mkdir()
    for chunk in (size + 1, size, size - 1, size // 7):
        parallel._CHUNK = chunk
        (result / str(chunk)).write_bytes(pickle.dumps(parallel.from_main(make)))
