# shellcheck shell=bash
# What the launch scripts share; sourced, not run. A script sets dry=1 for --dry-run.

fail() { echo "error: $*" >&2; exit 2; }

# Prints the comment block at the head of the calling script, from its second line to the first that is no comment. The scripts
# have gone to the checkout's folder by then, so a relative $0 may lead nowhere.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "launch/$(basename "$0")"; }

# Prints a command as it could be typed, quoting only what needs it.
shown() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

# Runs a command, or with --dry-run says what would run.
run() {
  if [[ "${dry:-0}" -eq 1 ]]; then echo "would run: $(shown "$@")"; else "$@"; fi
}
