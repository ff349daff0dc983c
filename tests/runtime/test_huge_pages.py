"""When a command starts itself again with huge pages, and that it is then the same command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idml_jax.runtime import huge_pages

NEW = (2, 36)


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    return file


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    return folder


def test_a_cpu_gains_unless_the_user_or_the_kernel_has_chosen(kernel: Path, devices: Path) -> None:
    useful = lambda environment, glibc=NEW: huge_pages.useful(environment, glibc, kernel, devices)
    assert useful({})
    assert useful({"JAX_PLATFORMS": "cpu"})
    assert not useful({"JAX_PLATFORMS": "cuda"})
    assert not useful({"GLIBC_TUNABLES": ""})
    assert not useful({}, (2, 31))
    assert not useful({}, None)
    for chosen in ("[always] madvise never", "always madvise [never]"):
        kernel.write_text(chosen)
        assert not useful({})
    kernel.unlink()
    assert not useful({})


@pytest.mark.parametrize("file", ["nvidia0", "accel0", "vfio/0", "kfd"])
def test_an_accelerator_computes_unless_the_user_says_cpu(kernel: Path, devices: Path, file: str) -> None:
    (devices / file).parent.mkdir(exist_ok=True)
    (devices / file).touch()
    assert not huge_pages.useful({}, NEW, kernel, devices)
    assert huge_pages.useful({"JAX_PLATFORMS": "cpu"}, NEW, kernel, devices)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("python -m idml_jax.main --workdir=x", True),
        ("python -m idml_jax train", True),
        ("python -W error -Xdev -OO -um idml_jax.fit --config=folder", True),
        ("python -midml_jax.embed", True),
        ("python /usr/bin/idml-jax train --workdir=x", True),
        ("python -u .venv/bin/idml-jax embed", True),
        ("python -", False),
        ("python", False),
        ("python script.py -m idml_jax.main", False),
        ("python -c print() -m idml_jax.main", False),
        ("python -m cProfile -m idml_jax.main", False),
        ("python -m IPython", False),
        ("python -m idml_jax_more.main", False),
    ],
)
def test_only_a_command_of_its_own_starts_again(words: str, expected: bool) -> None:
    """A script or a shell that runs one would lose what it has done."""
    assert huge_pages.is_command(words.split()) is expected


SCRIPT = """
import json, os, sys
from pathlib import Path
from idml_jax.runtime import huge_pages
huge_pages.useful.__defaults__ = (Path(sys.argv[1]), Path(sys.argv[2]))
huge_pages._glibc = lambda: (2, 36)
huge_pages.is_command = lambda words: True
print("started", flush=True)
huge_pages.start_again()
print(json.dumps([os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), sys.flags.optimize, sys.prefix]))
"""


@pytest.mark.skipif(not hasattr(os, "execve") or sys.platform != "linux", reason="for Linux")
def test_the_command_starts_once_more_with_the_same_process_and_arguments(kernel: Path, devices: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "COVERAGE_PROCESS_START")}
    given = [str(kernel), str(devices), "--name=a b", "", "ü"]
    process = subprocess.Popen(
        [sys.executable, "-O", "-c", SCRIPT, *given],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert lines[:2] == ["started", "started"]
    assert len(lines) == 3
    assert json.loads(lines[2]) == [process.pid, given, huge_pages.VALUE, 1, sys.prefix]


def test_help_and_debuggers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    monkeypatch.setattr(os, "execve", lambda *given: ran.append(given))
    monkeypatch.setattr(huge_pages, "useful", lambda *given: True)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "idml_jax.main"])
    monkeypatch.setattr(sys, "argv", ["main.py", "--workdir=-h"])
    huge_pages.start_again()
    assert len(ran) == 1
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    huge_pages.start_again()
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-"])
    huge_pages.start_again()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "idml_jax.main"])
    monkeypatch.setitem(sys.modules, "debugpy", sys)
    huge_pages.start_again()
    assert len(ran) == 1
