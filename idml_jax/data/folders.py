"""Folders of images: traversal, names of splits, and the class of every image.

Training, ``idml_jax.prepare`` and ``idml_jax.embed`` all read folders through this module, so that a folder has the
same images and classes for every command.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from idml_jax.data.files import shown
from idml_jax.data.images.decode import ENDINGS
from idml_jax.errors import UserError

# Names of split folders, in any case. Images of "extra" folders belong to no split.
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "query": "query", "gallery": "gallery",
    "extra": "extra", "unlabeled": "extra", "unlabelled": "extra",
}  # fmt: skip
_SYSTEM = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", "$recycle.bin", "#recycle",
    "system volume information", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#snapshot",
}  # fmt: skip
EXPECTED = "<class>/<image>, or train/<class>/<image> with test/ (or val/; or query/ and gallery/) beside it"

HIDDEN = "hidden or system files and folders"
OTHER = "files without an image extension"
# Pictures in formats that are read with a plug-in, or not at all.
_HEIF = (".heic", ".heif", ".hif")
_UNREAD = (
    ".avif", ".svg", ".jp2", ".j2k", ".jxl", ".psd", ".tga", ".ico", ".eps", ".pdf", ".raw", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".orf", ".rw2", ".raf", ".pnm", ".pbm", ".exr", ".hdr", ".dcm",
)  # fmt: skip
LINKS = "links to folders that are read anyway"
EMPTY = "class folders without images"
LOOSE = "images outside class folders"
ASIDE = "images in folders that are not a split in use"


def is_image(name: str) -> bool:
    """Whether a file name has the extension of a known image format."""
    return name.lower().endswith(ENDINGS)


def kind_of_other(name: str) -> str:
    """What a file is that is not read as an image."""
    ending = os.path.splitext(name)[1].lower()
    if ending in _HEIF:
        return f"{ending} photographs, which are read with the package pillow-heif (pip install pillow-heif)"
    return f"{ending} pictures, a format that is not read" if ending in _UNREAD else OTHER


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or created by an operating system or a network storage device."""
    return name.startswith(".") or name.lower() in _SYSTEM


class Passed:
    """Files and folders that a walk leaves out: per kind, the number and the first name.

    Attributes:
      folders: names of all folders visited, used to find empty ones.
      remarks: additional lines about how the folder is interpreted.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.remarks: list[str] = []
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Counts ``count`` files or folders of a kind."""
        before, first = self._kinds.get(kind, (0, name))
        self._kinds[kind] = (before + count, first)

    def lines(self, where: str | os.PathLike) -> list[str]:
        """One line per kind, after the remarks."""
        kinds = [f"skipped {count:,} {kind}, the first {shown(first)}" for kind, (count, first) in self._kinds.items()]
        return [f"{shown(where)}: {line}" for line in self.remarks + kinds]


class _Level(NamedTuple):
    """A folder between the root and the current position of the walk."""

    path: str
    prefix: str
    items: Iterator[os.DirEntry]
    key: tuple[int, int]


def walk(root: Path, passed: Passed | None = None) -> Iterator[tuple[str, Path]]:
    """Yields the files below a folder, sorted by the parts of their names.

    Hidden and system names are skipped. Links to folders are followed, each target once; links to a parent folder or to
    a sibling folder that is read anyway are skipped, so that links cannot form a cycle. Links to files count as files,
    even broken ones: reading them reports the error.

    Args:
      root: folder to walk.
      passed: records what is left out.

    Yields:
      The name relative to the root, with ``/`` between its parts, and the path.

    Raises:
      UserError: naming a folder that cannot be read.
    """
    passed = passed or Passed()
    followed: set[tuple[int, int]] = set()
    levels = [_level(str(root), "")]
    while levels:
        level = levels[-1]
        item = next(level.items, None)
        if item is None:
            levels.pop()
            continue
        name = level.prefix + item.name
        if is_litter(item.name):
            passed.add(HIDDEN, name)
            continue
        if not _is_folder(item):
            yield name, Path(item.path)
            continue
        inner = _level(item.path, name + "/")
        if item.is_symlink():
            target = os.path.realpath(item.path)
            beside = os.path.dirname(target) == os.path.realpath(level.path) and not is_litter(os.path.basename(target))
            if beside or inner.key in followed:
                passed.add(LINKS, name)
                continue
            followed.add(inner.key)
        if any(inner.key == above.key for above in levels):
            passed.add(LINKS, name)
            continue
        passed.folders.append(name)
        levels.append(inner)


def _is_folder(item: os.DirEntry) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link to itself or into an inaccessible folder: reading it reports the error
        return False


def _level(path: str, prefix: str) -> _Level:
    try:
        with os.scandir(path) as found:
            items = sorted(found, key=lambda item: item.name)
        state = os.stat(path)
    except OSError as error:
        raise UserError(f"{shown(path)}: this folder cannot be read ({error.strerror})") from error
    return _Level(path, prefix, iter(items), (state.st_dev, state.st_ino))


class Place(NamedTuple):
    """Split (``images`` if the folder has no splits) and class name of an image."""

    split: str
    class_name: str


class Arrangement(NamedTuple):
    """How a folder is divided into splits and class folders.

    Attributes:
      prefix: folders that enclose everything, with a trailing ``/``.
      splits: folder name to split name, for the splits in use; empty if the class folders are at the top.
      depth: number of folder levels between the prefix and the class folders.
    """

    prefix: str
    splits: dict[str, str]
    depth: int

    def place(self, name: str) -> Place | None:
        """Split and class of an image; ``None`` if it is outside the class folders in use."""
        parts = name.removeprefix(self.prefix).split("/")
        if len(parts) < self.depth + 2 or (self.depth and parts[0] not in self.splits):
            return None
        return Place(self.splits[parts[0]] if self.depth else "images", parts[self.depth])


