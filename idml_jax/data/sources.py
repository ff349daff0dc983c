"""Images of any origin behind one random-access interface, their checks and their class-disjoint splits."""

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int

from idml_jax.data.images import transforms
from idml_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class Source(Protocol):
    """Random access to encoded images.

    Attributes:
      labels: ``[n]`` int32, dense from 0.
      class_names: name of every label.
      fields: further values per image, e.g. the true ``ambiguity`` of the glyphs, each ``[n, ...]``.
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
        """What to call the image in a message: its path, or data set, split and record."""
        ...


class FolderSource:
    """Image files with labels."""

    def __init__(self, paths: Sequence[str], labels: Int[np.ndarray, "n"], class_names: Sequence[str]):
        self.paths, self.class_names = list(paths), list(class_names)
        self.labels = np.asarray(labels, np.int32)
        self.fields: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            return Path(self.paths[index]).read_bytes()
        except OSError as error:
            raise UserError(f"{self.paths[index]}: cannot be read ({error.strerror})") from error

    def name(self, index: int) -> str:
        return self.paths[index]


class TfdsSource:
    """A split of a tfds data set stored as array_record; TensorFlow is not needed to read it.

    Args:
      records: gives dictionaries with the encoded ``image``, and the file's name if ``file_key`` is given.
      name: for messages, e.g. ``cub/test``.
      class_names: name of every label.
      labels: ``[n]``, dense from 0.
      fields: further values per image, each ``[n, ...]``.
      file_key: feature with the name that the image's file had.
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
        return self.records[index]["image"]

    def name(self, index: int) -> str:
        name = f"{self._name} record {index}"
        if self._file_key is None:
            return name
        file = self.records[index][self._file_key]
        return f"{name} ({file.decode() if isinstance(file, bytes) else file})"


class Subset:
    """Some images of a source, with their labels made dense again.

    Args:
      source: all images.
      indices: ``[m]`` which to keep, in this order.
      classes: the source's labels that become 0, 1, ...; those of the images by default. Given where several parts
        have to agree on their labels: query and gallery, training and test images of classification.
    """

    def __init__(
        self, source: Source, indices: Int[np.ndarray, "m"], classes: Sequence[int] | Int[np.ndarray, "c"] | None = None
    ):
        self._source, self._indices = source, np.asarray(indices)
        own = source.labels[self._indices]
        kept = np.unique(own if classes is None else np.asarray(classes))
        if not np.isin(own, kept).all():
            raise ValueError("an image's class is none of the given classes")
        self.labels = np.searchsorted(kept, own).astype(np.int32)
        self.class_names = [source.class_names[label] for label in kept]
        self.fields = {key: value[self._indices] for key, value in source.fields.items()}

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))


class Joined:
    """Several sources with the same classes, one after the other."""

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


def select_classes(source: Source, classes: Sequence[int] | Int[np.ndarray, "c"]) -> Subset:
    """The images of some labels of a source."""
    return Subset(source, np.flatnonzero(np.isin(source.labels, np.asarray(classes, np.int64))))


def split_by_class(source: Source, train_classes: float) -> tuple[Subset, Subset]:
    """Class-disjoint halves in the order of the class names, as the benchmarks' protocol has it.

    Args:
      source: all images.
      train_classes: share of the classes, if below 1, or their number.

    Returns:
      Training and test images.

    Raises:
      UserError: if one side would be left with fewer than two classes.
    """
    total = len(source.class_names)
    count = round(total * train_classes) if train_classes < 1 else int(train_classes)
    if count < 2 or total - count < 2:
        raise UserError(
            f"config.data.train_classes = {train_classes} splits {total} classes into {count} for training and "
            f"{total - count} for testing; both sides need at least 2"
        )
    return select_classes(source, range(count)), select_classes(source, range(count, total))


