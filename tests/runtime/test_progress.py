"""Progress in terminals and logs, quiet commands, and completion."""

import io
import sys

import pytest

from idml_jax import __main__ as commands
from idml_jax.errors import UserError
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
