"""Writes the reference of all settings, ``docs/settings.md``, and the help ``idml_jax/training/settings.txt``."""

from pathlib import Path

from idml_jax.training.settings import HELP, as_text, shown, table

PAGE = Path(__file__).resolve().parent / "settings.md"
HEAD = """# Settings

Every setting of a run, with its default. On the command line a setting is `--config.data.image_size=128`, in Python
and in a settings file `config.data.image_size = 128`. An unknown name is refused with the nearest that is known,
and so is a value of another type. A meaning that starts with "or" names the other choices than the default.
`python -m idml_jax.main --help` prints these tables.

Written by `python docs/settings_page.py` from `idml_jax.training.settings`, as is `idml_jax/training/settings.txt`, the
text of `--help`. A test fails if either is out of date.
"""


def page() -> str:
    """The page as Markdown, with a table per group of settings."""
    groups: dict[str, list[str]] = {}
    for setting in table():
        group = setting.name.rpartition(".")[0]
        if not setting.meaning and not setting.choices:
            raise SystemExit(f"config.{setting.name} has no comment in training/config.py")
        choices = ", ".join(f"`{choice}`" for choice in setting.choices)
        meaning = setting.meaning.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        default = shown(setting.default)
        cells = f"`{setting.name}`", f"`{default}`" if default else "empty", choices, meaning
        groups.setdefault(group, []).append(f"| {' | '.join(cells)} |")
    parts = [HEAD]
    for group, rows in sorted(groups.items()):
        title = f"config.{group}" if group else "config"
        parts.append(
            f"## {title}\n\n| setting | default | choices | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    HELP.write_text(as_text() + "\n")
