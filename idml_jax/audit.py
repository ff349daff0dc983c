"""Finds wrong labels, near-duplicates, leaks and junk in a set of images, and makes the corrected set.

    python -m idml_jax.audit --index=train.npz --against=test.npz --out=audited
    python -m idml_jax.audit --index=train.npz --apply=decisions.csv --out=corrected.csv

The index is a file or a gallery of ``python -m idml_jax.embed``. ``--out`` is a new folder with ``sheet.html``, on
which you go through the findings with the keyboard and save ``decisions.csv``; ``changes.csv``, the same as a table,
whose column ``decision`` can be filled in by hand (``accept`` or ``reject``); and ``findings.jsonl``.

``--apply`` makes the accepted changes. ``--out`` is then a list (``.csv``, ``.tsv``, ``.txt``) with a path and a class
per line, a table that holds the images themselves (``.parquet``), or a new folder of links with a folder per class, for
training.

In Python the module is a function: ``idml_jax.audit(index)``, see ``idml_jax.inference.audit``.
"""

import argparse
import dataclasses
import functools
import json
import shlex
from typing import TYPE_CHECKING, Any

from idml_jax.errors import UserError, run_command
from idml_jax.inference.choices import MOST, NEAR, SCORES
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.files import check_result, replace_folder, user_path
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import say_next, tell

if TYPE_CHECKING:
    from idml_jax.inference.audit import Audit, audit
    from idml_jax.inference.index import Index

__all__ = ["Audit", "audit", "main"]

__getattr__ = late(__name__, dict.fromkeys(("Audit", "audit"), "inference.audit"))
make_callable(__name__, "inference.audit:audit")  # idml_jax.audit(index)


def _records(index: "Index", other: "Index | None", found: "Audit") -> str:
    """The findings as JSON lines."""
    from idml_jax.inference import corrections

    lines = []
    for row, finding in zip(corrections.as_rows(index, found.findings), found.findings, strict=True):
        del row["decision"]
        beside = []
        for image in finding.beside:
            source = other if image.other and other is not None else index
            place = {"path": str(source.files[image.row]), "box": corrections.box_of(source, image.row)}
            beside.append({**place, "other_set": image.other})
        lines.append(json.dumps({**row, "score": finding.score, "beside": beside}) + "\n")
    return "".join(lines)


def _audit(given: dict[str, Any]) -> None:
    out = user_path(given["out"])
    for name in ("near", "unusual", "most"):
        if not given[name] >= 0:  # NaN is not, either
            raise UserError(f"--{name}={given[name]} must not be below 0")
    if given["apply"] and not out.is_dir():
        check_result(out, (given["apply"], given["index"]))
    if not given["apply"] and out.exists():
        raise UserError(f"{out} already exists; give a new folder (--out)")
    with loading():
        from idml_jax.data.tables import is_file_name
        from idml_jax.inference import corrections
        from idml_jax.inference.audit import KINDS, audit, count_of
        from idml_jax.inference.encoded import encoded_reader
        from idml_jax.inference.gallery import read_stored
        from idml_jax.inference.trained_on import warn_of_audited_training_images
        from idml_jax.reporting.answers import picture_reader
        from idml_jax.reporting.audit_sheet import sheet

    index = read_stored(given["index"], "--index")
    workdir = str(given["workdir"] or index.about.get("workdir", ""))
    if given["apply"]:
        changes, rejected, open_ = corrections.read_decisions(given["apply"])
        corrected = corrections.apply(index, changes)
        encoded = functools.cache(lambda: encoded_reader(index, workdir))  # reads what a table alone needs
        corrections.write(corrected, out, lambda row: encoded()(str(index.files[row]), index.box_of(row)))
        have = "image has" if corrected.relabelled == 1 else "images have"
        tell(
            f"{len(changes):,} {'change' if len(changes) == 1 else 'changes'} accepted, {rejected:,} rejected, "
            f"{open_:,} undecided (not made): {corrected.relabelled:,} {have} another class, "
            f"{len(corrected.removed):,} {'is' if len(corrected.removed) == 1 else 'are'} removed"
        )
        for line in corrected.unmade:
            tell(line)
        tell(f"{len(corrected.paths):,} {'image' if len(corrected.paths) == 1 else 'images'} in {out}")
        return
    other = read_stored(given["against"], "--against") if given["against"] else None
    at_its_place = dataclasses.replace(index, about={**index.about, "workdir": workdir})
    warn_of_audited_training_images(at_its_place, str(given["index"]))
    readers = picture_reader(index, workdir), picture_reader(other or index, workdir)
    found = audit(
        index,
        other,
        near=given["near"],
        score=given["score"],
        most=given["most"],
        unusual=given["unusual"],
        picture=readers[0] if given["pixels"] else None,
    )
    with replace_folder(out) as folder:
        write = lambda name, text: (folder / name).write_text(text, "utf-8", "surrogateescape")
        write("findings.jsonl", _records(index, other, found))
        write("changes.csv", corrections.as_csv(corrections.as_rows(index, found.findings)))
        write("sheet.html", sheet(index, other, found, readers, str(given["index"])))
    for kind, count in count_of(found.findings).items():
        if (kind != "leak" or other is not None) and (kind != "blank" or given["pixels"]):
            tell(f"{count:6,}  {kind}: {KINDS[kind]}")
    for note in found.notes:
        tell(note)
    tell(f"go through them on {out / 'sheet.html'}, save decisions.csv there, then:")
    index_name = shlex.quote(str(given["index"]))
    ending = "csv" if all(map(is_file_name, map(str, index.files))) else "parquet"
    say_next(f"python -m idml_jax.audit --index={index_name} --apply=decisions.csv --out=corrected.{ending}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--index", required=True, help="file (.npz, .parquet) or gallery of idml_jax.embed")
    parser.add_argument(
        "--against", default="", help="another set, which must share no image with it, e.g. the test set"
    )
    parser.add_argument("--out", required=True, help="new folder; with --apply a list, table or new folder")
    parser.add_argument("--apply", default="", help="decisions.csv, or changes.csv with decisions filled in")
    parser.add_argument("--score", default=SCORES[0], choices=SCORES, help="order of the wrong labels")
    parser.add_argument(
        "--near", type=float, default=NEAR, help="largest distance of copies, as a share of the usual one"
    )
    parser.add_argument("--unusual", type=float, default=0.01, help="share of the images to list as unusual")
    parser.add_argument("--most", type=int, default=MOST, help="largest number of findings of each kind")
    parser.add_argument("--pixels", action="store_true", help="also read all pictures, to find empty ones")
    parser.add_argument(
        "--workdir", default="", help="run folder that shows images of its own data; default: the one the index names"
    )
    given = vars(parser.parse_args(argv))
    run_command(lambda: _audit(given))


if __name__ == "__main__":
    main()
