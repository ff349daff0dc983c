"""The encoded images of an index: from the data of its run, from the table that holds them, or from their files."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from idml_jax.data import tables
from idml_jax.data.sources import Source, box_of
from idml_jax.errors import UserError
from idml_jax.inference import embed
from idml_jax.inference import model as trained
from idml_jax.inference.index import Index

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
# Gives the bytes of a picture, or None where they are not to be found; called with its name, and with the box of the
# part that is the image, if it is not all of it.
Encoded = Callable[..., bytes | None]


def encoded_reader(index: Index, workdir: str) -> Encoded:
    """A function from the name of a row, and its box, to the bytes of its picture.

    A run's own images are read from its data, wherever its settings say that they are now, and images that are stored
    in a table from that.
    """
    source = _source_of(index, workdir)
    # Images of a table may have one name; they are told apart by their boxes, or not at all.
    records: dict[tuple[str, Box | None], int | None] = {}
    for record in range(0 if source is None else len(source)):
        assert source is not None
        key = source.name(record), box_of(source, record)
        records[key] = None if key in records else record

    @functools.cache
    def moved() -> dict[str, str]:
        names = [] if source is None else [source.name(record) for record in range(len(source))]
        return moved_to([str(file) for file in index.files], names)

    def read(file: str, box: Box | None = None) -> bytes | None:
        record = records.get((file, box))
        if record is None and (file, box) not in records and not os.path.isfile(file):
            record = records.get((moved().get(file, file), box))
        if source is not None and record is not None:
            return source.read(record)
        # A file from elsewhere may hold any name.
        return Path(file).read_bytes() if os.path.isfile(file) else None

    return read


def _source_of(index: Index, workdir: str) -> Source | None:
    """The images of the run's split or of the table that an index was made of; ``None``: of files."""
    origin = str(index.about.get("images", ""))
    split = origin.partition("split:")[2]
    if split in embed.SPLITS:
        trained.check_there(workdir)
        return embed.split_source(trained.load(workdir), split, checked=False)
    if tables.is_saved_set(Path(origin)) or (origin.lower().endswith(".parquet") and os.path.isfile(origin)):
        with contextlib.suppress(UserError):  # it has changed since, or holds no images
            source = embed.list_images(origin, "--index", warn=lambda line: None)[0]
            return source if _has_its_classes(source, index) else None
    return None


def _has_its_classes(source: Source, index: Index) -> bool:
    """Whether the rows of a table have the classes that they had when they were embedded."""
    known = {source.name(record): record for record in range(len(source))}
    if index.class_names is None or index.embedded.sets is not None or not source.class_names:
        return True
    pairs = [(row, known[name]) for row, name in enumerate(map(str, index.files)) if name in known]
    return all(index.class_of(row) == str(source.class_names[source.labels[record]]) for row, record in pairs)


def moved_to(files: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Where the files of an index are now, if the images of its run were moved together; by the old name.

    Args:
      files: absolute names in the index.
      names: names of the run's images, where its settings say that they are.
    """
    if not names or not all(map(os.path.isabs, names)):
        return {}
    common = os.path.commonpath([os.path.dirname(name) for name in names])
    inner = {os.path.relpath(name, common): name for name in names}
    # Every folder that the images may have been in, with the files that are found from there.
    found: dict[str, dict[str, str]] = {}
    for file in files:
        parts = file.split("/")
        for place in range(1, len(parts)) if os.path.isabs(file) else ():
            if (name := inner.get("/".join(parts[place:]))) is not None:
                found.setdefault("/".join(parts[:place]), {})[file] = name
    return max(found.values(), key=len, default={})
