"""Images that a search leaves out: by a list of files, a pattern of names, or a class."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from idml_jax.data.files import shown
from idml_jax.data.lists import LISTS, listed_paths
from idml_jax.errors import UserError, warn
from idml_jax.inference.index import Index
from idml_jax.runtime.files import without_dots

EXAMPLES = "--exclude=removed.csv, --exclude='*/drafts/*' or --exclude=class=Mallard"


class Rule(NamedTuple):
    """One value of ``--exclude``.

    Attributes:
      given: the value.
      names: names of a list; ``None`` for other rules.
      lines: the names of each line of a list: as it stands, and relative to the list.
      pattern: pattern of names; ``None`` for other rules.
      class_name: a class; ``None`` for other rules.
    """

    given: str
    names: frozenset[str] | None = None
    pattern: re.Pattern[str] | None = None
    class_name: str | None = None
    lines: tuple[tuple[str, str], ...] = ()

    def of_name(self, name: str) -> str | None:
        """The name by which the rule is for this image; ``None`` if it is not."""
        if self.names is not None:
            return next((one for one in (name, without_dots(name)) if one in self.names), None)
        return name if self.pattern is not None and self.pattern.match(name) is not None else None


def parse(values: Sequence[str]) -> list[Rule]:
    """Rules from the values of ``--exclude``.

    A name with the ending of a list is a file of names, one per line as for ``--images`` (relative paths are taken as
    they stand, and relative to the list); ``class=NAME`` is a class; anything else a pattern of file
    names, with ``*`` and ``?``.

    Raises:
      UserError: for an empty value, or a list that cannot be read.
    """
    rules = []
    for given in values:
        if not given:
            raise UserError(f"--exclude is empty; give {EXAMPLES}")
        if given.startswith("class="):
            rules.append(Rule(given, class_name=given.removeprefix("class=")))
        elif Path(given).suffix.lower() in LISTS:
            lines = tuple(listed_paths(given, "--exclude"))
            rules.append(Rule(given, names=frozenset(name for line in lines for name in line), lines=lines))
        else:
            rules.append(Rule(given, pattern=re.compile(fnmatch.translate(given))))
    return rules


def left_out(
    rules: Sequence[Rule],
    names: Iterable[tuple[int, Sequence[str]]],
    labels: Int[np.ndarray, "n"] | Int[np.ndarray, "n l"] | None,
    class_names: Sequence[str] | None,
    rows: int,
    say: Callable[[str], None],
    warn: Callable[[str], None] = warn,
) -> Bool[np.ndarray, "n"]:
    """The rows that the rules leave out, with a line about each rule.

    Args:
      rules: result of ``parse``.
      names: first row and names of the images, batch by batch.
      labels: label of every row, or all of its labels, filled up with -1; ``None``: unknown.
      class_names: names by label.
      rows: number of rows.
      say: receives the lines.
      warn: receives a line about each list with lines that are for no image.

    Raises:
      UserError: if a rule is for no image, names an unknown class, or nothing is left.
    """
    found = np.zeros((len(rules), rows), bool)
    used: list[set[str]] = [set() for _ in rules]
    for first, batch in names:
        for place, name in enumerate(batch, first):
            for number, rule in enumerate(rules):
                if rule.class_name is None and (by := rule.of_name(name)) is not None:
                    found[number, place] = True
                    used[number].add(by)
    for number, rule in enumerate(rules):
        if rule.class_name is not None:
            if labels is None or class_names is None:
                raise UserError(f"--exclude={rule.given}: the classes of the index are unknown")
            known = [label for label, name in enumerate(class_names) if name == rule.class_name]
            found[number] = np.isin(labels, known).reshape(rows, -1).any(axis=1)
        if not found[number].any():
            raise UserError(f"--exclude={rule.given}: no image of the index; give {EXAMPLES}")
        count = int(found[number].sum())
        say(f"--exclude={rule.given}: {count:,} {'image is' if count == 1 else 'images are'} left out")
        if unused := [line[0] for line in rule.lines if used[number].isdisjoint(line)]:
            names = "names" if len(unused) == 1 else "name"
            warn(
                f"--exclude={rule.given}: {len(unused):,} of its {len(rule.lines):,} lines {names} no image of the "
                f"index, the first {shown(unused[0])}"
            )
    whole: Bool[np.ndarray, "n"] = np.asarray(found.any(axis=0))
    if whole.all():
        raise UserError("--exclude leaves out all images of the index")
    return whole


def without(
    index: Index, rules: Sequence[Rule], say: Callable[[str], None], warn: Callable[[str], None] = warn
) -> Bool[np.ndarray, "n"]:
    """The rows of an index in memory that the rules leave out; arguments and errors as for ``left_out``."""
    labels = None if index.class_names is None else index.embedded.every_label
    names = [(0, [str(name) for name in index.files])]
    return left_out(rules, names, labels, index.class_names, len(index), say, warn)


def kept(
    index: Index, gone: Bool[np.ndarray, "n"], own: Int[np.ndarray, "q"] | None
) -> tuple[Index, Int[np.ndarray, "q"] | None]:
    """The index without some rows, and the queries' own rows in it (-1 where they are gone)."""
    less = index.take(np.flatnonzero(~gone))
    if own is None:
        return less, None
    new = np.where(gone, -1, np.cumsum(~gone) - 1)
    own = np.where(own >= 0, new[np.maximum(own, 0)], -1)
    return less, own if (own >= 0).any() else None
