"""Tables in any format as named columns: text with separators, JSON lines, Parquet, and data sets that the package
``datasets`` of Hugging Face saved on disk (read by pyarrow alone)."""

import json
import os
import re
from collections.abc import Collection, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from idml_jax.data import files, folders
from idml_jax.errors import UserError
from idml_jax.runtime.files import first_line

TEXT = (".txt", ".tsv", ".csv", ".lst")
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (*TEXT, *JSON_LINES, ".parquet")
MAX_BYTES = 2**30
# Images in a Parquet file are held in memory; a data set saved on disk is mapped.
MAX_PARQUET_BYTES = 2**32
_PLACE = re.compile(r"(.+)(, (?:row|line) [\d,]+)")
_SET, _SETS, _STATE = "dataset_info.json", "dataset_dict.json", "state.json"


class Table(NamedTuple):
    """A table.

    Attributes:
      where: its file or folder.
      columns: the wanted columns by their names in lower case, each with a value per row; ``None``: empty.
      lines: number of each row in the file, from 1.
      unit: what such a number counts: ``line`` or ``row``.
      others: names of the other columns.
      images: the images that are stored in the table itself, if there are any.
      class_names: names of the classes in columns of numbers, by column.
    """

    where: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    unit: str
    others: list[str]
    images: "StoredImages | None" = None
    class_names: dict[str, list[str]] = {}  # noqa: RUF012 (never changed)

    def place(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{files.shown(self.where)}, {self.unit} {self.lines[row]:,}"


def row_of_a_table(name: str) -> tuple[str, str] | None:
    """The file and the rest of a name that ``Table.place`` gave an image of a table; ``None`` for another name."""
    found = _PLACE.fullmatch(name)
    return None if found is None else (found[1], found[2])


def is_file_name(name: str) -> bool:
    """Whether an image of this name is a file of its own, there or not: no record of a data set, no row of a table."""
    return os.path.isabs(name) and (row_of_a_table(name) is None or os.path.exists(name))


def is_table(where: str | os.PathLike) -> bool:
    """Whether a path is that of a table: a file with one of the endings of ``TABLES``, or a data set saved on disk."""
    path = Path(where)
    return (path.suffix.lower() in TABLES and not path.is_dir()) or is_saved_set(path)


def is_saved_set(path: Path) -> bool:
    """Whether a folder holds a data set that Hugging Face's ``save_to_disk`` wrote."""
    return (path / _SETS).is_file() or ((path / _SET).is_file() and (path / _STATE).is_file())


def read(path: Path, wanted: Set[str], path_names: Collection[str], option: str) -> Table:
    """Reads a table.

    Args:
      path: its file, or the folder of a saved data set.
      wanted: names of the columns to read, in lower case.
      path_names: those of them that hold paths; a text file without a header has the columns path and label.
      option: name of the option, for messages.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    shown, suffix = files.shown(path), path.suffix.lower()
    try:
        if path.is_dir():
            table = _saved_set(path, wanted)
        elif suffix == ".parquet":
            table = _parquet(path, wanted)
        elif suffix in JSON_LINES:
            table = _json_lines(path, wanted, option)
        else:
            table = _text(path, wanted, path_names, option)
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{shown}: does not fit into memory ({option})") from error
    except Exception as error:  # damaged files can make the libraries raise anything
        raise UserError(f"{shown}: cannot be read as a table ({first_line(error)}) ({option})") from error
    if not len(table.lines):
        raise UserError(f"{shown}: lists no images ({option})")
    return table


def _text(where: Path, wanted: Set[str], path_names: Collection[str], option: str) -> Table:
    shown = files.shown(where)
    problem = f"{shown}: cannot be read as a list of paths; it is not UTF-8 text ({option})"
    lines = files.read_text(where, MAX_BYTES, problem).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    # Spaces of ASCII alone: a file may be named by others.
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip(" \t\n\r\v\f")]
    separator = named_separator(numbered[0][1]) if numbered else None
    if separator is not None:
        numbered = numbered[1:]
    if not numbered:
        raise UserError(f"{shown}: lists no images ({option})")
    separator = separator or _separator(where, [line for _, line in numbered[:100]], wanted, path_names)
    rows = [_cells(line, separator, f"{shown}, line {number}") for number, line in numbered]
    numbers = [number for number, _ in numbered]
    header = [cell.strip().lower() for cell in rows[0]]
    if _is_header(header, rows[1:101], wanted, path_names):
        _check_header(header, wanted, path_names, f"{shown}, line {numbers[0]}", option)
        rows, numbers = rows[1:], numbers[1:]
        surplus = (
            f" for the {len(header)} columns of the header; a value that holds the separator {separator!r} must be in "
            "double quotes"
        )
    else:
        header = ["path", "label"]
        surplus = (
            ", while a table without a header has a path and a class in each line; further columns need a first line "
            "that names all of them: path, label, split, ..."
        )
    for number, row in zip(numbers, rows, strict=True):
        if any(row[len(header) :]):
            raise UserError(f"{shown}, line {number}: {len(row)} values{surplus} ({option})")
    columns = {
        name: [row[place] if place < len(row) else "" for row in rows]
        for place, name in enumerate(header)
        if name in wanted
    }
    return Table(where, columns, numbers, "line", [name for name in header if name and name not in wanted])


def named_separator(line: str) -> str | None:
    """The separator that a first line such as ``sep=;`` names, as spreadsheets write it."""
    found = re.fullmatch(r'"?sep=([,;|\t])"?\s*', line, re.IGNORECASE)
    return found[1] if found else None


def separated_rows(text: str, usual: str) -> tuple[str, str]:
    """The text of a table with a header, without a line such as ``sep=;``, and its separator.

    A spreadsheet may have saved it with another separator than it was written with.

    Args:
      text: the text.
      usual: the separator that it was written with.
    """
    first, _, rest = text.partition("\n")
    if (named := named_separator(first)) is not None:
        return rest, named
    return text, max((usual, *",;\t"), key=first.count)


def _is_header(first: Sequence[str], others: list[list[str]], wanted: Set[str], paths: Collection[str]) -> bool:
    """Whether the cells of a first line, in lower case, name columns; that of the paths may have an unknown name."""
    if any(folders.is_image(cell) for cell in first):
        return False
    if any(cell in paths for cell in first):
        return True
    known = 0 if any("/" in cell for cell in first) else sum(cell in wanted for cell in first)
    # A file without an extension may be of a class that is called as a column is, such as "camera".
    return known > 1 or (known == 1 and any(folders.is_image(cell) for row in others for cell in row))


def _check_header(
    header: Sequence[str], wanted: Set[str], path_names: Collection[str], place: str, option: str
) -> None:
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{place}: has two columns {twice!r}")
    if not any(name in path_names for name in header):
        named = ", ".join(name for name in header if name in wanted)
        raise UserError(
            f"{place}: names columns ({named}), but none with the paths of the images, which is called one of "
            f"{', '.join(path_names)} ({option})"
        )


def _separator(where: Path, lines: list[str], wanted: Set[str], path_names: Collection[str]) -> str:
    """The column separator: in a ``.csv`` file the one of most lines; otherwise a tab if there is one, or the comma or
    semicolon that follows a path with an image extension in every line, except the names of columns in the first."""
    if where.suffix.lower() == ".csv":
        counts = {separator: sum(separator in line for line in lines) for separator in ",;\t"}
        return max(counts, key=lambda separator: counts[separator])
    if any("\t" in line for line in lines) or where.suffix.lower() == ".tsv":
        return "\t"
    for separator in ",;":
        first = [line.split(separator)[0].strip().strip('"') for line in lines if separator in line]
        fits = [folders.is_image(cell) or cell.lower() in path_names for cell in first]
        header = [cell.strip().strip('"').lower() for cell in lines[0].split(separator)]
        if len(fits) == len(lines) and all(fits[1:]) and (fits[0] or not wanted.isdisjoint(header)):
            return separator
    return "\t"


def _cells(line: str, separator: str, where: str) -> list[str]:
    """The values of a line, without quotes and the spaces around them; inside quotes, spaces belong to the value."""
    if '"' not in line:
        return [cell.strip() for cell in line.split(separator)]
    cell = re.compile(rf' *"((?:[^"]|"")*)" *(?={separator}|$)|([^{separator}]*)')
    cells, place = [], 0
    while place <= len(line):
        match = cell.match(line, place)
        assert match is not None  # it may be empty
        quoted, plain = match.groups()
        if plain is not None and plain.strip().startswith('"'):
            raise UserError(f"{where}: its quotes are not balanced; a value cannot hold a line break")
        cells.append(plain.strip() if plain is not None else quoted.replace('""', '"'))
        place = match.end() + 1
    return cells


def _json_lines(where: Path, wanted: Set[str], option: str) -> Table:
    shown = files.shown(where)
    text = files.read_text(where, MAX_BYTES, f"{shown}: is not UTF-8 text ({option})")
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{shown}, line {number}: is not JSON ({first_line(error)}) ({option})") from error
        if not isinstance(row, dict):
            raise UserError(f"{shown}, line {number}: is {type(row).__name__}, not a JSON object ({option})")
        rows.append({name.lower(): value for name, value in row.items()})
        numbers.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names if name in wanted}
    return Table(where, columns, numbers, "line", [name for name in names if name not in wanted])


def arrow() -> ModuleType:
    """pyarrow with its modules for Parquet and for columns.

    Raises:
      UserError: if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet file needs pyarrow, which is not installed; pip install pyarrow") from error
    return pyarrow


def _parquet(where: Path, wanted: Set[str]) -> Table:
    pa = arrow()
    files.check_size(where.stat().st_size, files.shown(where), MAX_PARQUET_BYTES)
    with pa.parquet.ParquetFile(where) as file:
        schema = file.schema_arrow
        names = [name for name in schema.names if name.lower() in wanted]
        # Sizes in the metadata are not used: if they are damaged, pyarrow aborts the whole process.
        batches = list(file.iter_batches(1024, columns=names))
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    table = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in names]))
    others = [name for name in schema.names if name not in names]
    return _of_arrow(where, [(table, "")], about, others, None)


