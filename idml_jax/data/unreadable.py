"""Images that cannot be read: found before training starts, and what is wrong with each."""

import concurrent.futures
from collections.abc import Callable, Sequence

import numpy as np

from idml_jax.data.files import shown
from idml_jax.data.images import transforms
from idml_jax.data.sources import FolderSource, Source, Subset, box_of, key_of
from idml_jax.errors import UserError
from idml_jax.runtime import cpus

_NAMED = 5  # images in a line


def reason_of(source: Source, index: int, error: Exception) -> str:
    """What is wrong with an image, without its name, with which the message of an unusable file begins."""
    reason = str(error)
    for name in dict.fromkeys((source.name(index), key_of(source, index))):
        reason = reason.removeprefix(f"{shown(name)}: ")
    return reason


def drop_unreadable(source: FolderSource, on_corrupt: str, warn: Callable[[str], None]) -> FolderSource | Subset:
    """Finds files that are not readable images before training starts.

    Args:
      source: files to check.
      on_corrupt: ``refuse`` checks size, header and end of every file and raises if one is bad; ``skip`` decodes every
        file, drops the bad ones, counts them and names up to 5.
      warn: receives one line about skipped files.

    Returns:
      The source without the bad files.

    Raises:
      UserError: naming bad files, under ``refuse``; if nothing readable is left, under ``skip``.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise UserError(f"config.data.on_corrupt = {on_corrupt!r}; known: refuse, skip")
    check = transforms.decode if on_corrupt == "skip" else transforms.check_whole

    def problem(index: int) -> str | None:
        try:
            data, box = source.read(index), box_of(source, index)
            check(data)
            if box is not None:
                transforms.Picture(data, within=box)
        except (transforms.DecodeError, UserError) as error:
            return reason_of(source, index, error)
        return None

    with concurrent.futures.ThreadPoolExecutor(min(8, cpus.available())) as pool:
        problems = list(pool.map(problem, range(len(source))))
    bad = [i for i, p in enumerate(problems) if p is not None]
    if not bad:
        return source
    told = [f"{shown(source.name(i))}: {problems[i]}" for i in bad]
    if on_corrupt == "refuse":
        more = f" (and {len(bad) - 1:,} more file{'s' * (len(bad) > 2)})" if len(bad) > 1 else ""
        raise UserError(f"{told[0]}{more}; config.data.on_corrupt=skip leaves such files out")
    if len(bad) == len(source):
        raise UserError(f"none of {len(source):,} files is a readable image; the first: {told[0]}")
    are = "is not a readable image and is" if len(bad) == 1 else "are not readable images and are"
    warn(f"{len(bad):,} of {len(source):,} files {are} left out: {_some(told)}")
    return Subset(source, np.setdiff1d(np.arange(len(source)), bad))


def _some(told: Sequence[str]) -> str:
    """The first few of what is told, and the number of the others."""
    return "; ".join([*told[:_NAMED], *([f"and {len(told) - _NAMED:,} more"] if len(told) > _NAMED else [])])
