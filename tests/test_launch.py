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


# Stands for the Python of a .venv: notes what pip is asked for.
PIP_STUB = '#!/bin/sh\n[ "$2" = pip ] && echo "$@" >>"$PIP_LOG"\nexit 0\n'


@pytest.mark.parametrize(
    "given,smi,device,wanted",
    [
        ("", 0, None, "cuda"),
        ("", 9, None, "cpu"),  # a driver that is broken
        ("", None, None, "cpu"),
        ("", None, "accel0", "tpu"),
        ("", None, "vfio/1", "tpu"),
        ("", None, "vfio/vfio", "cpu"),
        ("", None, "accel/accel0", "cpu"),  # Linux's folder for accelerators of other kinds
        ("cpu", 0, None, "cpu"),
        ("tpu", 0, None, "tpu"),
        ("cuda", None, None, "cuda"),
        ("gpu", 0, None, "error: ACCELERATOR=gpu is unknown; it is cuda, tpu or cpu"),
    ],
)
def test_jax_is_installed_for_the_accelerator_of_the_machine(tmp_path, given, smi, device, wanted):
    root, tools, devices = checkout(tmp_path / "checkout"), tmp_path / "bin", tmp_path / "dev"
    for folder in (tools, devices, root / ".venv" / "bin"):
        folder.mkdir(parents=True)
    for tool in ("bash", "cat", "cksum", "dirname", "rm", "tail", "grep"):
        (tools / tool).symlink_to(shutil.which(tool))
    stubs = {root / ".venv" / "bin" / "python": PIP_STUB, tools / "python3": PIP_STUB}
    if smi is not None:
        stubs[tools / "nvidia-smi"] = f"#!/bin/sh\nexit {smi}\n"
    for path, text in stubs.items():
        path.write_text(text)
        path.chmod(0o755)
    if device:
        (devices / device).parent.mkdir(exist_ok=True)
        (devices / device).touch()
    log = tmp_path / "pip.log"
    twice = "install_accelerator; install_accelerator"
    line = f"source launch/common.sh; make_venv; {twice}; echo platforms=${{JAX_PLATFORMS:-}}"
    environment = {"PATH": str(tools), "PIP_LOG": str(log), "IDML_DEVICES": str(devices), "ACCELERATOR": given}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, cwd=root)
    extras = [words for words in log.read_text().splitlines() if "checkout[" in words]
    if wanted.startswith("error"):
        assert done.returncode == 1 and done.stderr.startswith(wanted) and done.stderr.count("\n") == 1 and not extras
        return
    assert done.returncode == 0, done.stderr
    assert f"platforms={given if given == 'cpu' else ''}\n" in done.stdout
    if wanted == "cpu":
        assert not extras
    else:  # once, although asked twice
        (words,) = extras
        assert words.endswith(f"-e {root}[{wanted}] -c {root}/requirements.txt")


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
    for tool in ("bash", "sed", "cat", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    return str(tools)


@pytest.mark.parametrize(
    "command,expected",
    [
        ("create", ["tpu-vm create n --zone z --accelerator-type v4-32 --version", "--spot"]),
        ("install", [f"git -C {ROOT} archive", "tpu-vm scp", "--worker=all", "pip"]),
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


GCLOUD = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  *describe*) echo "$(cat "$STATE")" ;;
  *scp*) [ "${SCP:-0}" = 0 ] || exit "$SCP" ;;
  *"test -e"*) [ -e "$RESULT" ] ;;
  *"tail -n 1"*) cat "$LOG" ;;
  *idml_jax.main*) touch "$RESULT" ;;
  *create*) echo READY >"$STATE" ;;