def arrange(names: Sequence[str], where: str | os.PathLike, folders: Sequence[str] = ()) -> Arrangement:
    """Finds class folders, possibly inside split folders, possibly enclosed in one folder.

    Folders are taken as splits only if two known split names of different meaning are siblings, since a data set of
    vehicles may have a class "train".

    Args:
      names: names of all images below ``where``, at least one.
      where: folder or archive, for messages.
      folders: names of all folders, if known: an empty split folder is an error.

    Returns:
      The arrangement, with all split folders.

    Raises:
      UserError: if two folders are the same split, or a split folder is empty.
    """
    parts = [name.split("/")[:-1] for name in names]
    shortest, shared = min(map(len, parts)), 0
    inside = [folder.split("/") for folder in folders]
    while shared < shortest - 1 and len({p[shared] for p in parts}) == 1:
        if len(_roles({f[shared] for f in inside if len(f) == shared + 1 and f[:shared] == parts[0][:shared]})) > 1:
            break
        shared += 1
    above = parts[0][:shared]
    prefix = "".join(f"{part}/" for part in above)
    tops = {p[shared] for p in parts if len(p) > shared}
    empty = {f[shared] for f in inside if len(f) == shared + 1 and f[:shared] == above} - tops
    splits = {top: SPLIT_NAMES[top.lower()] for top in sorted(tops | empty) if top.lower() in SPLIT_NAMES}
    if len(_roles(splits)) < 2:
        return Arrangement(prefix, {}, 0)
    for split in _roles(splits) - {"extra"}:
        same = [top for top in splits if splits[top] == split]
        if len(same) > 1:
            raise UserError(f"{shown(where)}: {', '.join(same)} are several folders for one split; keep one of them")
        if same[0] in empty:
            raise UserError(f"{shown(where)}/{shown(prefix + same[0])}: it holds no images; expected {EXPECTED}")
    return Arrangement(prefix, splits, 1)


def _roles(names: dict[str, str] | set[str]) -> set[str]:
    """The distinct splits among folder names; empty if there are only extra images."""
    found = {SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}
    return found if found != {"extra"} else set()


def for_training(found: Arrangement, where: str | os.PathLike) -> Arrangement:
    """The arrangement with the splits for training: train and test (or ``val`` instead), or train, query and gallery.

    Raises:
      UserError: if a split is missing, or there is one too many.
    """
    if not found.depth:
        return found
    by_split = {split: top for top, split in found.splits.items() if split != "extra"}
    if "train" not in by_split:
        there = ", ".join(by_split.values())
        raise UserError(f"{shown(where)}: {there}, but no train; expected {EXPECTED}")
    if {"query", "gallery"} & set(by_split):
        missing = sorted({"query", "gallery"} - set(by_split))
        more = [by_split[split] for split in ("test", "validation") if split in by_split]
        if missing or more:
            wrong = f"no {missing[0]}" if missing else f"{more[0]} too"
            raise UserError(
                f"{shown(where)}: train and query or gallery, but {wrong}; expected train, query and gallery"
            )
        wanted = {"train": "train", "query": "query", "gallery": "gallery"}
    else:
        test = next((split for split in ("test", "validation") if split in by_split), None)
        if test is None:
            raise UserError(f"{shown(where)}: train, but no test; expected {EXPECTED}")
        wanted = {"train": "train", test: "test"}
    return found._replace(splits={by_split[split]: name for split, name in wanted.items()})


def check_placed(names: Sequence[str], found: Arrangement, where: str | os.PathLike, passed: Passed) -> None:
    """Counts images outside the class folders in use, and class folders without images.

    Raises:
      UserError: if no image has a class, or a split has no images.
    """
    classes, splits = set(), set()
    for name in names:
        place = found.place(name)
        if place is None:
            top, _, rest = name.removeprefix(found.prefix).partition("/")
            passed.add(ASIDE if found.depth and rest and top not in found.splits else LOOSE, name)
        else:
            classes.add((place.split, place.class_name))
            splits.add(place.split)
    bare = sorted(set(found.splits.values()) - splits) if found.depth else ([] if splits else ["images"])
    if bare:
        lone = next(name for name in names if found.place(name) is None)
        raise UserError(
            f"{shown(where)}: its images lie outside class folders: {shown(lone)} lies outside a class folder; "
            f"expected {EXPECTED}"
        )
    wrapping = found.prefix.rstrip("/").rsplit("/", 1)[-1]
    if not found.depth and wrapping.lower() in SPLIT_NAMES:
        passed.remarks.append(f"{wrapping} is the only split folder; its class folders are taken as one set")
    for folder in passed.folders:
        place = found.place(folder + "/x") if folder.count("/") == found.prefix.count("/") + found.depth else None
        if place is not None and folder.startswith(found.prefix) and tuple(place) not in classes:
            passed.add(EMPTY, folder)


class Images(NamedTuple):
    """The images of a folder.

    Attributes:
      names: names relative to the root, in the order of the walk.
      paths: their paths.
      passed: what the walk left out.
    """

    names: list[str]
    paths: list[Path]
    passed: Passed


def images(root: Path, wanted: Callable[[str], bool] = is_image) -> Images:
    """Finds the images below a folder.

    Raises:
      UserError: naming a folder that cannot be read.
    """
    passed = Passed()
    names, paths = [], []
    for name, path in walk(root, passed):
        if wanted(name):
            names.append(name)
            paths.append(path)
        else:
            passed.add(kind_of_other(name), name)
    return Images(names, paths, passed)
