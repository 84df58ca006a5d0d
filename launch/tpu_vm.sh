#!/usr/bin/env bash
# Creates a Cloud TPU slice, installs this checkout on every worker and runs the command on all of them.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE [--type v4-8] [--project P] [--version IMAGE] [--spot]
#                    [--setup COMMAND] [--skip-create] [--skip-install] [--delete] [--dry-run]
#                    --config=configs/NAME.py[:METHOD] --workdir=gs://BUCKET/DIR ...
#
# Only the checkout travels. --setup is run in it on every worker after the install, to bring what the config needs, such as
# --setup "gcloud storage cp -r gs://BUCKET/datasets gs://BUCKET/checkpoints ." (config.mode=check lists those files).
# The workdir must be a gs:// address (or a disk that all workers mount). A preempted slice: the same command again creates it anew
# and continues. --delete deletes the slice after the run, whatever its outcome. Needs the gcloud command, logged in.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

name="" zone="" project="" type=v4-8 version=tpu-ubuntu2204-base setup=""
dry=0 create=1 install=1 delete=0 spot=()
value() { [[ -n "${2:-}" && "${2:-}" != --* ]] || fail "$1 needs a value"; }
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --name) value "$@"; name="$2"; shift 2 ;;
    --zone) value "$@"; zone="$2"; shift 2 ;;
    --project) value "$@"; project="$2"; shift 2 ;;
    --type) value "$@"; type="$2"; shift 2 ;;
    --version) value "$@"; version="$2"; shift 2 ;;
    --setup) value "$@"; setup="$2"; shift 2 ;;
    --spot) spot=(--spot); shift ;;
    --skip-create) create=0; shift ;;
    --skip-install) install=0; shift ;;
    --delete) delete=1; shift ;;
    --dry-run) dry=1; shift ;;
    *) break ;;
  esac
done
[[ -n "$name" && -n "$zone" ]] || fail "give --name and --zone; $0 --help shows the usage"
[[ $# -gt 0 ]] || fail "give the command's own flags, such as --config=configs/celebahq.py --workdir=gs://bucket/celebahq"
[[ " $* " == *" --workdir="* ]] || fail "give --workdir=gs://BUCKET/DIR, which all workers of the slice share"
if [[ $dry -eq 0 ]] && ! command -v gcloud >/dev/null; then
  fail "the gcloud command is not installed; see https://cloud.google.com/sdk/docs/install"
fi

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")
tpu() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
on_all() { tpu ssh "$name" --worker=all --command="$1"; }

remove() { tpu delete "$name" --quiet; }
if [[ $create -eq 1 ]]; then
  # A preempted slice stays in the list and must be deleted before one of its name can be made.
  state=""
  [[ $dry -eq 1 ]] || state=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format="value(state)" 2>/dev/null || true)
  if [[ "$state" == PREEMPTED || "$state" == TERMINATED ]]; then remove; state=""; fi
  [[ -n "$state" ]] || tpu create "$name" --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"}
fi
[[ $delete -eq 0 ]] || trap remove EXIT
if [[ $install -eq 1 ]]; then
  archive="${TMPDIR:-/tmp}/retrack_jax-$$.tar.gz"
  [[ -z "$(git status --porcelain --untracked-files=no)" ]] || echo "warning: only committed files are copied; some are changed" >&2
  run git archive --format=tar.gz --output="$archive" HEAD
  tpu scp "$archive" "$name:retrack_jax.tar.gz" --worker=all
  run rm -f "$archive"
  # The base image of Ubuntu 22.04 brings Python 3.10; 3.11 is in its package index.
  on_all "set -e
command -v python3.11 >/dev/null || { sudo apt-get -o DPkg::Lock::Timeout=300 update -qq; sudo apt-get -o DPkg::Lock::Timeout=300 install -y -qq python3.11 python3.11-venv; }
mkdir -p retrack_jax
tar -xzf retrack_jax.tar.gz -C retrack_jax
cd retrack_jax
[ -x .venv/bin/python ] || python3.11 -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -e '.[tpu]'"
fi
[[ -z "$setup" ]] || on_all "cd retrack_jax && $setup"
on_all "cd retrack_jax && .venv/bin/python -m retrack_jax.main $(shown "$@")"
