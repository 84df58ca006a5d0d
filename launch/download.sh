#!/usr/bin/env bash
# Gets what a config needs and does not find: runs the commands that config.mode=check prints, one after the other.
#
#   launch/download.sh configs/celebahq.py [--config.FIELD=VALUE ...]
#
# `hf` comes with `pip install huggingface_hub`, `tfds build` needs `pip install tensorflow-cpu`. Without a network it says so in seconds.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: launch/download.sh configs/NAME.py [--config.FIELD=VALUE ...]" >&2
  exit 2
fi
config=$1
shift
python=${PYTHON:-python}

list=$("$python" -m retrack_jax.main --config="$config" "$@" --config.mode=check)
echo "$list"
# The same archive or repository may hold several files: each command runs once.
commands=$(sed -n 's/^ *get it: //p' <<<"$list" | awk '!seen[$0]++')
[ -n "$commands" ] || exit 0

network() { curl --silent --head --output /dev/null --connect-timeout 5 --max-time 10 "$1"; }

while IFS= read -r command; do
  case "$command" in
    *"curl "*) host=$(grep -o 'https://[^/]*' <<<"$command" | head -n 1) ;;
    "hf download"*) host=${HF_ENDPOINT:-https://huggingface.co} ;;
    "tfds build"*) host=https://storage.googleapis.com ;;
    *) host="" ;;
  esac
  tool=${command%% *}
  if ! command -v "$tool" >/dev/null; then
    echo "error: $tool is not installed, which this needs: $command" >&2
    exit 2
  fi
  if [ -n "$host" ] && ! network "$host"; then
    echo "error: $host cannot be reached; on a machine with a network run: $command" >&2
    exit 2
  fi
  echo "+ $command"
  bash -euo pipefail -c "$command" </dev/null || {
    echo "error: this failed, so nothing after it was tried: $command" >&2
    exit 2
  }
done <<<"$commands"
"$python" -m retrack_jax.main --config="$config" "$@" --config.mode=check
