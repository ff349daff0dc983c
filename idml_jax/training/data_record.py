"""Record of a run's training data, so that a run is not resumed with other labels."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from idml_jax.data.datasets import Splits
from idml_jax.data.sources import Source, key_of, movable_names
from idml_jax.data.wrong_labels import wrong_labels_of
from idml_jax.errors import UserError, printable
from idml_jax.runtime.files import first_line, write_json

FILE = "data.json"
# For more classes only a digest of their names is stored.
MOST_NAMES = 20_000

# What a table says about an image and its name does not tell.
_OF_TABLES = ("box", "group", "labels", "weight")

Record = dict[str, dict[str, object]]


def record_of(splits: Splits) -> Record:
    """Identifies the images of a run: for each part its classes, their sizes and a digest of the image names.

    Args:
      splits: images of the run.

    Returns:
      A JSON-serialisable dictionary by part (``train``, ``test``, ...). Paths are relative to the common folder of all
      images of a part, so the data may be moved as a whole. With wrong labels on purpose (``data.label_noise``) also
      their number and a digest of all labels.
    """
    return _records(splits._asdict())


def _records(parts: Mapping[str, Source | None]) -> Record:
    return {name: _record(part) for name, part in parts.items() if part is not None}


def _record(source: Source) -> dict[str, object]:
    names = movable_names([key_of(source, i) for i in range(len(source))])
    classes = list(source.class_names)
    fields = {name: value for name, value in getattr(source, "fields", {}).items() if name in _OF_TABLES}
    table = {"table": _digest(f"{name} {value.tolist()}" for name, value in sorted(fields.items()))} if fields else {}
    record: dict[str, object] = {
        **table,
        "images": len(source),
        "classes": classes if len(classes) <= MOST_NAMES else len(classes),
        "class_digest": _digest(classes),
        "sizes": _digest(np.bincount(source.labels, minlength=len(classes)).astype(str).tolist()),
        "files": _digest(names),
    }
    wrong = wrong_labels_of(source)
    if wrong is not None:
        record |= {"wrong_labels": int(wrong.sum()), "labels": _digest(source.labels.astype(str).tolist())}
    return record


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


def remember(splits: Splits, workdir: Path, relation: str = "") -> None:
    """Writes the record of a new run; an existing record is kept. ``relation``: digest of that of the classes."""
    if not (workdir / FILE).exists():
        more: Record = {"relation": {"digest": relation}} if relation else {}
        write_json(workdir / FILE, {**record_of(splits), **more})


def check(
    splits: Splits, workdir: Path, parts: Sequence[str] = Splits._fields, relation: str | None = None
) -> list[str]:
    """Compares the current data of a run with the data it was started with.

    Args:
      splits: current images of the run.
      workdir: folder of the run; without a record (written by an earlier version) there is no check.
      parts: parts to compare.
      relation: digest of the current relation of the classes, empty without one; ``None``: not compared.

    Returns:
      Warnings about images that were added, removed or renamed, one line each.

    Raises:
      UserError: if the training classes have changed, so that labels would mean other classes, or their relation, or
        the wrong labels of ``data.label_noise``; if the record cannot be read.
    """
    if not (known := _stored(workdir)):
        return []
    if relation is not None and known.get("relation", {}).get("digest", "") != relation:
        raise UserError(
            f"{workdir}: the relation of the classes (config.loss.relation or levels) is not the one that the run "
            "started with; restore the file, or use another --workdir"
        )
    warnings = []
    compared = {name: part for name, part in splits._asdict().items() if name in parts and name in known}
    for name, now in _records(compared).items():
        before = known[name]
        if before == now:
            continue
        if "labels" in now and before.get("labels", now["labels"]) != now["labels"]:
            raise UserError(
                f"{workdir}: the {name} images have changed since the run started, and with them the wrong labels of "
                f"config.data.label_noise ({before.get('images')} images then, {now['images']} now); restore the "
                "images, or use another --workdir"
            )
        if before.get("class_digest") != now["class_digest"]:
            line = f"the classes of the {name} images are not those that the run started with ({_change(before, now)})"
            if name == "train":
                raise UserError(
                    f"{workdir}: {line}, so its labels would mean other classes; restore the data, or use another "
                    "--workdir"
                )
            warnings.append(line)
        else:
            what = "images were added, removed or renamed" if before.get("files") != now["files"] else "labels changed"
            if what == "labels changed" and before.get("sizes") == now["sizes"]:
                what = "columns of the table changed"
            numbers = f"{before.get('images')} then, {now['images']} now"
            warnings.append(f"the {name} images are not those that the run was started with ({what}; {numbers})")
    return warnings


def classes_of(workdir: Path) -> dict[str, list[str]]:
    """Names of the classes of each part of a run's data, as it was started; without those of more than ``MOST_NAMES``.

    Raises:
      UserError: if the record cannot be read.
    """
    known = _stored(workdir)
    parts = {name: part.get("classes") for name, part in known.items()}
    return {name: [str(one) for one in names] for name, names in parts.items() if isinstance(names, list)}


def sizes_of(workdir: Path) -> dict[str, int]:
    """Number of images of each part of a run's data, as it was started.

    Raises:
      UserError: if the record cannot be read.
    """
    counts = {name: part.get("images") for name, part in _stored(workdir).items()}
    return {name: count for name, count in counts.items() if isinstance(count, int)}


def _stored(workdir: Path) -> Record:
    """The record of a run, by part; empty for a run of an earlier version, which has none."""
    path = workdir / FILE
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {name: {str(k): v for k, v in part.items()} for name, part in stored.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); without it the data is not checked") from error


def _change(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Describes how two lists of classes differ."""
    old, new = before.get("classes"), now["classes"]
    if not isinstance(old, list) or not isinstance(new, list):
        return "their names differ"
    gone, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    changes = (("gone", gone), ("new", added))
    parts = [f"{len(names)} {what}, such as {printable(names[0])}" for what, names in changes if names]
    return "; ".join(parts) or "their order differs"