def _saved_set(where: Path, wanted: Set[str]) -> Table:
    """A data set, or several by the name of their split, as ``save_to_disk`` writes them."""
    parts = {"": where}
    if (where / _SETS).is_file():
        names = json.loads(files.read_file(where / _SETS, MAX_BYTES)).get("splits", [])
        parts = {str(name): where / Path(str(name)).name for name in names}
    about: dict[str, Any] = {}
    tables, mapped, others = [], [], []
    for split, folder in parts.items():
        state = json.loads(files.read_file(folder / _STATE, MAX_BYTES))
        about = json.loads(files.read_file(folder / _SET, MAX_BYTES)).get("features") or about
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise UserError(f"{files.shown(folder)}: rows are chosen by an index; save .flatten_indices() of the set")
        for entry in state.get("_data_files", []):
            mapped.append(folder / Path(str(entry["filename"])).name)
            table = _mapped(mapped[-1])
            names = [name for name in table.column_names if name.lower() in wanted]
            others = [name for name in table.column_names if name not in names]
            tables.append((table.select(names), split))
    if not tables:
        raise UserError(f"{files.shown(where)}: names no files of data ({_STATE})")
    return _of_arrow(where, tables, about, others, mapped)


def _mapped(path: Path) -> Any:
    """The rows of an Arrow file, mapped into memory."""
    pa = arrow()
    files.open_file(path).close()  # one line for what is no file
    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    table.validate()
    return table


