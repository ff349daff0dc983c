#!/usr/bin/env bash
# A run on a TPU VM or a pod slice: create it, install, start on all workers, watch, and resume after a preemption.
#
#   launch/tpu_vm.sh create|install|run|logs|resume|delete [--dry-run] [-- SETTINGS OF idml_jax.main]
#
#   NAME=idml ZONE=us-central2-b TYPE=v4-8 launch/tpu_vm.sh create --dry-run
#
# WORKDIR must be visible to all workers and outlive the slice, e.g. a bucket mounted on every worker.
set -euo pipefail
unset CDPATH
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

NAME="${NAME:-idml}"
ZONE="${ZONE:-us-central2-b}"
TYPE="${TYPE:-v4-8}"
IMAGE="${IMAGE:-tpu-ubuntu2204-base}"
SPOT="${SPOT:-1}"
WORKDIR="${WORKDIR:-/mnt/idml/run}"
SECONDS_BETWEEN="${SECONDS_BETWEEN:-60}"

usage() { sed -n '4,6p' "$0" | sed 's/^# \{0,1\}//'; }
fail() { echo "error: $*" >&2; exit 1; }

command="${1:-}"
[ -n "$command" ] && shift
dry=0
settings=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry=1 ;;
    --) shift; settings=("$@"); break ;;
    *) fail "unknown argument $1; settings come after --" ;;
  esac
  shift
done

# Runs a command, or prints it with --dry-run.
do_it() {
  if [ "$dry" = 1 ]; then printf '+'; printf ' %q' "$@"; printf '\n'; else "$@"; fi
}
on_workers() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

create() {
  local spot=()
  [ "$SPOT" = 1 ] && spot=(--spot)
  do_it gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$IMAGE" "${spot[@]}"
}
# A worker whose Python is older than 3.11 gets one by uv.
install() {
  do_it git -C "$ROOT" archive --format=tar.gz --output=/tmp/idml_jax.tgz HEAD &&
    do_it gcloud compute tpus tpu-vm scp /tmp/idml_jax.tgz "$NAME:idml_jax.tgz" --zone "$ZONE" --worker=all &&
    on_workers 'set -e; mkdir -p idml_jax; tar -xzf idml_jax.tgz -C idml_jax; cd idml_jax; if [ ! -x .venv/bin/pip ]; then if python3 -c "import sys; sys.exit(sys.version_info < (3, 11))"; then python3 -m venv .venv; else python3 -m pip install -q --user uv; python3 -m uv venv -q --seed --python 3.12 .venv; fi; fi; .venv/bin/pip install -q ".[tpu,clu]" -c requirements.txt'
}
# Waits for the end of the run, or of the slice. The log ends with the exit code.
run() {
  local words
  words="$(printf ' %q' "--workdir=$WORKDIR" "${settings[@]}")"
  on_workers "cd idml_jax && { nohup .venv/bin/python -m idml_jax.main --coordinator=auto$words > ~/idml.log 2>&1; code=\$?; echo exit code \$code >> ~/idml.log; exit \$code; }"
}
logs() { do_it gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=0 --command 'tail -n 50 -f idml.log'; }
delete() { do_it gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE" --quiet; }
state() { gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" --format 'value(state)' 2>/dev/null || echo GONE; }

on_first() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=0 --command "$1" 2>/dev/null; }

failed=0 # times in a row
install_and_run() {
  if install; then
    failed=0
    run || true # the loop below looks how it ended
  else
    failed=$((failed + 1))
    [ "$failed" -lt 3 ] || fail "installing on the workers has failed three times"
  fi
}

# Starts the slice again after each preemption; the run resumes from its last checkpoint. Ends with the run.
resume() {
  if [ "$dry" = 1 ]; then
    echo "# every $SECONDS_BETWEEN s: while $WORKDIR/result.json is missing and the slice is PREEMPTED or GONE:"
    delete; create; install; run
    return
  fi
  while true; do
    case "$(state)" in
      READY)
        if on_first "test -e '$WORKDIR/result.json'"; then
          echo "finished: $WORKDIR/result.json"
          return
        fi
        ended="$(on_first 'if [ -e idml.log ]; then tail -n 1 idml.log; else echo no log; fi' || echo "not reached")"
        case "$ended" in
          "exit code 75" | "exit code 134") run || true ;; # saved and stopped, or another worker was lost
          "exit code "*) fail "the run ended with $ended and no $WORKDIR/result.json; $0 logs shows why" ;;
          "no log") install_and_run ;;
        esac ;;
      PREEMPTED | TERMINATED) if delete && create; then install_and_run; fi ;;
      GONE) if create; then install_and_run; fi ;;
    esac
    sleep "$SECONDS_BETWEEN"
  done
}

case "$command" in
  create | install | logs | resume | delete) ;;
  run) [ ${#settings[@]} -gt 0 ] || fail "no settings; e.g. launch/tpu_vm.sh run -- --config=configs/cub200.py" ;;
  "" | -h | --help) usage; [ -n "$command" ] || exit 2; exit 0 ;;
  *) fail "unknown command $command; known: create, install, run, logs, resume, delete" ;;
esac
if [ "$dry" = 0 ] && ! command -v gcloud > /dev/null; then
  fail "gcloud is not installed; --dry-run shows what would be done"
fi
"$command"
