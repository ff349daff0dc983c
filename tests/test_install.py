"""What installing the package brings with it: no TensorFlow, and nothing that moves what a notebook server has."""

import json
import re
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Like those of a notebook server (Google Colab) at the end of 2025. A run was trained with this set.
COLAB = {
    "jax": "0.7.2", "jaxlib": "0.7.2", "numpy": "2.0.2", "protobuf": "5.29.5", "tensorflow": "2.19.0",
    "tensorboard": "2.19.0", "tensorflow-datasets": "4.9.9", "tensorflow-metadata": "1.17.2",
}  # fmt: skip


def names(requirements):
    return {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in requirements}


def test_tensorflow_is_an_extra_and_pinned_for_the_two_commands():
    assert not {"tensorflow", "tensorflow-cpu", "clu"} & names(PROJECT["dependencies"])
    assert {"tensorflow", "tensorflow-cpu", "clu"} == names(PROJECT["optional-dependencies"]["clu"])
    for file in ("requirements.txt", "requirements-next.txt"):
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
        assert {"tensorflow", "tensorflow-cpu", "clu", "tensorboard"} <= names(lines)
        assert names(PROJECT["dependencies"]) <= names(lines) and all("==" in line for line in lines)


@pytest.mark.slow
def test_pip_leaves_what_a_notebook_server_has(tmp_path):
    try:
        urllib.request.urlopen("https://pypi.org/simple/pip/", timeout=10).close()
    except OSError:
        pytest.skip("PyPI cannot be reached")
    constraints, report = tmp_path / "constraints.txt", tmp_path / "report.json"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in COLAB.items()))
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", report, "-c", constraints]
    done = subprocess.run([sys.executable, "-m", "pip", *words, ROOT, "tensorflow"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = {
        x["metadata"]["name"].lower(): x["metadata"]["version"] for x in json.loads(report.read_text())["install"]
    }
    assert {name: chosen[name] for name in COLAB} == COLAB and "tensorflow-cpu" not in chosen
