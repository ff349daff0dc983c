"""The one command line, ``idml-jax COMMAND``, and the help of every command."""

import subprocess
import sys
import types

import pytest

import idml_jax
from idml_jax import __main__ as commands
from idml_jax import embed
from idml_jax import main as main_lib
from idml_jax.runtime import interrupt


def test_help_version_and_unknown_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"idml-jax {name} {c.example}" in text for name, c in commands.COMMANDS.items())
    commands.main(["--version"])
    assert capsys.readouterr().out == f"idml_jax {idml_jax.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        commands.main(["trian"])
    assert stop.value.code == 2 and "did you mean 'train'?" in capsys.readouterr().err


def test_the_start_loads_nothing_heavy():
    code = (
        "import sys; from idml_jax.__main__ import main, COMMANDS; main(['--version']);"
        "print([m for m in ('jax', 'numpy', 'absl', 'argparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[1:] == ["[]"], done.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_calls_its_module(name, monkeypatch):
    seen = []
    command = commands.COMMANDS[name]
    stub = types.SimpleNamespace(main=lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["idml-jax"])
    monkeypatch.setattr(interrupt, "end_when_asked", lambda: None)
    monkeypatch.setattr(commands.importlib, "import_module", lambda path: seen.append(path) or stub)
    commands.main([name, "--workdir=x"])
    assert seen == [f"idml_jax.{command.module}", [f"idml-jax {name}", "--workdir=x", *command.extra]]


def test_help_names_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "number of reader and decoder threads (default: 4)" in text
    assert "batch size (default" not in text  # named in its own words


def test_help_of_training_shows_flags_and_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        main_lib.parse(["main", "--config=glyphs", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--workdir " in text and "--config.data.image_size=224\n" in text and "avg_max | gem" in text


@pytest.mark.parametrize(
    "words", [["--mode=train"], ["--mode", "train"], ["-mode", "train"], ["--mode=eval", "--config.x=1"]]
)
def test_a_run_brings_its_own_settings(tmp_path, words):
    (tmp_path / "config.json").write_text("{}")
    for folder in ([f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)]):
        changed = main_lib._with_path(["main", *words, *folder])
        assert changed[1].endswith(f"of_run.py:{tmp_path}") and changed[2:] == [*words, *folder]
    assert main_lib._with_path(["main", "--mode", "eval", f"--workdir={tmp_path}"])[1:] == [
        "--mode",
        "eval",
        f"--workdir={tmp_path}",
    ]


def test_settings_may_come_before_the_file_that_they_change():
    changed = main_lib._with_path(["main", "--workdir=w", "--config.seed=3", "--config", "glyphs:quick", "--mode=eval"])
    assert changed[0] == "main" and changed[1].endswith("glyphs.py:quick") and changed[1].startswith("--config=")
    assert changed[2:] == ["--workdir=w", "--config.seed=3", "--mode=eval"]
