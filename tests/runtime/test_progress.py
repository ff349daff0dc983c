"""Progress in terminals and logs, quiet commands, and completion."""

import io
import logging
import os
import subprocess
import sys

import pytest

from idml_jax import __main__ as commands
from idml_jax import pretrained
from idml_jax.errors import UserError, warn
from idml_jax.runtime import completion, progress


def test_a_line_is_rewritten_where_it_can_be(monkeypatch):
    shown, said = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", shown)
    ticker = progress.Ticker(said.append, live=True)
    ticker.show("3 of 10")
    ticker.show("9")
    ticker.close()
    assert shown.getvalue() == "\r3 of 10\r9      \n" and not said
    ticker = progress.Ticker(said.append, seconds=0, live=False)
    assert ticker.due()
    ticker.show("3 of 10")
    ticker.close()
    assert said == ["3 of 10"]
    assert progress.bar(5, 10, 4) == "[##..]"


def test_other_lines_are_printed_above_the_one_that_is_rewritten(monkeypatch, command_line):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    progress.show_progress()
    assert not progress.is_shown()  # no terminal
    monkeypatch.setattr(progress, "is_live", lambda: True)
    assert progress.is_shown()
    ticker = progress.Ticker(lambda line: None)
    ticker.show("12")
    logging.getLogger("idml_jax").info("loss 1")
    ticker.note("3")
    warn("w")
    progress.tell("t")
    assert shown.getvalue() == "\r12\r  \rloss 1\n\r3\r \rwarning: w\nt\n"


def test_done_speed_and_time_that_remains(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said = []
    done = progress.Progress(100, 20, progress.Ticker(said.append, 5.0, live=False))
    done.add(10)
    now[0] += 10
    done.add(10)
    done.note("is for terminals")
    now[0] += 60
    done.pause(60)
    done.add(20)
    assert said == [
        "[########............] 40 of 100 images, 2/s, 0:30 to go",
        "[############........] 60 of 100 images, 4/s, 0:10 to go",
    ]
    done.restart(done.done)
    now[0] += 10
    done.add(90)
    assert said[-1] == "[####################] 100 of 100 images, 4/s, 0:00 to go" and (done.fresh, done.rate) == (
        40,
        4,
    )


def test_quiet(monkeypatch, capsys):
    monkeypatch.delenv("IDML_JAX_VERBOSITY", raising=False)
    progress.say_next("a")
    assert capsys.readouterr().out == "next: a\n"
    monkeypatch.setenv("IDML_JAX_VERBOSITY", "0")  # restored afterwards
    assert commands._without_verbosity(["embed", "-q", "--out=x"]) == ["embed", "--out=x"]
    progress.tell("b")
    assert capsys.readouterr().out == "" and not progress.Ticker(print, seconds=0, live=False).due()


def test_completion():
    options = completion.options_of("idml_jax.compare")
    assert {"--workdir", "--pairs", "--help"} <= set(options)
    for shell in completion.SHELLS:
        text = completion.script(shell, {"compare": options, "train": ["--config"]})
        assert "compare" in text and "workdir" in text
    with pytest.raises(UserError, match="known are bash, zsh, fish"):
        completion.script("csh", {})


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"]])
def test_a_reader_that_wants_only_the_beginning_sees_no_error(argv, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            commands.main(argv)
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), pipe.fileno())  # what is left of the text goes nowhere
    assert ended.value.code == 1


def test_usage_names_the_command_that_was_typed(monkeypatch, capsys):
    for called, shown in (("idml-jax pretrained", "idml-jax pretrained"), ("x.py", "python -m idml_jax.pretrained")):
        monkeypatch.setattr(sys, "argv", [called, "--help"])
        with pytest.raises(SystemExit):
            pretrained.main()
        assert capsys.readouterr().out.startswith(f"usage: {shown} [-h]")


def test_a_log_goes_on_without_a_reader_that_wanted_only_its_beginning():
    program = (
        "import logging, sys\n"
        "from idml_jax.runtime.progress import show_progress\n"
        "show_progress()\n"
        "for number in range(20000):\n"
        "    logging.getLogger('idml_jax').info('line %d', number)\n"
        "print('done', file=sys.stderr)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"line 0\n"
        started.stdout.close()
        assert started.stderr.read() == b"done\n"
    assert started.returncode == 0
