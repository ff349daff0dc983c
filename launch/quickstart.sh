#!/usr/bin/env bash
# Trains an introspective embedding on the built-in data and shows what came out. Needs Python 3.11 to 3.13 and a
# network for the packages, nothing else. Can be run again; arguments go on to the training command.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv

WORKDIR="$ROOT/runs/quickstart"
if [ -f "$WORKDIR/result.json" ]; then
  echo "$WORKDIR holds a finished run; starting afresh"
  rm -rf "$WORKDIR"
fi
"$VENV_PYTHON" -m idml_jax.main --config="$ROOT/configs/glyphs.py:quick" --workdir="$WORKDIR" "$@"
# A page of what it has learnt; the last line says where it lies.
exec "$VENV_PYTHON" -m idml_jax.report --workdir="$WORKDIR"
