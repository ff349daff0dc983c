"""Layouts of CIFAR-10, CIFAR-100 and ImageNet as distributed."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from scipy.io import loadmat

from idml_jax.data.folders import is_image
from idml_jax.data.stored import archives, plain_pickle
from idml_jax.data.stored.layouts import Plan, Record, by_pattern, find, not_found, rows, text, whole_number
from idml_jax.errors import UserError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


def read_pickle(data: bytes, name: str) -> dict[str, object]:
    """The dictionary in one of CIFAR's pickles, with text keys; no code in the pickle is executed.

    Args:
      data: content of the file.
      name: name of the file, for messages.

    Raises:
      UserError: if it is damaged, or holds more than plain data.
    """
    try:
        return plain_pickle.load(data)
    except plain_pickle.PickleError as error:
        raise UserError(f"{name}: not one of CIFAR's pickles ({error}); refused") from error


def _batch(data: bytes, name: str, label_key: str, label_bytes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pixels ``[n, 3072]``, labels ``[n]`` and file names of one file of CIFAR, binary or pickled."""
    if name.endswith(".bin"):
        if not data or len(data) % (label_bytes + _PIXELS):
            raise UserError(f"{name}: {len(data):,} bytes are not a whole number of records; damaged")
        table = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + _PIXELS)
        return table[:, label_bytes:], table[:, label_bytes - 1].astype(np.int64), []
    values = read_pickle(data, name)
    if "data" not in values or label_key not in values:
        raise UserError(f"{name}: lacks 'data' or {label_key!r}")
    pixels = plain_pickle.byte_table(values["data"], _PIXELS)
    if pixels is None:
        raise UserError(f"{name}: its 'data' is not an array of bytes [n, {_PIXELS}]")
    labels = values[label_key]
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(_is_label(k) for k in labels):
        raise UserError(f"{name}: {label_key!r} is not a list of {len(pixels)} numbers")
    listed = values.get("filenames", [])
    return pixels, np.asarray(labels, np.int64), _texts(listed) if isinstance(listed, list) else []


def _is_label(value: object) -> bool:
    return isinstance(value, int) and -(2**31) <= value < 2**31


def _texts(values: list) -> list[str]:
    """The names in a pickle; entries that are not text have an empty name."""
    return [v.decode("latin1") if isinstance(v, bytes) else v if isinstance(v, str) else "" for v in values]


def _png(pixels: np.ndarray) -> bytes:
    """Pixels ``[3072]``, red plane first, as PNG: the same image bit for bit."""
    picture = pixels.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)[:, :, ::-1]
    return cv2.imencode(".png", picture)[1].tobytes()


