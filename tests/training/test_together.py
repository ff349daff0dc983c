"""A folder of a run belongs to one command at a time, and all processes of a run train the same."""

import subprocess
import sys

import pytest
from runs_made import small_config

from idml_jax.errors import UserError
from idml_jax.runtime import files
from idml_jax.training import together, train

HOLDS = """
import sys
from pathlib import Path
from idml_jax.runtime import files
with files.claimed(Path(sys.argv[1]), "is here"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_trains_is_refused_until_that_one_ends(image_folder, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    command = [sys.executable, "-c", HOLDS, str(workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        config = small_config(image_folder, max_steps=1, **{"eval.untrained": False})
        with pytest.raises(UserError, match="another process is training in this folder; use another --workdir"):
            train.train_and_evaluate(config, workdir)
        assert not list(workdir.iterdir())
        other.stdin.close()
        assert other.wait() == 0
    with files.claimed(workdir, "is here"):
        pass


def test_a_file_system_without_locks_is_used_as_it_is(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.claimed(tmp_path, "is here"), files.claimed(tmp_path, "is here"):
        pass


def test_what_processes_must_agree_on(image_folder):
    run = train.build(small_config(image_folder))
    first = together.facts(run)
    assert together.differing(first, first) == []
    assert not any(name in first["config"] for name in ("data.root", "data.threads"))
    changes = {"optim.learning_rate": 0.5, "eval.batch_size": 8, "data.threads": 3}
    other = together.facts(train.build(small_config(image_folder, **changes)))
    assert together.differing(first, other) == [
        f"config.eval.batch_size = {run.config.eval.batch_size} there, 8 here",
        f"config.optim.learning_rate = {run.config.optim.learning_rate} there, 0.5 here",
    ]
    images = {**first["images"], "train": {**first["images"]["train"], "images": 95, "files": "0"}}
    assert together.differing(first, {**first, "images": images}) == ["other train images (96 there, 95 here)"]
    del images["test"]
    assert together.differing(first, {**first, "images": images})[0] == "other test images (96 there, none here)"
