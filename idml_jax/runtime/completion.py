"""Completion of the command line for bash, zsh and fish."""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Mapping

from idml_jax.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def options_of(module: str) -> list[str]:
    """The options that the help of a command names."""
    text, before = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(module).main()
    finally:
        sys.argv = before
    found = re.findall(r"(?<![\w-])--[A-Za-z][\w.]*", text.getvalue())
    return sorted({*found, "--help"})


def script(shell: str, commands: Mapping[str, list[str]]) -> str:
    """The script that completes commands and their options.

    Args:
      shell: one of ``SHELLS``.
      commands: the options of each command.

    Raises:
      UserError: for another shell.
    """
    if shell not in SHELLS:
        raise UserError(f"completion {shell}: known are {', '.join(SHELLS)}")
    names = " ".join(commands)
    if shell == "fish":
        lines = [f"complete -c idml-jax -n __fish_use_subcommand -f -a '{names}'"]
        for name, options in commands.items():
            seen = f"'__fish_seen_subcommand_from {name}'"
            lines += [f"complete -c idml-jax -n {seen} -l '{option.removeprefix('--')}'" for option in options]
        return "\n".join(lines)
    cases = "\n".join(f'    {name}) words="{" ".join(options)}" ;;' for name, options in commands.items())
    start = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{start}_idml_jax() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words="{names}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -gt 1 ]; then
    words=""
    [ "${{word#-}}" = "$word" ] && return  # a file, by the shell's default
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _idml_jax idml-jax"""
