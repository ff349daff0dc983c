# Shared by quickstart.sh and test.sh: finds a Python, makes .venv and installs the pinned requirements into it.
# To be sourced. Sets ROOT (folder of the checkout) and VENV_PYTHON. use_next_stack chooses the newest packages instead.
# install_accelerator adds jax for a GPU or TPU; $ACCELERATOR (cuda, tpu, cpu) decides, otherwise what the machine has.

set -euo pipefail
unset CDPATH # with it, cd prints where it went, and may go elsewhere
CALLED_FROM="$PWD"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
VENV="$ROOT/.venv"
REQUIREMENTS="$ROOT/requirements.txt"
OLDEST=11 # of Python 3

# The newest set of packages, in a virtual environment of its own.
use_next_stack() {
  VENV="$ROOT/.venv-next"
  REQUIREMENTS="$ROOT/requirements-next.txt"
  OLDEST=12
}

fail() {
  echo "error: $*" >&2
  exit 1
}

# from_there PATH: the path, from the folder that the script was called from.
from_there() {
  local path="${1/#\~\//$HOME/}"
  case "$path" in /*) echo "$path" ;; *) echo "$CALLED_FROM/$path" ;; esac
}

# Whether a command is a Python that the packages work on. One that exists may be a stub that fails, so it is run.
is_python() {
  "$1" -c "import sys; sys.exit(not (3, $OLDEST) <= sys.version_info[:2] <= (3, 13))" >/dev/null 2>&1
}

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    candidate="$PYTHON"
    case "$PYTHON" in */*) candidate="$(from_there "$PYTHON")" ;; esac
    is_python "$candidate" || fail "PYTHON=$PYTHON is no Python 3.$OLDEST to 3.13; unset it to have one found"
    echo "$candidate"
    return
  fi
  for candidate in python3 python3.12 python3.13 python3.11 python; do
    if is_python "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  [ "$OLDEST" = 11 ] || fail "no Python 3.12 or 3.13 found, which the newest packages need (set PYTHON=/path/to/python to name one)"
  fail "no Python 3.11, 3.12 or 3.13 found (looked for python3, python3.11, python3.12, python3.13; set PYTHON=/path/to/python to name one)"
}

# install_into_venv STAMP PIP_ARGUMENTS...: installs once per content of the requirement files.
install_into_venv() {
  local name="$1" stamp log
  shift
  stamp="$VENV/.installed-$name"
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$WANTED" ]; then
    return
  fi
  log="$VENV/install.log"
  if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    if grep -qiE "NewConnectionError|Temporary failure|Name or service|Network is unreachable|timed out|Max retries|ConnectionError|from versions: none" "$log"; then
      fail "the packages could not be downloaded: no network, or the package index is not reachable (whole log: $log)"
    fi
    fail "installing the packages failed (whole log: $log)"
  fi
  echo "$WANTED" >"$stamp"
}

make_venv() {
  local python why hint version have
  python="$(find_python)" || exit 1
  VENV_PYTHON="$VENV/bin/python"
  version="import sys; print(*sys.version_info[:2], sep='.')"
  have="$("$VENV_PYTHON" -c "$version" 2>/dev/null)" || have=""
  if [ -n "${PYTHON:-}" ] && [ -n "$have" ] && [ "$have" != "$("$python" -c "$version")" ]; then
    fail "$VENV is of Python $have, not of PYTHON=$PYTHON; remove that folder to have it made anew"
  fi
  # One without pip was interrupted while it was made.
  if ! "$VENV_PYTHON" -c "import pip, sys; sys.exit(not (3, $OLDEST) <= sys.version_info[:2] <= (3, 13))" >/dev/null 2>&1; then
    echo "making $VENV with $("$python" --version)"
    rm -rf "$VENV"
    if ! why="$("$python" -m venv "$VENV" 2>&1)"; then
      rm -rf "$VENV"
      hint=""
      if grep -qiE "ensurepip|No module named venv" <<<"$why"; then hint=" (on Debian and Ubuntu: apt install python3-venv)"; fi
      fail "$python cannot make a virtual environment: $(tail -n 1 <<<"$why")$hint"
    fi
  fi
  WANTED="$ROOT $(cat "$REQUIREMENTS" "$ROOT/pyproject.toml" | cksum)"
  if [ ! -f "$VENV/.installed-base" ] || [ "$(cat "$VENV/.installed-base")" != "$WANTED" ]; then
    echo "installing the packages (a minute or two) ..."
  fi
  install_into_venv base -r "$REQUIREMENTS"
  install_into_venv package --no-deps -e "$ROOT"
  export PYTHONUNBUFFERED=1
}

# The accelerator to install jax for: $ACCELERATOR (cuda, tpu or cpu), otherwise what this machine has.
find_accelerator() {
  local devices="${IDML_DEVICES:-/dev}"
  case "${ACCELERATOR:-}" in
    cuda | tpu | cpu) echo "$ACCELERATOR" ;;
    "")
      if nvidia-smi >/dev/null 2>&1; then
        echo cuda
      elif compgen -G "$devices/accel[0-9]*" >/dev/null || compgen -G "$devices/vfio/[0-9]*" >/dev/null; then
        echo tpu # a TPU VM has one of the two, with a file for each chip
      else
        echo cpu
      fi
      ;;
    *) fail "ACCELERATOR=$ACCELERATOR is unknown; it is cuda, tpu or cpu, and unset it is found out" ;;
  esac
}

# install_accelerator: jax's part for the accelerator, as pip install "idml_jax[cuda]" or "idml_jax[tpu]" would add it.
install_accelerator() {
  local accelerator
  accelerator="$(find_accelerator)" || exit 1
  if [ "$accelerator" = cpu ]; then
    # Also where an earlier start has installed jax for an accelerator.
    if [ "${ACCELERATOR:-}" = cpu ]; then export JAX_PLATFORMS=cpu; fi
    return
  fi
  echo "jax for $accelerator (ACCELERATOR=cpu to do without)"
  install_into_venv "$accelerator" -e "$ROOT[$accelerator]" -c "$REQUIREMENTS"
}