esac
"""


@pytest.mark.parametrize(
    "state, log, scp, code, message, calls",
    [
        ("PREEMPTED", "", 0, 0, "finished: /mnt/idml/run/result.json", ["delete", "create", "scp", "idml_jax.main"]),
        ("GONE", "no log", 1, 1, "error: installing on the workers has failed three times", ["create", *["scp"] * 3]),
        ("READY", "no log", 0, 0, "finished: /mnt/idml/run/result.json", ["scp", "idml_jax.main"]),
        ("READY", "exit code 75", 0, 0, "finished: /mnt/idml/run/result.json", ["idml_jax.main"]),
        ("READY", "exit code 1", 0, 1, "error: the run ended with exit code 1", []),
    ],
)
def test_a_run_on_a_tpu_goes_on_or_ends_with_the_reason(tmp_path, state, log, scp, code, message, calls):
    """With a stand-in for gcloud."""
    tools = Path(without_tools(tmp_path))
    for tool in ("touch", "tail", "git", "sleep"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "gcloud").write_text(GCLOUD)
    (tools / "gcloud").chmod(0o755)
    paths = {name: str(tmp_path / name) for name in ("STATE", "LOG", "RESULT", "CALLS")}
    for name, text in (("STATE", state), ("LOG", log), ("CALLS", "")):
        Path(paths[name]).write_text(text)
    words = ["resume", "--", "--config=configs/cub200.py"]
    done = call("tpu_vm.sh", *words, path=str(tools), SECONDS_BETWEEN="0", SCP=str(scp), **paths)
    assert done.returncode == code, done.stderr
    output = done.stderr if code else done.stdout
    assert message in output
    known = ("delete", "create", "scp", "idml_jax.main")
    made = [next(name for name in known if name in line) for line in Path(paths["CALLS"]).read_text().splitlines()
            if any(name in line for name in known) and "python3 -m venv" not in line]  # fmt: skip
    assert made == calls


def test_a_virtual_environment_without_pip_is_made_anew(tmp_path):
    """As it is left by Ctrl-C, or where ensurepip is missing, which is then said on every start."""
    root, tools = checkout(tmp_path / "checkout"), tmp_path / "bin"
    (root / ".venv" / "bin").mkdir(parents=True)
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "dirname", "rm", "tail", "grep"):
        (tools / tool).symlink_to(shutil.which(tool))
    (root / ".venv" / "bin" / "python").write_text('#!/bin/sh\ncase "$*" in *pip*) exit 1 ;; esac\n')
    (tools / "python3").write_text('#!/bin/sh\ncase "$*" in *venv*) echo ensurepip is not available; exit 1 ;; esac\n')
    for path in (root / ".venv" / "bin" / "python", tools / "python3"):
        path.chmod(0o755)
    for _ in range(2):
        line = ["bash", "-c", "source launch/common.sh; make_venv"]
        done = subprocess.run(line, env={"PATH": str(tools)}, capture_output=True, text=True, cwd=root)
        assert done.returncode == 1 and not (root / ".venv").exists()
        assert "ensurepip is not available (on Debian and Ubuntu: apt install python3-venv)" in done.stderr


@pytest.mark.parametrize(
    "words, accelerator, told",
    [
        (["--photos", "FOLDER"], "", "error: write --photos=FOLDER, with a folder per class\n"),
        (["--photos="], "", "error: write --photos=FOLDER, with a folder per class\n"),
        (["--config.epochs=2", "--photos"], "", "error: write --photos=FOLDER, with a folder per class\n"),
        (["--workdir", "x"], "", "error: write --workdir=FOLDER, the folder of the run\n"),
        (["photos"], "", "error: unexpected argument photos; settings are given as --config.name=value\n"),
        ([], "gpu", "error: ACCELERATOR=gpu is unknown; it is cuda, tpu or cpu, and unset it is found out\n"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_installed(tmp_path, words, accelerator, told):
    root = checkout(tmp_path / "checkout")
    done = subprocess.run(
        ["bash", str(root / "launch" / "quickstart.sh"), *words],
        env={**os.environ, "ACCELERATOR": accelerator}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, told)
    assert not (root / ".venv").exists()


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


def quickstart_with_stubs(tmp_path, *words, command="exit 0", **environment):
    """Runs quickstart.sh with a stand-in for the Python of .venv, which notes its arguments and runs `command`."""
    root = tmp_path / "checkout"
    if not root.exists():
        checkout(root)
        (root / ".venv" / "bin").mkdir(parents=True)
    stub = root / ".venv" / "bin" / "python"
    stub.write_text(f'#!/bin/bash\ncase "$2" in idml_jax*) echo "$@" >>"$CALLS"; {command} ;; esac\nexit 0\n')
    stub.chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    done = subprocess.run(
        ["bash", str(root / "launch" / "quickstart.sh"), *words],
        env={**os.environ, "ACCELERATOR": "cpu", "CALLS": str(calls), **environment},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    return done, calls.read_text().splitlines()


# The training command as a stub: its --workdir gets what a run writes.
WRITES = 'for word in "$@"; do case "$word" in --workdir=*) D="${word#*=}" ;; esac; done; '


class TestQuickstart:
    """With a stand-in for Python."""

    def finished(self, tmp_path, name="quickstart"):
        checkout(tmp_path / "checkout")
        (tmp_path / "checkout" / ".venv" / "bin").mkdir(parents=True)
        run = tmp_path / "checkout" / "runs" / name
        run.mkdir(parents=True)
        for file in ("config.json", "result.json", "photos.npz"):
            (run / file).write_text("of the earlier run")
        return run

    @pytest.mark.parametrize("words", [["--config.epoch=3"], ["--photos=PHOTOS", "--typo"]])
    def test_a_finished_run_stays_where_the_new_one_does_not_start(self, tmp_path, words):
        run = self.finished(tmp_path, "photos" if len(words) > 1 else "quickstart")
        (tmp_path / "PHOTOS").mkdir()
        done, calls = quickstart_with_stubs(tmp_path, *words, command="echo error: no such setting >&2; exit 1")
        assert done.returncode == 1 and len(calls) == 1 and done.stderr == "error: no such setting\n"
        assert sorted(path.name for path in run.iterdir()) == ["config.json", "photos.npz", "result.json"]
        assert (run / "result.json").read_text() == "of the earlier run"
        assert [path.name for path in run.parent.iterdir()] == [run.name]

    def test_it_makes_room_when_the_new_one_is_finished(self, tmp_path):
        run = self.finished(tmp_path)
        begins = f'{WRITES} [ -e "$D" ] || {{ mkdir -p "$D"; echo new >"$D/config.json"; exit 130; }}; '
        done, _ = quickstart_with_stubs(tmp_path, command=begins)
        earlier = run.with_name("quickstart.earlier")
        assert done.returncode == 130 and (earlier / "result.json").exists()
        assert [path.name for path in run.iterdir()] == ["config.json"]
        done, calls = quickstart_with_stubs(tmp_path, command=f'{WRITES} echo new >"$D/result.json"')
        assert done.returncode == 0 and not earlier.exists() and (run / "result.json").read_text() == "new\n"
        assert calls[-1] == f"-m idml_jax.report --workdir={run}"

    def test_another_workdir_is_used_throughout(self, tmp_path):
        run = self.finished(tmp_path)
        (tmp_path / "my photos").mkdir()
        for more in ([], ["--photos=my photos"]):
            done, calls = quickstart_with_stubs(tmp_path, "--workdir=my run", "--config.seed=1", *more)
            assert done.returncode == 0, done.stderr
            assert len(calls) == (3 if more else 2)
            assert all(f"--workdir={tmp_path}/my run" in call for call in calls)
            assert "--config.seed=1" in calls[0] and "my run" not in str(list((run.parent).iterdir()))
        assert (run / "result.json").exists()

    def test_help_says_how_it_is_used_and_does_nothing(self, tmp_path):
        self.finished(tmp_path)
        done, calls = quickstart_with_stubs(tmp_path, "--config.epochs=1", "--help")
        assert done.returncode == 0 and not calls and "--photos=FOLDER" in done.stdout
        assert "#" not in done.stdout and "STARTED_IN" not in done.stdout

    def test_cdpath_does_not_lead_elsewhere(self, tmp_path):
        checkout(tmp_path / "checkout")
        (tmp_path / "checkout" / ".venv" / "bin").mkdir(parents=True)
        done, calls = quickstart_with_stubs(tmp_path, CDPATH=f"{ROOT}:.")
        assert done.returncode == 0, done.stderr
        assert calls[-1] == f"-m idml_jax.report --workdir={tmp_path}/checkout/runs/quickstart"


@pytest.mark.parametrize(
    "given, message",
    [
        ("/nowhere/python", "PYTHON=/nowhere/python is no Python 3.11 to 3.13"),
        ("./nothing", "PYTHON=./nothing is no Python 3.11 to 3.13"),
        ("here/python", ""),
    ],
)
def test_a_named_python_is_used_or_refused(tmp_path, given, message):
    root = checkout(tmp_path / "checkout")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "python").write_text('#!/bin/sh\ncase "$*" in *venv*) echo made with me; exit 1 ;; esac\n')
    (tmp_path / "here" / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", str(root / "launch" / "test.sh")],
        env={**os.environ, "PYTHON": given}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    if message:
        assert done.stderr.startswith(f"error: {message}; unset it to have one found")
    else:  # found from the folder of the caller; no hint at a package that is not missing
        assert done.stderr == f"error: {tmp_path}/here/python cannot make a virtual environment: made with me\n"
