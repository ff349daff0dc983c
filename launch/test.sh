#!/usr/bin/env bash
# Sets up as quickstart.sh does and runs the whole test suite. --parity installs PyTorch, timm, transformers and
# pytorch-metric-learning too, for the tests that compare with them (on Linux plain PyPI serves PyTorch with several GB
# of CUDA packages; give PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS for a CPU build). --next runs it on the newest packages,
# requirements-next.txt, in .venv-next. Other arguments are passed to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

EXTRAS=test TYPES=yes
while true; do
  case "${1:-}" in
    --parity) EXTRAS=test,parity ;;
    --next)
      use_next_stack
      TYPES=no # they are checked with the stubs of requirements.txt; those of newer packages differ
      ;;
    *) break ;;
  esac
  shift
done
make_venv
install_into_venv "$EXTRAS" -e "$ROOT[$EXTRAS]" -c "$REQUIREMENTS"
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .
[ "$TYPES" = no ] || "$VENV_PYTHON" -m mypy
# Compiled programs are kept, so that a second start is fast.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$ROOT/.cache/jax}"
# One process per core: threads of numpy's and PyTorch's linear algebra would only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
# The commands in the tests are over before huge pages pay (idml_jax/runtime/huge_pages.py).
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-}"
# JAX compiles on one core, so one process per core makes the suite fast.
exec "$VENV_PYTHON" -m pytest -n "${TEST_PROCESSES:-auto}" --dist loadfile "$@"