def _cifar(
    source: Path,
    title: str,
    files: Mapping[str, Sequence[str]],
    meta: Sequence[str],
    names_key: str,
    label_key: str,
    label_bytes: int,
) -> Plan:
    """A plan for CIFAR-10 or CIFAR-100.

    Args:
      source: folder or archive.
      title: full name of the set.
      files: base names without ``.bin`` by split.
      meta: base names of the files with the class names: pickle and text.
      names_key: key of the class names in the pickle.
      label_key: key of the labels in the pickles.
      label_bytes: number of bytes before the pixels of a binary record; the last one is the label.
    """
    pattern = "|".join(re.escape(base) + r"(\.bin)?" for bases in files.values() for base in bases)
    pattern += "|" + "|".join(map(re.escape, meta))
    enter_none, enter_cifar = (lambda name: False), by_pattern(r".*cifar.*\.(tar\.gz|tgz|tar|zip)")
    split_of = {base: split for split, bases in files.items() for base in bases}
    for enter in (enter_none, enter_cifar):
        names = [entry.name for entry in archives.walk(source, enter) if by_pattern(pattern)(entry.name)]
        batches = {
            n: split_of[n.rsplit("/", 1)[-1].removesuffix(".bin")] for n in names if n.rsplit("/", 1)[-1] not in meta
        }
        meta_names = [n for n in names if n not in batches]
        # CIFAR-100's files have the common names train and test; its meta file identifies them.
        if batches and meta_names:
            break
    if not batches or not meta_names:
        raise not_found(source, title, f"its archive or folder with {', '.join(meta)} and {', '.join(split_of)}")
    folder = min((n.rpartition("/")[0] for n in meta_names), key=lambda n: (n.count("/"), n))
    batches = {n: s for n, s in batches.items() if n.rpartition("/")[0] == folder}
    both = [n for n in batches if n + ".bin" in batches]
    batches = {n: s for n, s in batches.items() if n.removesuffix(".bin") not in both or n in both}
    found = {n.rsplit("/", 1)[-1].removesuffix(".bin") for n in batches}
    absent = [base for base in split_of if base not in found]
    if absent:
        raise UserError(f"{source}: {', '.join(absent)} missing in {folder or source}")
    meta_name = next(n for n in meta_names if n.rpartition("/")[0] == folder)
    contents = {e.name: e.read() for e in archives.walk(source, enter) if e.name == meta_name}
    if meta_name.endswith(".txt"):
        class_names = [line.strip() for line in text(contents[meta_name], meta_name).splitlines() if line.strip()]
    else:
        listed = read_pickle(contents[meta_name], meta_name).get(names_key)
        if not isinstance(listed, list):
            raise UserError(f"{meta_name}: lacks {names_key!r}")
        class_names = _texts(listed)

    def records() -> Iterator[Record]:
        for entry in archives.walk(source, enter):
            if entry.name not in batches:
                continue
            pixels, labels, file_names = _batch(entry.read(), entry.name, label_key, label_bytes)
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
                raise UserError(f"{entry.name}: labels {labels.min()} to {labels.max()}; {len(class_names)} classes")
            for i in range(len(labels)):
                name = f"{entry.name}/{file_names[i] if i < len(file_names) else i}"
                yield Record(batches[entry.name], int(labels[i]), name, partial(_png, pixels[i]))

    kind = "binary files" if next(iter(batches)).endswith(".bin") else "python files"
    return Plan(kind, class_names, ("train", "test"), records)


def cifar10(source: Path) -> Plan:
    """CIFAR-10: ``cifar-10-python.tar.gz`` or ``cifar-10-binary.tar.gz``, or their unpacked content."""
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    return _cifar(source, "CIFAR-10", files, ("batches.meta", "batches.meta.txt"), "label_names", "labels", 1)


def cifar100(source: Path) -> Plan:
    """CIFAR-100 with its fine labels: ``cifar-100-python.tar.gz`` or ``-binary``, or their unpacked content."""
    files = {"train": ["train"], "test": ["test"]}
    return _cifar(source, "CIFAR-100", files, ("meta", "fine_label_names.txt"), "fine_label_names", "fine_labels", 2)


_WNID = re.compile(r"n\d{8}")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
_LISTS = (
    r"meta\.mat|ILSVRC2012_validation_ground_truth\.txt|imagenet_2012_validation_synset_labels\.txt|"
    r"LOC_val_solution\.csv|LOC_synset_mapping\.txt"
)


