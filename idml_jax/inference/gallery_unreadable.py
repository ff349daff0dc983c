"""Which images of a gallery's commands cannot be read: each once, as it was found when it was last tried."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from idml_jax.data.tables import is_file_name
from idml_jax.errors import printable
from idml_jax.inference import gallery as reading
from idml_jax.inference import gallery_changes as changes
from idml_jax.inference.gallery import Made, skipped_path
from idml_jax.runtime.files import write_text
from idml_jax.training.digests import FileState, file_state

SKIPPED = "_skipped.txt"


class _Found(NamedTuple):
    """An image that a command could not read.

    Attributes:
      order: the higher, the later it was tried.
      source: number of the command's source.
      reason: why it cannot be read.
      state: its file when that was tried; ``None`` if unknown.
    """

    order: tuple[bool, int, int]
    source: int
    reason: str
    state: FileState | None


def tell_unreadable(folder: Path, sources: Sequence[Made], own: int | None, say: Callable[[str], None]) -> None:
    """Lists the unreadable images of a gallery in ``SKIPPED``, and says how many there are and which is the first.

    An image that several commands could not read counts once, as the last of them found it, and not at all if the
    gallery has it by now.

    Args:
      folder: the gallery.
      sources: its sources, whose parts all exist.
      own: the source of the command that asks, whose images are told apart from those of earlier ones; ``None``: it has
        none.
      say: receives the lines.
    """
    found = _found(folder, sources, own)
    if found and len(sources) > 1:  # another command may have read one since, and added it
        _remove_embedded(found, reading.read_gallery(folder))
    mine: list[tuple[str, str]] = []
    earlier: list[tuple[str, str]] = []
    repaired: list[str] = []
    for name, last in found.items():
        if last[0].source != own and _changed(name, last[0].state):
            repaired.append(name)
            continue
        told = mine if last[0].source == own else earlier
        # A name with "\" is as printed, not as it is.
        gone = is_file_name(name) and "\\" not in name and not os.path.lexists(name)
        reasons = ("its file is gone",) if gone and told is earlier else dict.fromkeys(one.reason for one in last)
        told += [(name, reason) for reason in reasons]
    listing = folder / SKIPPED
    if mine or earlier:
        write_text(listing, "".join(f"{name}\t{reason}\n" for name, reason in (*mine, *earlier)))
    else:
        listing.unlink(missing_ok=True)
    for some, one, many in (
        (mine, "image cannot be read and is left out", "images cannot be read and are left out"),
        (earlier, "image of earlier commands still cannot be read", "images of earlier commands still cannot be read"),
    ):
        if some:
            first = f"{one}, {': '.join(some[0])}" if len(some) == 1 else f"{many}, the first {': '.join(some[0])}"
            say(f"{len(some):,} {first}")
    if mine or earlier:
        say(f"all of them are listed in {listing}")
    if len(repaired) == 1:
        say(f"1 image of earlier commands could not be read and has changed since, {repaired[0]}; --append embeds it")
    elif repaired:
        say(
            f"{len(repaired):,} images of earlier commands could not be read and have changed since, the first "
            f"{repaired[0]}; --append embeds them"
        )


def _found(folder: Path, sources: Sequence[Made], own: int | None) -> dict[str, list[_Found]]:
    """What the last command that tried it found, by the name of the image; several where boxes make several."""
    found: dict[str, list[_Found]] = {}
    for made in sources:
        for number in range(made.parts):
            listed = reading.skipped_images(folder, made, number)
            if not listed:
                continue
            when = skipped_path(folder, made.number, number).stat().st_mtime_ns
            order = made.number == own, when, made.number
            tried = changes.tried(changes.tried_path(folder, made.number, number))
            states = list(tried.values()) if tried is not None and len(tried) == len(listed) else [None] * len(listed)
            for (name, reason), state in zip(listed, states, strict=True):
                one, last = _Found(order, made.number, reason, state), found.get(name)
                if last is not None and last[0].source == one.source:
                    last.append(one)
                elif last is None or last[0].order < order:
                    found[name] = [one]
    return found


def _remove_embedded(found: dict[str, list[_Found]], gallery: reading.Gallery) -> None:
    """Removes images that the gallery has.

    Where boxes make several images of a picture, one of them may be unreadable though others are not; then it stays
    unless its file has changed.
    """
    boxes = "box" in gallery.columns
    for _, names in gallery.names():
        for name in map(printable, names):
            if name in found and (not boxes or _changed(name, found[name][0].state)):
                del found[name]


def _changed(name: str, state: FileState | None) -> bool:
    """Whether there is a file of this name, in another state than this one."""
    now = file_state(name) if is_file_name(name) else None
    return state is not None and now is not None and now != state