def hold_out_classes(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits classes at random into training and validation, to choose settings without looking at test classes.

    Args:
      source: training images.
      fraction: share of the classes to hold out.
      seed: of the choice.

    Returns:
      Training and validation images.

    Raises:
      UserError: if one side would be left with fewer than two classes.
    """
    total = len(source.class_names)
    count = round(total * fraction)
    if count < 2 or total - count < 2:
        raise UserError(
            f"config.data.validation_classes = {fraction} holds out {count} of {total} training classes; both sides "
            "need at least 2"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(total)
    return select_classes(source, order[count:]), select_classes(source, order[:count])


def hold_out_images(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits the images of every class at random, for classification, where held-out images have known classes.

    Args:
      source: training images.
      fraction: share of every class's images to hold out, at least one.
      seed: of the choice.

    Returns:
      Training and held-out images, with the same labels.

    Raises:
      UserError: if a class would be left without training images.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    held_out = []
    order = np.argsort(source.labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(source.labels[order])) + 1):
        label = source.labels[members[0]]
        count = max(round(len(members) * fraction), 1)
        if count >= len(members):
            raise UserError(
                f"holding out {fraction} of the {len(members)} images of class {source.class_names[label]} leaves none "
                "to train on"
            )
        held_out.append(rng.permutation(members)[:count])
    chosen, classes = np.sort(np.concatenate(held_out)), range(len(source.class_names))
    return Subset(source, np.setdiff1d(np.arange(len(source)), chosen), classes), Subset(source, chosen, classes)


def _is_image(path: Path) -> bool:
    """Whether a path with an image's ending is a file; a link to nowhere is an image that is missing."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to {os.readlink(path)}, which is not there; remove it or bring the file back")
    return path.is_file()


def scan_folder(root: str | os.PathLike) -> FolderSource:
    """Images below ``root/<class>/``, classes and files in sorted order.

    Args:
      root: folder with one folder per class; deeper folders belong to the class.

    Returns:
      The source.

    Raises:
      UserError: if there is no such folder, or no image in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (config.data.root)")
    paths: list[str] = []
    labels: list[int] = []
    names: list[str] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = sorted(
            str(p)
            for p in folder.rglob("*")
            if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and _is_image(p)
        )
        if found:
            labels += [len(names)] * len(found)
            names.append(folder.name)
            paths += found
    if not paths:
        loose = any(p.suffix.lower() in EXTENSIONS for p in root.iterdir())
        where = "its images lie outside class folders" if loose else "it holds no images"
        raise UserError(f"{root}: {where}; expected {root}/<class>/*.jpg ({', '.join(e[1:] for e in EXTENSIONS)})")
    return FolderSource(paths, np.asarray(labels), names)


def drop_unreadable(source: FolderSource, on_corrupt: str, warn: Callable[[str], None]) -> FolderSource:
    """Finds files that are no pictures before anything is trained on them.

    Args:
      source: files to look at.
      on_corrupt: ``refuse`` looks at size, header and end of every file and raises at the first bad one; ``skip``
        decodes every file and leaves the bad ones out, with a count.
      warn: receives one line about skipped files.

    Returns:
      The source without the bad files.

    Raises:
      UserError: naming the first bad file, under ``refuse``; if nothing readable is left, under ``skip``.
    """
    if on_corrupt not in ("refuse", "skip"):
        raise UserError(f"config.data.on_corrupt = {on_corrupt!r}; known: refuse, skip")
    check = transforms.decode if on_corrupt == "skip" else transforms.check_whole

    def problem(index: int) -> str | None:
        try:
            check(source.read(index))
        except (transforms.DecodeError, UserError) as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(problem, range(len(source))))
    bad = [i for i, p in enumerate(problems) if p is not None]
    if not bad:
        return source
    first = f"{source.paths[bad[0]]}: {problems[bad[0]]}"
    if on_corrupt == "refuse":
        more = f" (and {len(bad) - 1} more files)" if len(bad) > 1 else ""
        raise UserError(f"{first}{more}; config.data.on_corrupt=skip leaves such files out")
    if len(bad) == len(source):
        raise UserError(f"none of {len(source)} files is a readable picture; the first: {first}")
    warn(f"{len(bad)} of {len(source)} files are not readable pictures and are left out; the first: {first}")
    keep = np.setdiff1d(np.arange(len(source)), bad)
    kept, labels = np.unique(source.labels[keep], return_inverse=True)
    return FolderSource([source.paths[i] for i in keep], labels, [source.class_names[k] for k in kept])


def check_classes(source: Source, what: str, on_small_class: str, warn: Callable[[str], None]) -> Source:
    """At least two classes, each with at least two images, or a clear word about it.

    Args:
      source: images.
      what: which images, for messages.
      on_small_class: what becomes of classes with one image, which can neither form a positive pair nor be found:
        ``refuse``, ``skip`` or ``keep``.
      warn: receives one line about skipped or kept classes.

    Returns:
      The source, perhaps without its small classes.

    Raises:
      UserError: if a class is too small under ``refuse``, or fewer than two classes are there.
    """
    if on_small_class not in ("refuse", "skip", "keep"):
        raise UserError(f"config.data.on_small_class = {on_small_class!r}; known: refuse, skip, keep")
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    small = np.flatnonzero(counts < 2)
    if len(source.class_names) >= 2 and len(small):
        first = source.name(int(np.flatnonzero(source.labels == small[0])[0]))
        text = f"{what}: {len(small)} of {len(counts)} classes have a single image, the first {first}"
        if on_small_class == "refuse":
            raise UserError(
                f"{text}; every class needs two, or set config.data.on_small_class to skip (leave them out) or keep"
            )
        warn(f"{text}; {'left out' if on_small_class == 'skip' else 'kept'}")
        if on_small_class == "skip":
            source = select_classes(source, np.flatnonzero(counts >= 2))
    if len(source.class_names) < 2:
        names = f" ({source.class_names[0]})" if len(source.class_names) else ""
        raise UserError(f"{what}: {len(source.class_names)} class{names}; metric learning needs at least 2")
    return source
