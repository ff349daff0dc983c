"""Failures of the launch scripts before anything is installed."""

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
def test_a_missing_python_is_reported(tmp_path, script):
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


def test_a_missing_network_is_reported(tmp_path):
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


def call(script, *words, path=os.environ["PATH"], **environment):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *words],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def without_tools(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "sed", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    return str(tools)


@pytest.mark.parametrize(
    "command,expected",
    [
        ("create", ["tpu-vm create n --zone z --accelerator-type v4-32 --version", "--spot"]),
        ("install", ["git archive", "tpu-vm scp", "--worker=all", "pip"]),
        ("run", ["--worker=all", "--coordinator=auto", "--workdir=/mnt/idml/run", "--config=configs/cub200.py"]),
        ("logs", ["--worker=0", "tail"]),
        ("resume", ["PREEMPTED", "tpu-vm delete n", "tpu-vm create n", "tpu-vm scp", "--coordinator=auto"]),
        ("delete", ["tpu-vm delete n --zone z --quiet"]),
    ],
)
def test_tpu_vm_says_what_it_would_do(tmp_path, command, expected):
    done = call(
        "tpu_vm.sh",
        command,
        "--dry-run",
        "--",
        "--config=configs/cub200.py",
        path=without_tools(tmp_path),
        NAME="n",
        ZONE="z",
        TYPE="v4-32",
    )
    assert done.returncode == 0, done.stderr
    rest = done.stdout.replace("\\", "")
    for text in expected:
        assert text in rest, (text, done.stdout)
        rest = rest[rest.index(text) :]


@pytest.mark.parametrize(
    "words,message",
    [
        (["fly"], "unknown command fly; known: create"),
        (["run", "--dry-run"], "no settings"),
        (["create", "--dryrun"], "unknown argument --dryrun"),
        (["create"], "gcloud is not installed"),
    ],
)
def test_tpu_vm_refuses_in_one_line(tmp_path, words, message):
    done = call("tpu_vm.sh", *words, path=without_tools(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_slurm_says_what_it_would_do_and_queues_again_after_75(tmp_path):
    words = ["--config=configs/cub200.py", "--workdir=/shared/run"]
    done = call("slurm.sbatch", *words, DRY_RUN="1", SLURM_JOB_NUM_NODES="2", path=without_tools(tmp_path))
    assert done.returncode == 0 and "idml_jax.main --coordinator=auto --config=configs/cub200.py" in done.stdout
    done = call("slurm.sbatch", *words, DRY_RUN="1", path=str(tmp_path / "bin"))
    assert "--coordinator" not in done.stdout
    # With tools that only note how they were called.
    for tool, code in (("srun", 75), ("scontrol", 0)):
        (tmp_path / "bin" / tool).write_text(f'#!/bin/bash\necho "{tool} $*"\nexit {code}\n')
        (tmp_path / "bin" / tool).chmod(0o755)
    done = call("slurm.sbatch", *words, SLURM_JOB_ID="7", path=str(tmp_path / "bin"))
    assert done.returncode == 75 and "scontrol requeue 7" in done.stdout
    assert call("slurm.sbatch", path=str(tmp_path / "bin")).returncode == 2


def test_the_image_has_what_it_copies_and_gets_the_signals():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    for line in text.splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1]), line
    assert 'ENTRYPOINT ["python", "-m", "idml_jax.main"]' in text and "USER idml" in text


def test_a_missing_folder_of_photographs_is_reported_before_anything_is_installed(tmp_path):
    root = checkout(tmp_path / "checkout")
    done = subprocess.run(
        ["bash", str(root / "launch" / "quickstart.sh"), "--photos=nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (1, "error: --photos=nowhere: no such folder\n")
    assert not (root / ".venv").exists()