def imagenet(source: Path) -> Plan:
    """ImageNet-1K: ``ILSVRC2012_img_train.tar`` (a tar of tars), optionally ``ILSVRC2012_img_val.tar`` with the devkit
    or a list of the validation labels; or class folders ``train/<wnid>/`` and ``val/<wnid>/``. The training images are
    sufficient. Labels are in the order of the WordNet ids."""
    enter_train = by_pattern(r"(ILSVRC2012_img_(train|val)|train|val|n\d{8})\.tar")
    enter_lists = by_pattern(r"ILSVRC2012_devkit.*\.(tar\.gz|tgz|tar)")
    _, lists = archives.read_small(source, by_pattern(_LISTS), enter_lists)

    def place(name: str) -> tuple[str, str | int] | None:
        """Split of an image, and its WordNet id or, for a flat validation image, its number."""
        parts = [part.removesuffix(".tar") for part in name.split("/")]
        validation = _VALIDATION.fullmatch(parts[-1])
        folder = next((part for part in reversed(parts[:-1]) if _WNID.fullmatch(part)), None)
        if validation:
            return "validation", folder or int(validation[1])
        if not is_image(name) or folder is None:
            return None
        inside = [part.lower() for part in parts[: parts.index(folder)]]
        if any(part in ("val", "validation", "ilsvrc2012_img_val") for part in inside):
            return "validation", folder
        return "train", folder

    # The class names come first, without reading the tar of tars: its members are named after the classes.
    outer = by_pattern(r"(ILSVRC2012_img_(train|val)|train|val)\.tar")
    wnids, has_validation = set(), False
    for entry in archives.walk(source, outer):
        base = entry.name.rsplit("/", 1)[-1].removesuffix(".tar")
        found = ("train", base) if _WNID.fullmatch(base) else place(entry.name)
        if found and found[0] == "train":
            wnids.add(found[1])
        has_validation = has_validation or bool(found and found[0] == "validation")
    if not wnids:
        raise not_found(
            source,
            "ImageNet-1K",
            "ILSVRC2012_img_train.tar (and ILSVRC2012_img_val.tar with ILSVRC2012_devkit_t12.tar.gz) in one folder, or "
            "train/<wnid>/ and val/<wnid>/",
        )
    order = sorted(wnid for wnid in wnids if isinstance(wnid, str))
    label_of = {wnid: label for label, wnid in enumerate(order)}
    truth = _validation_truth(source, lists) if has_validation else None

    def label(key: str | int, name: str) -> int:
        if isinstance(key, int):
            if truth is None:
                raise UserError(
                    f"{source}: {name}: its class is unknown; put ILSVRC2012_devkit_t12.tar.gz, "
                    "imagenet_2012_validation_synset_labels.txt or LOC_val_solution.csv beside it"
                )
            if key not in truth:
                raise UserError(f"{source}: {name}: the list of validation labels has no image {key}")
            key = truth[key]
        if key not in label_of:
            raise UserError(f"{source}: {name}: class {key} has no training images")
        return label_of[key]

    def records() -> Iterator[Record]:
        for entry in archives.walk(source, enter_train):
            found = place(entry.name)
            if found is not None:
                yield Record(found[0], label(found[1], entry.name), entry.name, entry.read)

    shape = "tars" if source.is_file() or any(p.suffix == ".tar" for p in source.iterdir()) else "class folders"
    return Plan(shape, order, ("train", "validation") if has_validation else ("train",), records)


def _validation_truth(source: Path, lists: Mapping[str, bytes]) -> dict[int, str] | None:
    """WordNet id of every validation image by its number from 1, from the first list found."""
    readers: dict[str, Callable[[bytes, str], dict[int, str]]] = {
        "imagenet_2012_validation_synset_labels.txt": lambda data, name: {
            i: row[0] for i, row in enumerate(rows(data, name, 1), 1)
        },
        "LOC_val_solution.csv": _kaggle_truth,
    }
    for base, read in readers.items():
        name = find(lists, base)
        if name:
            return read(lists[name], name)
    name, meta = find(lists, "ILSVRC2012_validation_ground_truth.txt"), find(lists, "meta.mat")
    if name is None:
        return None
    if meta is None:
        raise UserError(f"{source}: {name} needs the devkit's meta.mat next to it, which maps its numbers to classes")
    try:
        synsets = loadmat(io.BytesIO(lists[meta]), squeeze_me=True)["synsets"]
        wnid_of = {
            int(number): str(wnid) for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        }
    except Exception as error:
        raise UserError(f"{meta}: not the devkit's meta.mat ({(str(error) or 'damaged').splitlines()[0]})") from error
    truth = {}
    for i, row in enumerate(rows(lists[name], name, 1), 1):
        number = whole_number(row[0], name)
        if number not in wnid_of:
            raise UserError(f"{name}, line {i}: {number} is not a class of {meta}")
        truth[i] = wnid_of[number]
    return truth


def _kaggle_truth(data: bytes, name: str) -> dict[int, str]:
    truth = {}
    try:
        listed = list(csv.DictReader(io.StringIO(text(data, name))))
    except csv.Error as error:
        raise UserError(f"{name}: not readable as CSV ({error})") from error
    for row in listed:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", row.get("ImageId") or "")
        prediction = (row.get("PredictionString") or "").split()
        if not match or not prediction:
            raise UserError(f"{name}: expected the columns ImageId and PredictionString")
        truth[int(match[1])] = prediction[0]
    return truth
