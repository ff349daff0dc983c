"""The launch scripts where they can fail before anything is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def checkout(tmp_path):
    """A copy of what the scripts need, without a .venv."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_no_suitable_python_is_said_plainly(tmp_path, script):
    root = checkout(tmp_path / "checkout")
    tools = tmp_path / "bin"
    tools.mkdir()
    # Only an old Python and the tools that the script itself uses.
    for tool in ("bash", "dirname", "cat", "cksum", "tail", "grep", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    old = tools / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", str(root / "launch" / script)], env={"PATH": str(tools)}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.11, 3.12 or 3.13 found")
    assert not (root / ".venv").exists()


def test_no_network_is_said_plainly(tmp_path):
    root = checkout(tmp_path / "checkout")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") and k != "VIRTUAL_ENV"}
    environment |= {
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    done = subprocess.run(
        ["bash", str(root / "launch" / "quickstart.sh")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "no network" in done.stderr.splitlines()[-1]
    assert not (root / "runs").exists()
