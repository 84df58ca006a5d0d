#!/usr/bin/env bash
# Gets what a config needs and does not find. It runs the commands that config.mode=check prints, one after the other.
#
#   launch/download.sh [--dry-run] configs/NAME.py [--config.FIELD=VALUE ...]
#
# --dry-run prints the list and the commands, and runs none of them. PYTHON chooses the interpreter (default: .venv/bin/python,
# else python3). The commands need curl and unzip; `hf` comes with the package, `tfds build` needs its extra `tfds`. Without a
# network the script says so within seconds. Exit status 2: something that the config needs is still missing.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

dry=0
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1; shift ;;
    -*) fail "unknown option $1 before the config file; $0 --help shows the usage" ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || fail "give the config file first, such as: $0 configs/celebahq.py"
config="$1"
shift
python="${PYTHON:-}"
[[ -n "$python" ]] || { python=.venv/bin/python; [[ -x "$python" ]] || python=python3; }
# `hf` and `tfds` lie beside the interpreter that they were installed for.
[[ "$python" != */* ]] || PATH="$PATH:$(cd "$(dirname "$python")" && pwd)"

check() { "$python" -m retrack_jax.main --config="$config" "$@" --config.mode=check; }

# The commands in a list; the same archive or repository may hold several files, so each once. `python` is the one that asked.
commands_in() { sed -n 's/^ *get it: //p' <<<"$1" | sed "s|^python |$python |" | awk '!seen[$0]++'; }

# The programs that a command of several parts, joined by && and |, runs.
tools_of() { sed 's/ && /\n/g; s/ | /\n/g' <<<"$1" | awk '{ print $1 }' | sort -u; }

# Prints nothing where the list holds all that the config needs; else says what is left.
left_of() {
  grep '^missing' <<<"$1" | grep -v '(without it ' || true
  commands_in "$1"
}

network() { curl --silent --head --output /dev/null --connect-timeout 5 --max-time 10 "$1"; }

# Status 2 if something is missing, or if the config itself is wrong.
status=0
list=$(check "$@") || status=$?
echo "$list"
[ -n "$list" ] || exit "$status"
commands=$(commands_in "$list")
[ -n "$commands" ] || { [ -z "$(left_of "$list")" ] && exit "$status"; fail "no command gets what is missing; see the list above"; }
if [[ $dry -eq 1 ]]; then
  sed 's/^/would run: /' <<<"$commands"
  exit 0
fi

# Before anything is downloaded: an archive is large, and what unpacks it may not be there.
while IFS= read -r command; do
  for tool in curl $(tools_of "$command"); do
    command -v "$tool" >/dev/null || fail "$tool is not installed, which this needs: $command"
  done
done <<<"$commands"

while IFS= read -r command; do
  case "$command" in
    "hf download"*) host=${HF_ENDPOINT:-https://huggingface.co} ;;
    "tfds build"*) host=https://storage.googleapis.com ;;
    *) host=$(grep -o 'https://[^/]*' <<<"$command" | head -n 1) || true ;;
  esac
  if [ -n "$host" ] && ! network "$host"; then
    fail "$host cannot be reached; on a machine with a network run: $command"
  fi
  echo "+ $command"
  bash -euo pipefail -c "$command" </dev/null || fail "this failed, so nothing after it was tried: $command"
done <<<"$commands"

status=0
list=$(check "$@") || status=$?
echo "$list"
[ -z "$(left_of "$list")" ] || fail "some of it is still missing; see the list above"
exit "$status"
