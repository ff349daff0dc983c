"""A random-access interface to images from any origin."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from idml_jax.data import files, folders, tables
from idml_jax.data.images.decode import ENDINGS
from idml_jax.errors import UserError


class Source(Protocol):
    """Random access to encoded images.

    Attributes:
      labels: ``[n]`` int32, consecutive from 0.
      class_names: name of every label.
      fields: additional values per image, e.g. the true ``ambiguity`` of the glyphs, each ``[n, ...]``.
    """

    @property
    def labels(self) -> Int[np.ndarray, "n"]: ...
    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def fields(self) -> dict[str, np.ndarray]: ...

    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes:
        """The encoded image."""
        ...

    def name(self, index: int) -> str:
        """Name of the image in messages: its path, or its data set, split and record."""
        ...


def key_of(source: Source, index: int) -> str:
    """Identifier of an image, found without reading it; its name if the source has no ``key``."""
    return getattr(source, "key", source.name)(index)


def movable_names(keys: Sequence[str]) -> list[str]:
    """Identifiers that do not change if the data is moved as a whole: paths are relative to their common folder."""
    if len(keys) < 2 or not all(os.path.isabs(key) for key in keys):
        return list(keys)
    common = os.path.commonpath(keys)
    return [os.path.relpath(key, common) for key in keys]


class FolderSource:
    """Image files with labels.

    Args:
      paths: their paths.
      labels: ``[n]``, consecutive from 0.
      class_names: name of every label.
      fields: additional values per image; see ``lists.source_of`` for those of tables.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Int[np.ndarray, "n"],
        class_names: Sequence[str],
        fields: Mapping[str, np.ndarray] | None = None,
    ):
        self.paths, self.class_names = list(paths), list(class_names)
        self.labels = np.asarray(labels, np.int32)
        self.fields: dict[str, np.ndarray] = dict(fields or {})

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return files.read_file(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def key(self, index: int) -> str:
        return self.paths[index]


class Stored(Protocol):
    """Encoded images in a table."""

    def read(self, row: int) -> bytes | None:
        """The image of a row; ``None`` if only its path is stored."""
        ...


class StoredSource(FolderSource):
    """Images that are stored in a table, or named by it, with labels; ``fields["row"]`` are their rows."""

    def __init__(
        self,
        paths: Sequence[str],
        labels: Int[np.ndarray, "n"],
        class_names: Sequence[str],
        fields: Mapping[str, np.ndarray],
        stored: Stored,
    ):
        super().__init__(paths, labels, class_names, fields)
        self._stored = stored

    def read(self, index: int) -> bytes:
        try:
            data = self._stored.read(int(self.fields["row"][index]))
        except files.FileError:
            raise
        except Exception as error:  # a damaged file can make the library raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise files.FileError(f"{files.shown(self.paths[index])}: cannot be read ({reason[:200]})") from error
        name = self.paths[index]
        if data == b"" or (data is None and not os.path.exists(name) and tables.row_of_a_table(name) is not None):
            raise files.FileError(f"{files.shown(name)}: its cell of the table is empty, so there is no image")
        return super().read(index) if data is None else data


def box_of(source: Source, index: int) -> tuple[int, int, int, int] | None:
    """The part of a picture that is the image: left, top, right, bottom in pixels; ``None``: all of it."""
    boxes = getattr(source, "fields", {}).get("box")
    if boxes is None or not boxes[index].any():
        return None
    left, top, right, bottom = boxes[index].tolist()
    return left, top, right, bottom


def sets_of(source: Source) -> Int[np.ndarray, "n l"] | None:
    """All labels of each image, filled up with -1, if there are images with several; otherwise ``None``."""
    return getattr(source, "fields", {}).get("labels")


class TfdsSource:
    """A split of a tfds data set stored as array_record; reading it does not need TensorFlow.

    Args:
      records: sequence of dictionaries with the encoded ``image``, and the file name if ``file_key`` is given.
      name: name for messages, e.g. ``cub/test``.
      class_names: name of every label.
      labels: ``[n]``, consecutive from 0.
      fields: additional values per image, each ``[n, ...]``.
      file_key: feature that holds the name of the image's original file.
    """

    def __init__(
        self,
        records: Sequence[dict],
        name: str,
        class_names: Sequence[str],
        labels: Int[np.ndarray, "n"],
        fields: Mapping[str, np.ndarray] | None = None,
        file_key: str | None = None,
    ):
        self.records, self._name, self._file_key = records, name, file_key
        self.class_names = list(class_names)
        self.labels = np.asarray(labels, np.int32)
        self.fields = dict(fields or {})

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        try:
            return self.records[index]["image"]
        except Exception as error:  # a record file may be damaged in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise files.FileError(f"{self._name} record {index}: cannot be read ({reason[:200]})") from error

    def key(self, index: int) -> str:
        return f"{self._name} record {index}"

    def name(self, index: int) -> str:
        name = self.key(index)
        if self._file_key is None:
            return name
        try:
            file = self.records[index][self._file_key]
        except Exception:  # the error of a damaged record must not be hidden by the lack of a name
            return name
        if isinstance(file, bytes):
            file = file.decode("utf-8", "backslashreplace")
        return f"{name} ({file})"


class Subset:
    """Some images of a source, with their labels renumbered consecutively.

    Args:
      source: all images.
      indices: ``[m]`` indices of the images to keep, in this order.
      classes: labels of the source that become 0, 1, ...; by default those of the kept images. Needed where several
        parts must agree on their labels: query and gallery, training and test images of classification.
    """

    def __init__(
        self, source: Source, indices: Int[np.ndarray, "m"], classes: Sequence[int] | Int[np.ndarray, "c"] | None = None
    ):
        self._source, self._indices = source, np.asarray(indices)
        own, self.fields = source.labels[self._indices], {k: v[self._indices] for k, v in source.fields.items()}
        sets = sets_of(source)
        every = own if sets is None else self.fields["labels"][self.fields["labels"] >= 0]
        kept = np.unique(every if classes is None else np.asarray(classes))
        if not np.isin(every, kept).all():
            raise ValueError("an image's class is not among the given classes")
        self.labels = np.searchsorted(kept, own).astype(np.int32)
        self.class_names = [source.class_names[label] for label in kept]
        if sets is not None:
            mine = self.fields["labels"]
            self.fields["labels"] = np.where(mine < 0, -1, np.searchsorted(kept, mine)).astype(np.int32)

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def key(self, index: int) -> str:
        return key_of(self._source, int(self._indices[index]))


class Relabelled:
    """A source with other labels and fields.

    Args:
      source: the images.
      labels: ``[n]``, consecutive from 0.
      class_names: name of every label.
      fields: values per image in place of the source's.
    """

    def __init__(
        self,
        source: Source,
        labels: Int[np.ndarray, "n"],
        class_names: Sequence[str],
        fields: Mapping[str, np.ndarray],
    ):
        self._source, self.class_names = source, class_names
        self.labels, self.fields = np.asarray(labels, np.int32), dict(fields)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> bytes:
        return self._source.read(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def key(self, index: int) -> str:
        return key_of(self._source, index)


class Joined:
    """The concatenation of several sources with the same classes."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._starts = np.cumsum([0] + [len(s) for s in self._sources])
        self.labels = np.concatenate([s.labels for s in self._sources])
        self.class_names = self._sources[0].class_names
        shared = set.intersection(*(set(s.fields) for s in self._sources))
        self.fields = {key: np.concatenate([s.fields[key] for s in self._sources]) for key in sorted(shared)}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[which], index - int(self._starts[which])

    def read(self, index: int) -> bytes:
        source, local = self._find(index)
        return source.read(local)

    def name(self, index: int) -> str:
        source, local = self._find(index)
        return source.name(local)

    def key(self, index: int) -> str:
        return key_of(*self._find(index))


def scan_splits(root: str | os.PathLike, warn: Callable[[str], None] = print) -> dict[str, FolderSource]:
    """Finds the images below a folder, by split.

    Args:
      root: folder of class folders, or of split folders that hold class folders; deeper folders belong to the class.
      warn: receives one line per kind of file or folder that is skipped.

    Returns:
      ``train`` and ``test``, or ``train``, ``query`` and ``gallery`` (which share their labels), or ``images`` alone.
      Classes and files are in sorted order.

    Raises:
      UserError: if the folder does not exist, holds no images, or lacks a split.
    """
    where = files.expand(root)
    if where.is_file():
        raise UserError(
            f"{where}: a file, where a folder of images or a table is expected (config.data.root); python -m "
            "idml_jax.prepare --dataset=folder stores archives"
        )
    if not where.is_dir():
        started = f" = {root!s}, below the current folder" if not os.path.isabs(os.path.expanduser(root)) else ""
        raise UserError(f"{where}: no such folder (config.data.root{started})")
    found = folders.images(where)
    if not found.names:
        endings = ", ".join(ending[1:] for ending in ENDINGS)
        raise UserError(f"{where}: it holds no images; expected {where}/<class>/*.jpg ({endings})")
    arrangement = folders.for_training(folders.arrange(found.names, where, found.passed.folders), where)
    folders.check_placed(found.names, arrangement, where, found.passed)
    for line in found.passed.lines(where):
        warn(line)
    by_split: dict[str, list[tuple[str, str, str]]] = {}
    for name, path in zip(found.names, found.paths, strict=True):
        place = arrangement.place(name)
        if place is not None:
            by_split.setdefault(place.split, []).append((place.class_name, name, str(path)))
    classes = {split: sorted({row[0] for row in rows}) for split, rows in by_split.items()}
    if "query" in classes:
        classes["query"] = classes["gallery"] = sorted({*classes["query"], *classes["gallery"]})
    sources = {}
    for split, rows in by_split.items():
        rows.sort()
        label_of = {name: label for label, name in enumerate(classes[split])}
        labels = np.asarray([label_of[row[0]] for row in rows])
        sources[split] = FolderSource([row[2] for row in rows], labels, classes[split])
    return sources


def scan_folder(root: str | os.PathLike, warn: Callable[[str], None] = print) -> FolderSource:
    """Finds the images below ``root/<class>/``, classes and files in sorted order.

    Raises:
      UserError: if the folder does not exist, holds no images, or holds split folders.
    """
    found = scan_splits(root, warn)
    if "images" not in found:
        raise UserError(f"{root}: holds the splits {', '.join(found)}; expected class folders")
    return found["images"]
