#!/usr/bin/env bash
# Runs the command on the NVIDIA GPUs of this machine: one process drives all of them.
#
#   launch/gpu_local.sh [--dry-run] [--gpus 0,1] --config=configs/NAME.py[:METHOD] [--workdir=DIR] ...
#
# Makes .venv first if it is not there, and installs the `cuda` extra if its jax knows no GPU. --gpus chooses some of the
# GPUs (default: all).
# The number of GPUs must divide the batches; an error says so before anything is loaded. GPUs take the place of microbatches.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

dry=0 gpus=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1; shift ;;
    --gpus) gpus="${2:-}"; shift 2 || fail "--gpus needs a list such as 0,1" ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "give the command's own flags, such as --config=configs/cifar10.py"
[[ -z "$gpus" || "$gpus" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus is '$gpus'; give a list such as 0,1"

if [[ $dry -eq 0 ]] && ! command -v nvidia-smi >/dev/null; then
  fail "no nvidia-smi on this machine, so no NVIDIA GPU is usable; run the command itself for the CPU"
fi
if [[ ! -x .venv/bin/python ]]; then
  run "${PYTHON:-python3}" -m venv .venv
  run .venv/bin/python -m pip install --quiet --upgrade pip
fi
# The .venv of `make demo` has jax for the CPU alone.
if ! compgen -G ".venv/lib/python*/site-packages/jax_cuda*_plugin" >/dev/null; then
  run .venv/bin/python -m pip install --quiet -e ".[cuda]"
fi
[[ -z "$gpus" ]] || run export "CUDA_VISIBLE_DEVICES=$gpus"
# In this shell's place: a signal to the script is one to the run, which saves, and its status is the script's.
run exec .venv/bin/python -m retrack_jax.main "$@"
