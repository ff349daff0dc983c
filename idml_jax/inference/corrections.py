"""Proposed changes of a set of images as a table, decisions about them, and the corrected list, table or folder."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from idml_jax.data import folders
from idml_jax.data.columns import SEVERAL
from idml_jax.data.tables import MAX_PARQUET_BYTES, TABLES, TEXT, arrow, is_file_name, separated_rows
from idml_jax.errors import UserError, printable, warn
from idml_jax.inference.audit import Finding
from idml_jax.inference.index import Index
from idml_jax.runtime.files import atomic, first_line, replace_folder, user_path, write_text

COLUMNS = ("id", "action", "path", "class", "proposed", "kind", "score", "reason", "box", "decision")
_NEEDED = ("action", "path", "proposed", "decision")
DECISIONS = ("accept", "reject", "")
_MOST_BYTES = 2**28
_TABLE_ROWS = 256  # written together


class Change(NamedTuple):
    """A decided change.

    Attributes:
      path: the image.
      action: ``relabel`` or ``remove``.
      proposed: new class; empty for ``remove``.
      box: the part of the picture that is the image, as ``box_of`` gives it.
    """

    path: str
    action: str
    proposed: str
    box: str = ""


def box_of(index: Index, row: int) -> str:
    """Box of an image, as a table has it; empty if there is none."""
    return ",".join(map(str, index.box_of(row) or ()))


def as_rows(index: Index, findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings as rows of the table ``changes.csv``, without decisions."""
    rows = []
    for number, finding in enumerate(findings, 1):
        proposed = "" if finding.proposed is None or index.class_names is None else index.class_names[finding.proposed]
        values = (
            str(number), "remove" if finding.proposed is None else "relabel", str(index.files[finding.row]),
            index.class_of(finding.row) or "", str(proposed), finding.kind, f"{finding.score:.4f}", finding.reason,
            box_of(index, finding.row), "",
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """Rows as CSV with a header."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def read_decisions(where: str | Path) -> tuple[list[Change], int, int]:
    """Accepted changes of a table, and the numbers of rejected and of undecided ones.

    Rows about one finding count once, which a warning says; a decision goes before none.

    Raises:
      UserError: naming the file, the rows and what is wrong with them.
    """
    path = user_path(where)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path}: more than {_MOST_BYTES:,} bytes; not a table of decisions")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        text, separator = separated_rows(text, ",")
        table = list(csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator))
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table of decisions ({first_line(error)})") from error
    if not table or any(name not in table[0] for name in _NEEDED):
        raise UserError(f"{path}: needs the columns {', '.join(_NEEDED)}, as in changes.csv and decisions.csv of audit")
    decided: dict[tuple[str, ...], tuple[str, int]] = {}  # decision and row of each finding
    changes: dict[tuple[str, ...], Change] = {}
    again: list[int] = []
    for line, row in enumerate(table, 2):
        decision, action = (row["decision"] or "").strip().lower(), row["action"]
        if decision not in DECISIONS:
            raise UserError(f"{path}, row {line}: the decision {row['decision']!r} is none of accept, reject and empty")
        if action not in ("relabel", "remove") or (action == "relabel" and not row["proposed"]):
            raise UserError(f"{path}, row {line}: the action is relabel, with a class in proposed, or remove")
        key = _finding(row)
        before, first = decided.setdefault(key, (decision, line))
        changes[key] = Change(row["path"], action, row["proposed"] or "", row.get("box") or "")
        if first == line:
            continue
        if before and decision and before != decision:
            raise UserError(
                f"{path}, rows {first} and {line}: the same finding ({action} {printable(row['path'])}) is accepted "
                "and rejected; keep one of the rows"
            )
        again.append(line)
        if decision and not before:
            decided[key] = decision, line
    if again:
        rows = f"row {again[0]} is" if len(again) == 1 else f"{len(again):,} rows, the first row {again[0]}, are"
        warn(f"{path}: {rows} about the finding of another row and counted with it")
    count = Counter(decision for decision, _ in decided.values())
    return [changes[key] for key, (decision, _) in decided.items() if decision == "accept"], count["reject"], count[""]


def _finding(row: dict[str, str]) -> tuple[str, ...]:
    """What tells a finding from the others of a table: its number, or without one what it says."""
    told = ("id",) if row.get("id") else ("kind", "reason")
    return tuple(row.get(name) or "" for name in (*told, "action", "path", "proposed", "box"))


class Corrected(NamedTuple):
    """A corrected set.

    Attributes:
      paths: its images.
      classes: class of each, or its classes, separated as in a table.
      relabelled: number of images with another class than before.
      removed: names of the images that were removed.
      several: whether images have several classes.
      more: further columns of the list, by name: what a table said about the images.
      rows: row of each image in the index.
      unmade: a line for each kind of accepted change that made no difference, with a count and a name.
    """

    paths: list[str]
    classes: list[str]
    relabelled: int
    removed: list[str]
    several: bool = False
    more: dict[str, list[str]] = {}  # noqa: RUF012 (never changed)
    rows: Sequence[int] = ()
    unmade: tuple[str, ...] = ()


def apply(index: Index, changes: Sequence[Change]) -> Corrected:
    """The set with the changes; an image that is to be removed is removed, whatever else is decided about it.

    Of an image that the index has several times, as many are removed as removals were accepted, the last ones first.
    Accepted changes that make no difference are counted and named.

    Raises:
      UserError: for an image that the index lacks, two different classes for one image, or if nothing is left.
    """
    if index.class_names is None:
        raise UserError("the index has no classes, so no list with classes can be made of it")
    names = [str(name) for name in index.files]
    keys = [(name, box_of(index, row)) for row, name in enumerate(names)]
    known, gone = set(keys), Counter[tuple[str, str]]()
    new: dict[tuple[str, str], str] = {}
    repeated: list[str] = []
    for change in changes:
        key = change.path, change.box
        if key not in known:
            raise UserError(
                f"{change.path}: is not an image of the index; apply decisions to the index they were made for"
            )
        if change.action == "remove":
            gone[key] += 1
        elif index.embedded.sets is not None:
            raise UserError(f"{change.path}: images of the index have several labels, of which none can be replaced")
        elif key in new and new[key] != change.proposed:
            raise UserError(f"{change.path}: two classes are accepted, {new[key]} and {change.proposed}")
        elif key in new:
            repeated.append(change.path)
        else:
            new[key] = change.proposed
    kept, removed = [], []
    for row in reversed(range(len(keys))):
        if gone[keys[row]]:
            gone[keys[row]] -= 1
            removed.append(names[row])
        else:
            kept.append(row)
    kept.reverse()
    removed.reverse()
    if not kept:
        raise UserError("all images are removed; nothing is left")
    before = [_class_of(index, row) for row in kept]
    classes = [new.get(keys[row], old) for row, old in zip(kept, before, strict=True)]
    changed = sum(one != two for one, two in zip(before, classes, strict=True))
    several, left = index.embedded.sets is not None, {keys[row] for row in kept}
    moved = {keys[row] for row, one, two in zip(kept, before, classes, strict=True) if one != two}
    lines = (
        _line(
            [key[0] for key in new if key not in left],
            "image is removed and not",
            "images are removed and not",
            "relabelled",
        ),
        _line([key[0] for key in new if key in left - moved], "image has", "images have", "the accepted class already"),
        _line([key[0] for key in gone.elements()], "removal is", "removals are", "of an image that is removed anyway"),
        _line(repeated, "change of class is", "changes of class are", "accepted already"),
    )
    unmade = tuple(filter(None, lines))
    return Corrected([names[row] for row in kept], classes, changed, removed, several, _more(index, kept), kept, unmade)


def _line(paths: Sequence[str], one: str, many: str, what: str) -> str:
    """A count of images with the name of the first; empty if there are none."""
    if not paths:
        return ""
    return f"{len(paths):,} {one if len(paths) == 1 else many} {what}, {'the first ' * (len(paths) > 1)}{paths[0]}"


def _class_of(index: Index, row: int) -> str:
    """The class of an image, or all of them as a table has them."""
    names = index.classes_of(row)
    if index.embedded.sets is not None and (odd := next((name for name in names if SEVERAL in name), None)):
        raise UserError(f"{printable(odd)}: a list of several labels cannot hold a class with {SEVERAL!r}")
    return SEVERAL.join(names)


def _more(index: Index, rows: Sequence[int]) -> dict[str, list[str]]:
    """The other columns of a table with these rows."""
    found: dict[str, list[str]] = {}
    if index.boxes is not None:
        found["box"] = [box_of(index, row) for row in rows]
    if index.embedded.groups is not None:
        found["group"] = [str(index.embedded.groups[row]) for row in rows]
    if index.marked is not None:
        for place, name in enumerate(("is_query", "is_gallery")):
            found[name] = [str(bool(index.marked[row, place])).lower() for row in rows]
    return found


def write(corrected: Corrected, out: str | Path, encoded: Callable[[int], bytes | None] | None = None) -> Path:
    """Writes a corrected set: a list (``path,class`` and what else a table said), a table that holds the images
    themselves, or links, a folder per class.

    Args:
      corrected: the set.
      out: file that ends as a list, ``.parquet`` for a table with the images, or else a new folder.
      encoded: the encoded picture of a row of the index, or ``None``; for a table.

    Raises:
      UserError: for images that are no files, or for a table are not found; for names that a list or folder cannot hold
        or that are read otherwise than they are written; or if it cannot be written.
    """
    out = user_path(out)
    if out.suffix.lower() == ".parquet" and encoded is not None:
        _check_listed(corrected)
        _write_table(corrected, out, encoded)
        return out
    if (absent := next((path for path in corrected.paths if not is_file_name(path)), None)) is not None:
        raise UserError(
            f"{absent}: is not the path of a file, so no list or folder can name it; --out=corrected.parquet writes a "
            "table that holds the images"
        )
    told = ("label_sets",) * corrected.several + tuple(corrected.more)
    if out.suffix.lower() in TEXT:
        for name in (*corrected.paths, *corrected.classes, *corrected.more.get("group", ())):
            if any(mark in name for mark in "\r\n\t\0"):
                raise UserError(f"{printable(name)}: a list cannot hold a name with a tab, line break or zero byte")
        _check_listed(corrected)
        text = io.StringIO()
        separator = "," if out.suffix.lower() == ".csv" else "\t"
        table = csv.writer(text, delimiter=separator, lineterminator="\n", quoting=csv.QUOTE_ALL)
        columns = corrected.paths, corrected.classes, *corrected.more.values()
        header = "path", "labels" if corrected.several else "class", *corrected.more
        table.writerows([header, *zip(*columns, strict=True)])
        write_text(out, text.getvalue())
        return out
    if out.suffix.lower() in TABLES:
        raise UserError(f"--out={out}: a list ends in {', '.join(TEXT)}, a table with the images in .parquet")
    if told:
        raise UserError(f"{out}: a folder cannot hold {told[0]} of the images; give a list, e.g. corrected.csv")
    _check_foldered(corrected)
    with replace_folder(out) as folder:
        for row, (path, name) in enumerate(zip(corrected.paths, corrected.classes, strict=True)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{row:06d}_{Path(path).name}").symlink_to(path)
    return out


def _write_table(corrected: Corrected, out: Path, encoded: Callable[[int], bytes | None]) -> None:
    """Writes the images and their classes as Parquet."""
    pa = arrow()
    texts = {"labels" if corrected.several else "class": corrected.classes, **corrected.more}
    schema = pa.schema([("image", pa.binary()), *((name, pa.string()) for name in texts)])
    total = 0
    with atomic(out) as file, pa.parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(corrected.paths), _TABLE_ROWS):
            part = slice(start, start + _TABLE_ROWS)
            images = [encoded(row) for row in corrected.rows[part]]
            if None in images:
                absent = corrected.paths[start + images.index(None)]
                raise UserError(f"{printable(absent)}: the image is not found, so no table can hold it")
            total += sum(len(image) for image in images if image is not None)
            if total > MAX_PARQUET_BYTES:
                raise UserError(f"{out}: more than {MAX_PARQUET_BYTES / 2**30:.0f} GiB of images, too much for a table")
            columns = [pa.array(images, pa.binary()), *(pa.array(column[part]) for column in texts.values())]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _check_listed(corrected: Corrected) -> None:
    """Refuses names that a list is not read with: blank ones, and of several labels those that spaces surround."""
    for name in dict.fromkeys(corrected.classes):
        if corrected.several and (odd := next((part for part in name.split(SEVERAL) if part != part.strip()), None)):
            raise UserError(
                f"the class {printable(odd)!r} begins or ends with a space, which a list of several labels cannot hold"
            )
        if name and not name.strip():
            raise UserError(f"the class {printable(name)!r} is blank, which a list cannot hold; give a new folder")


def _check_foldered(corrected: Corrected) -> None:
    """Refuses what a folder cannot hold, or what would not be read from it as it is, by the rules of the reader."""
    names = sorted(set(corrected.classes))
    instead = "give a list, e.g. out.csv"
    for name in names:
        if not name or "/" in name or "\0" in name:
            raise UserError(f"the class {printable(name)!r} cannot be the name of a folder; {instead}")
        if folders.is_litter(name):
            raise UserError(
                f"the class {printable(name)!r} cannot be the name of a folder, as hidden and system folders of such "
                f"names are not read; {instead}"
            )
    if splits := sorted(name for name in names if name.lower() in folders.SPLIT_NAMES):
        try:
            arranged = bool(folders.arrange([f"{name}/0" for name in names], "").depth)
        except UserError:
            arranged = True
        if arranged:
            raise UserError(f"folders of the classes {', '.join(splits)} would be read as those of splits; {instead}")
    odd = next((path for path in corrected.paths if not folders.is_image(path)), None)
    if odd is not None:
        raise UserError(f"{printable(odd)}: without the extension of an image it is not read in a folder; {instead}")