def _of_arrow(
    where: Path, tables: list[tuple[Any, str]], about: dict[str, Any], others: list[str], mapped: list[Path] | None
) -> Table:
    pa = arrow()
    columns: dict[str, list[Any]] = {}
    stored = None
    for name in tables[0][0].column_names:
        kind = tables[0][0].schema.field(name).type
        pictures = pa.types.is_struct(kind) and {"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)}
        if pictures or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            held = [table.column(name) for table, _ in tables] if mapped is None else None
            stored = StoredImages(name, mapped or [], held, [len(table) for table, _ in tables])
            columns[name.lower()] = stored.names()
        else:
            columns[name.lower()] = [value for table, _ in tables for value in table.column(name).to_pylist()]
    if len({split for _, split in tables}) > 1 or tables[0][1]:
        columns["split"] = [split for table, split in tables for _ in range(len(table))]
    known = {
        name.lower(): [str(x) for x in feature["names"]]
        for name, feature in about.items()
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }
    return Table(where, columns, range(1, sum(len(t) for t, _ in tables) + 1), "row", others, stored, known)


class StoredImages:
    """Encoded images in a column of an Arrow table.

    Args:
      column: name of the column, of bytes or of structs of ``bytes`` and ``path``.
      mapped: Arrow files that are mapped into memory when images are read.
      held: the column's parts in memory, instead of files.
      counts: number of rows of each file or part.
    """

    def __init__(self, column: str, mapped: Sequence[Path], held: list[Any] | None, counts: Sequence[int]):
        self._column, self._mapped, self._held = column, list(mapped), held
        self._starts = np.cumsum([0, *counts])
        self._opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # mapped again in another process

    def _part(self, which: int) -> Any:
        if self._held is not None:
            return self._held[which]
        if which not in self._opened:
            self._opened[which] = _mapped(self._mapped[which]).column(self._column)
        return self._opened[which]

    @property
    def in_memory(self) -> bool:
        """Whether the images are held in memory, not in files that are mapped."""
        return self._held is not None

    def names(self) -> list[str | None]:
        """The path of each image, where one is known."""
        found: list[str | None] = []
        for which in range(len(self._starts) - 1):
            part = self._part(which)
            kind = part.type
            if not hasattr(kind, "num_fields") or not kind.num_fields or kind.get_field_index("path") < 0:
                found += [None] * len(part)
            else:
                found += arrow().compute.struct_field(part, "path").to_pylist()
        return found

    def read(self, row: int) -> bytes | None:
        """The encoded image of a row; ``None`` if only its path is stored."""
        which = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._part(which)[row - int(self._starts[which])].as_py()
        return value.get("bytes") if isinstance(value, dict) else value
