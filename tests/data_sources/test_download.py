"""launch/download.sh runs what config.mode=check prints, and without a network says so in seconds."""

import http.server
import os
import subprocess
import sys
import threading
import time

import pytest

HF = """#!/usr/bin/env bash
# Stands in for the Hugging Face client: makes the folder that was asked for, with one file in it.
echo "$@" >> "$CALLS"
while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2" && echo '{}' > "$2/train-00000-of-00001.parquet"
"""


@pytest.fixture
def download(tmp_path):
    """Runs the script for the images of configs/cifar10.py; returns (status, output, the client's calls, seconds)."""
    (tmp_path / "bin").mkdir()
    client = tmp_path / "bin" / "hf"
    client.write_text(HF)
    client.chmod(0o755)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")

    def run(endpoint):
        calls = tmp_path / "calls"
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "HF_ENDPOINT": endpoint,
            "CALLS": str(calls),
            "no_proxy": "127.0.0.1",
        }
        fields = {"data.dir": tmp_path / "data", "checkpoint": model, "eval.metrics": "nll_bits_per_dim"}
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "launch/download.sh", "configs/cifar10.py", *flags], env=environment, capture_output=True, text=True
        )
        made = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, made, time.monotonic() - start

    return run


def test_commands_run_and_the_list_is_printed_again(download, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        status, output, calls, _ = download(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert status == 0, output
    assert calls == [f"download uoft-cs/cifar10 --repo-type=dataset --local-dir {tmp_path / 'data'}"]
    assert "2 found, 1 missing" in output and "3 found, 0 missing" in output


def test_without_a_network_it_fails_in_seconds(download):
    status, output, calls, seconds = download("http://127.0.0.1:9")
    assert status == 2 and not calls
    assert "error: http://127.0.0.1:9 cannot be reached; on a machine with a network run: hf download uoft-cs/cifar10" in output
    assert seconds < 60  # most of it starts Python; the network is given up after 10 s at most


def test_usage():
    done = subprocess.run(["bash", "launch/download.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/download.sh" in done.stderr
