#!/usr/bin/env bash
# Runs the command as N processes on this machine, joined over loopback: what a slice of N hosts does, without the slice.
#
#   launch/cpu_processes.sh [--dry-run] [--devices D] [--logs DIR] N --config=configs/NAME.py[:METHOD] [--workdir=DIR] ...
#
# D: CPU devices in each process (default 1). DIR: where processes 1 to N-1 write what they print (default: a temporary folder);
# process 0 prints here. PYTHON chooses the interpreter (default: .venv/bin/python, else python3). PORT chooses the coordinator's port.
# The first process that fails ends the others, and its exit status is this script's. SIGTERM and one Ctrl-C make all of them save and
# stop; a second Ctrl-C ends them at once.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

dry=0 devices=1 logs=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=1; shift ;;
    --devices) devices="${2:-}"; shift 2 || fail "--devices needs a number" ;;
    --logs) logs="${2:-}"; shift 2 || fail "--logs needs a folder" ;;
    -*) fail "unknown option $1 before the number of processes; $0 --help shows the usage" ;;
    *) break ;;
  esac
done
count="${1:-}"
[[ "$count" =~ ^[1-9][0-9]*$ ]] || fail "give the number of processes first, such as: $0 2 --config=configs/digits_tshirt.py"
[[ "$devices" =~ ^[1-9][0-9]*$ ]] || fail "--devices is '$devices'; it must be a whole number of at least 1"
shift
[[ $# -gt 0 ]] || fail "give the command's own flags after the number, such as --config=configs/digits_tshirt.py"

python="${PYTHON:-}"
[[ -n "$python" ]] || { python=.venv/bin/python; [[ -x "$python" ]] || python=python3; }
port="${PORT:-}"
if [[ -z "$port" ]]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

common=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices" "RETRACK_COORDINATOR=127.0.0.1:$port" "RETRACK_PROCESSES=$count")
if [[ $dry -eq 1 ]]; then
  for ((index = 0; index < count; index++)); do
    run env "${common[@]}" "RETRACK_PROCESS=$index" "$python" -m retrack_jax.main "$@"
  done
  exit 0
fi

[[ -n "$logs" ]] || logs=$(mktemp -d "${TMPDIR:-/tmp}/retrack-processes.XXXXXX")
mkdir -p "$logs"
pids=()
stop_all() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
interrupt=TERM
trap 'stop_all TERM' TERM
trap 'stop_all "$interrupt"; interrupt=KILL' INT
for ((index = 0; index < count; index++)); do
  if [[ $index -eq 0 ]]; then
    env "${common[@]}" "RETRACK_PROCESS=$index" "$python" -m retrack_jax.main "$@" &
  else
    env "${common[@]}" "RETRACK_PROCESS=$index" "$python" -m retrack_jax.main "$@" >"$logs/process$index.log" 2>&1 &
  fi
  pids+=($!)
done
[[ "$count" -eq 1 ]] || echo "processes 1 to $((count - 1)) write to $logs" >&2

# Checks five times a second whether a process has ended. After a failure the others may wait for it in a collective forever. They
# have GRACE_SECONDS to stop by themselves (a preemption stops all at the same step, and they finish their saves); then they are ended.
status=0 deadline=0 next=TERM
while [[ ${#pids[@]} -gt 0 ]]; do
  for index in "${!pids[@]}"; do
    kill -0 "${pids[$index]}" 2>/dev/null && continue
    code=0
    wait "${pids[$index]}" || code=$?
    unset "pids[$index]"
    if [[ $code -ne 0 && $status -eq 0 ]]; then
      status=$code deadline=$((SECONDS + ${GRACE_SECONDS:-30}))
    fi
  done
  if [[ $deadline -gt 0 && $SECONDS -ge $deadline ]]; then
    stop_all "$next"
    next=KILL deadline=$((SECONDS + 10))
  fi
  sleep 0.2
done
exit "$status"
