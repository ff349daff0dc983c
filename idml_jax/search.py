"""Finds the images nearest to a query and estimates how likely the answer is correct.

    python -m idml_jax.search --index=photos.npz --query=bird.jpg -k 10
    python -m idml_jax.search --index=photos.npz --query=FOLDER --abstain=0.95 --held_out=other.npz --out=answers.html

The index is a file or a gallery (a folder of parts) of ``python -m idml_jax.embed``; queries are an image, a folder, a
list, or another such file. The search is exact, by the semantic distance; an image does not find itself. A gallery
larger than ``--memory`` is searched block by block; ``--ann`` searches it approximately, by faiss, and prints the
recall. ``--exclude`` leaves out images of the index. ``--out`` ends in ``.jsonl``, ``.html`` or
``.png``; without it a table is printed.

The answer is the class of the nearest image, with two probabilities: ``known``, that the query's class is in the index
at all, and ``sure``, that the answer is right. Logistic models compute them from the vote of the nearest images for
their classes, distances, margins and the uncertainty. They are fitted on images of known classes that the network was
not trained on: ``--held_out`` (a file or a folder of class folders), which search each other and the index, once with
and once without their own class; or else on the index itself. ``--abstain=0.95`` leaves out the least sure answers, so
that 95% of the others are right; ``--strangers=0.01`` answers at most 1% of the queries whose class the index lacks.

In Python the module is a function: ``idml_jax.search(queries, index, k)``, see ``idml_jax.inference.use``.
"""

import argparse
import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idml_jax.errors import UserError, printable, run_command, warn
from idml_jax.inference.choices import EXAMPLES, MEMORY
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.files import check_result, user_path, write_bytes
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import tell

if TYPE_CHECKING:
    from idml_jax.inference.search import Answers, calibrate, search
    from idml_jax.reporting.answers import as_html, as_png, as_table, picture_reader, records

__all__ = ["Answers", "as_html", "as_png", "as_table", "calibrate", "main", "picture_reader", "records", "search"]


_SEARCH, _ANSWERS = ("Answers", "calibrate", "search"), ("as_html", "as_png", "as_table", "picture_reader", "records")
__getattr__ = late(__name__, dict.fromkeys(_SEARCH, "inference.search") | dict.fromkeys(_ANSWERS, "reporting.answers"))
make_callable(__name__, "inference.use:search")  # idml_jax.search("bird.jpg", "photos.npz")

FORMATS = (".jsonl", ".html", ".png")


