#!/usr/bin/env bash
# Trains an introspective embedding on the built-in data and writes a report. Needs only Python 3.11 to 3.13 and network
# access for the packages. On a machine with NVIDIA GPUs or TPUs it installs jax for them (ACCELERATOR=cuda, tpu or cpu
# decides otherwise). Can be run again; arguments are passed to the training command.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv
install_accelerator

WORKDIR="$ROOT/runs/quickstart"
if [ -f "$WORKDIR/result.json" ]; then
  echo "$WORKDIR holds a finished run; starting afresh"
  rm -rf "$WORKDIR"
fi
"$VENV_PYTHON" -m idml_jax.main --config="$ROOT/configs/glyphs.py:quick" --workdir="$WORKDIR" "$@"
# Writes the report; the last line of output is its path.
exec "$VENV_PYTHON" -m idml_jax.report --workdir="$WORKDIR"