def _search(given: dict[str, Any]) -> None:
    out = user_path(given["out"]) if given["out"] else None
    if out is not None:
        check_result(out, (given[name] for name in ("index", "query", "held_out", "distractors")), FORMATS)
    if given["k"] < 1:
        raise UserError(f"-k {given['k']} must be at least 1")
    if given["memory"] < 0:
        raise UserError(f"--memory={given['memory']}: MiB, at least 0")
    for name, what in (("abstain", "of right answers"), ("strangers", "of answered strangers")):
        if given[name] is not None and not 0 < given[name] < 1:
            raise UserError(f"--{name}={given[name]}: a share {what}, above 0 and below 1")
    with loading():
        from idml_jax.inference import exclude
        from idml_jax.inference.gallery_search import confidence_near, near, open_searched
        from idml_jax.inference.held_out import Files
        from idml_jax.inference.index import check_comparable
        from idml_jax.inference.reranking import parse, rerank
        from idml_jax.inference.search import load_model, open_index, search
        from idml_jax.inference.sureness import Confidence, Wanted, confidence_for, note_of, outcome, rule_for, scored
        from idml_jax.reporting.answers import SHEET_ROWS, as_html, as_png, as_table, noting, picture_reader, records

    steps = parse(given["rerank"])
    if steps and (given["abstain"] is not None or given["strangers"] is not None or given["held_out"]):
        raise UserError(
            "--rerank changes the answers, whose confidence is of the nearest image: leave out --abstain, --strangers "
            "and --held_out"
        )
    if given["distractors"] and not given["held_out"]:
        raise UserError("--distractors are for the images of --held_out, which is not given")
    say = tell
    rules = tuple(exclude.parse(given["exclude"]))
    searched = open_searched(given["index"], rules, memory=given["memory"], ann=given["ann"], say=say)
    partly = searched.gallery is not None
    if partly and (steps or given["balanced"]):
        what = "--rerank needs" if steps else "--balanced needs the class sizes of"
        raise UserError(f"{what} the whole gallery in memory; leave it out, or give a larger --memory without --ann")
    if searched.ann is not None:
        say(str(searched.ann))
    model = functools.cache(lambda: load_model(searched.head, given["workdir"], warn))
    queries = open_index(given["query"], "--query", model)
    check_comparable(queries, searched.head, given["query"], given["index"])
    if out is not None:
        check_result(out, (name for name in queries.files.tolist() if Path(name).name == out.name))
    if searched.head.embedded.sets is not None:
        warn(f"{given['index']}: in votes, images with several labels count as the class of their first")
    if searched.head.embedded.groups is not None:
        warn(
            f"{given['index']}: its groups are for evaluate; a search also finds images of the query's class and group"
        )
    seen = near(searched, queries, given["k"], keep_same=given["keep_same"], say=say)
    index, own = seen.images, seen.own
    k = min(given["k"], len(seen.whole) - (seen.whole_own is not None))
    if k < 1:
        raise UserError(f"{given['index']}: holds nothing but the query")
    files = Files(given["held_out"], given["distractors"])
    wanted = Wanted(given["abstain"], given["strangers"], given["balanced"])
    found = rerank(steps, queries.embedded, index.embedded, k, own) if steps else None

    def confident(names: Collection[str]) -> Confidence:
        if steps:
            return Confidence(None, f"re-ranked by {given['rerank']}")
        if partly:
            return confidence_near(files, searched, given["index"], model, names, wanted, queries)
        return confidence_for(files, index, given["index"], model, names, wanted, queries)

    scores, setting, sureness = scored(queries, index, own, confident)
    rule = rule_for(sureness, scores, wanted)
    answers = search(
        queries.embedded,
        index.embedded,
        k,
        own=own,
        metric=index.metric,
        calibrated=sureness.calibrated,
        scores=scores,
        rule=rule,
        setting=setting,
        found=found,
    )
    rows = records(queries, index, answers, own)
    nearest = seen.rows[answers.index[:, 0]]
    came_out = outcome(queries, seen.whole, seen.whole_own, nearest, answers.answered)
    said = note_of(sureness, rule, wanted), came_out
    note = printable("; ".join(part for part in said if part))
    note = f"{len(seen.whole):,} images searched for {len(rows):,}; {note}"
    if out is None:
        print(as_table(rows))
        print(note)
        return
    workdir = given["workdir"] or str(index.about.get("workdir", ""))
    if out.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        missing: list[str] = []
        noted = lambda side: noting(picture_reader(side, workdir), missing)
        readers = noted(queries), noted(index)
        content = as_html(rows, *readers, note).encode() if out.suffix == ".html" else as_png(rows, *readers)
        if missing:
            reason = f"as their files are gone or broken, the first {printable(missing[0])}"
            warn(f"{len(missing):,} pictures cannot be shown, {reason}")
    write_bytes(out, content)
    print(note)
    left = f" (the first {SHEET_ROWS})" if out.suffix == ".png" and len(rows) > SHEET_ROWS else ""
    print(f"{int(answers.answered.sum()):,} of {len(rows):,} answered{left}: {printable(out)}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--index", required=True, help="file (.npz, .parquet) or gallery of idml_jax.embed to search")
    parser.add_argument("--query", required=True, help="image, folder, list, or file of embeddings")
    parser.add_argument("-k", type=int, default=10, help="number of neighbours per query")
    parser.add_argument(
        "--workdir", default="", help="run folder that embeds queries; default: the one the index names"
    )
    parser.add_argument("--held_out", default="", help="embeddings or class folders to fit the confidence on")
    parser.add_argument(
        "--distractors", default="",
        help="with --held_out: images of other classes that the held-out images search, too, best the training images",
    )  # fmt: skip
    parser.add_argument("--abstain", type=float, help="required share of correct answers, e.g. 0.95")
    parser.add_argument("--strangers", type=float, help="share of queries of unknown classes that may get an answer")
    parser.add_argument("--balanced", action="store_true", help="votes count less for classes with many images")
    parser.add_argument("--rerank", default="", help=f"re-ranking, e.g. {EXAMPLES}; without a confidence")
    parser.add_argument("--keep_same", action="store_true", help="let an image find itself")
    parser.add_argument(
        "--exclude", action="append", default=[],
        help="images to leave out: a list of files, a pattern such as '*/drafts/*', or class=NAME; may be repeated",
    )  # fmt: skip
    parser.add_argument("--ann", action="store_true", help="approximate search of a gallery, by faiss")
    parser.add_argument(
        "--memory", type=int, default=MEMORY, help="MiB of vectors up to which a gallery is read whole, else in blocks"
    )
    parser.add_argument("--out", default="", help="file to write, .jsonl, .html or .png; default: print a table")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _search(given))


if __name__ == "__main__":
    main()
