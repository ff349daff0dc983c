"""Formats the answers of a search as a table, records, a page or a contact sheet."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import numpy as np
from jaxtyping import Int, UInt8
from markupsafe import Markup

from idml_jax.errors import printable
from idml_jax.inference import embed
from idml_jax.inference import model as trained
from idml_jax.inference.search import Answers
from idml_jax.inference.store import Index
from idml_jax.reporting import html as pages
from idml_jax.reporting.thumbnails import thumbnail
from idml_jax.runtime.files import without_nan

SHEET_ROWS = 40
OPEN = 60  # answered queries that a page shows unfolded; the others are folded by as many
Reader = Callable[[str], UInt8[np.ndarray, "h w 3"] | None]  # thumbnail of the image with a name
Near = TypedDict(
    "Near",
    {
        "file": str,
        "class": str | None,
        "distance": float,
        "introspective_distance": float | None,
        "speaks": bool,  # for the answer: it is of the answer's class
    },
)
Share = TypedDict("Share", {"class": str | None, "share": float})
VOTES = 5  # classes listed
Row = TypedDict(
    "Row",
    {
        "query": str,
        "class": str | None,
        "answer": str | None,
        "sure": float | None,
        "known": float | None,
        "votes": list[Share],
        "uncertainty": float | None,
        "margin": float | None,
        "answered": bool,
        "neighbours": list[Near],
    },
)


def records(queries: Index, index: Index, answers: Answers, own: Int[np.ndarray, "n"] | None = None) -> list[Row]:
    """One JSON-serialisable dictionary per query; neighbours are left out if the query is not answered.

    If the class of a query is unknown, that of its row ``own`` of the index is used.
    """

    def known_class(i: int) -> str | None:
        if own is not None and own[i] >= 0 and queries.class_names is None:
            return index.class_of(int(own[i]))
        return queries.class_of(i)

    optional = lambda column, i: None if column is None else float(column[i])
    rows = []
    for i, file in enumerate(queries.files):
        near = [
            {
                "file": str(index.files[row]),
                "class": index.class_of(row),
                "distance": float(answers.distance[i, j]),
                "introspective_distance": optional(answers.introspective, (i, j)),
                "speaks": index.class_names is not None
                and bool(index.embedded.labels[row] == index.embedded.labels[answers.index[i, 0]]),
            }
            for j, row in enumerate(answers.index[i].tolist())
        ]
        rows.append(
            {
                "query": str(file),
                "class": known_class(i),
                "answer": index.class_of(int(answers.index[i, 0])) if answers.answered[i] else None,
                "sure": optional(answers.sure, i),
                "known": optional(answers.known, i),
                "votes": _votes(index, answers, i) if answers.answered[i] else [],
                "uncertainty": optional(answers.uncertainty, i),
                "margin": optional(answers.margin, i),
                "answered": bool(answers.answered[i]),
                "neighbours": near if answers.answered[i] else [],
            }
        )
    return without_nan(rows)


def _votes(index: Index, answers: Answers, query: int) -> list[Share]:
    """The classes with the largest shares of the vote."""
    if answers.vote is None or answers.voters is None:
        return []
    listed = [place for place in answers.vote.places[query].tolist() if answers.vote.first[query, place]]
    return [
        {
            "class": index.class_of(int(answers.voters[query, place])),
            "share": float(answers.vote.share[query, place]),
        }
        for place in listed[:VOTES]
    ]


def as_table(rows: list[Row]) -> str:
    """For a terminal."""
    lines = []
    for row in rows:
        lines.append(f"{printable(row['query'])}   {'   '.join(_facts(row))}")
        for place, near in enumerate(row["neighbours"], 1):
            inner = near["introspective_distance"]
            shown = "" if inner is None else f"  D {inner:.3f}"
            named = f"{printable(near['class'] or '')}  {printable(near['file'])}"
            lines.append(f"  {place:3d}  distance {near['distance']:.3f}{shown}  {named}")
    return "\n".join(lines)


def _facts(row: Row) -> list[str]:
    facts = [] if row["answered"] else ["no answer"]
    if row["answer"] is not None:
        facts.append(f"answer {printable(row['answer'])}")
    values = (
        (row["sure"], "sure {:.0%}"),
        (row["known"], "known {:.0%}"),
        (row["uncertainty"], "|u| {:.2f}"),
        (row["margin"], "margin {:.3f}"),
    )
    return facts + [form.format(value) for value, form in values if value is not None]


def picture_reader(index: Index, workdir: str) -> Reader:
    """A function from the name of a row to its thumbnail; a run's own images are read from its data."""
    split = str(index.about.get("images", "")).partition("split:")[2]
    if split not in embed.SPLITS:  # a file from elsewhere may hold any name
        return lambda file: thumbnail(Path(file).read_bytes()) if os.path.isfile(file) else None
    source = embed.split_source(trained.load(workdir), split)
    known = {source.name(record): record for record in range(len(source))}
    return lambda file: thumbnail(source.read(known[file])) if file in known else None


def as_html(rows: list[Row], read_query: Reader, read: Reader, note: str) -> str:
    """An HTML page with the queries and their answers; queries without an answer come last, folded."""
    from idml_jax.reporting import plots  # loads matplotlib, which a table does without

    encode = lambda pixels: None if pixels is None else plots.encode(pixels)

    def tiles(row: Row) -> list[Markup]:
        caption = [*(f for f in _facts(row) if f != "no answer"), row["class"] or Path(row["query"]).name]
        cells = [pages.tile(encode(read_query(row["query"])), caption, "query", row["query"])]
        for near in row["neighbours"]:
            cells.append(pages.tile(encode(read(near["file"])), _near(near), _kind(row, near), near["file"]))
        return cells

    answered, others = [r for r in rows if r["answered"]], [r for r in rows if not r["answered"]]
    body = [pages.html('<h1>{:,} queries</h1><p class="muted">{}</p>', len(rows), note), _legend(rows)]
    body += [pages.row(tiles(row)) for row in answered[:OPEN]]
    for first in range(OPEN, len(answered), OPEN):
        those = answered[first : first + OPEN]
        shown = pages.join(pages.row(tiles(row)) for row in those)
        body.append(pages.fold(f"Answered queries {first + 1:,} to {first + len(those):,}", shown))
    if others:
        title = f"{len(others):,} {'query has' if len(others) == 1 else 'queries have'} no answer"
        reason = pages.html(
            '<p class="muted">Too unsure to answer at the wanted precision. A lower --abstain answers more of them.</p>'
        )
        shown = reason + pages.tiles(cell for row in others for cell in tiles(row)[:1])
        body.append(pages.fold(title, shown, opened=not answered and len(others) <= OPEN))
    return pages.page("Search", body)


def _legend(rows: list[Row]) -> Markup:
    """What the frames and the numbers of the page mean."""
    first = next((row for row in rows if row["neighbours"]), None)
    parts = ["Each query (blue frame, round corners) is followed by its nearest images, nearest first."]
    if any(_kind(row, near) for row in rows for near in row["neighbours"]):
        signs = pages.key("right"), pages.key("wrong")
        parts.append(pages.html("{} is of the query's class, {} (dashed frame) is of another.", *signs))
    if any(row["sure"] is not None for row in rows):
        parts.append("<b>sure</b>: probability that the nearest image has the query's class.")
    if any(row["known"] is not None for row in rows):
        parts.append("<b>known</b>: probability that the query's class is among the images searched.")
    if any(row["uncertainty"] is not None for row in rows):
        parts.append("<b>|u|</b>: length of the query's uncertainty; larger is more ambiguous.")
    if any(row["margin"] is not None for row in rows):
        parts.append("<b>margin</b>: how much more similar the nearest image is than the tenth.")
    parts.append("<b>distance</b>: from 0 (the same direction) to 2 (opposite).")
    if first and first["neighbours"][0]["introspective_distance"] is not None:
        parts.append("<b>D</b>: the introspective distance, which is smaller for uncertain images.")
    parts.append("A click enlarges an image.")
    return pages.html('<p class="small">{}</p>', Markup(" ").join(Markup(part) for part in parts))


def _near(near: Near) -> list[str]:
    inner = near["introspective_distance"]
    lines = [f"distance {near['distance']:.3f}"] + ([] if inner is None else [f"D {inner:.3f}"])
    return [*lines, near["class"] or Path(near["file"]).name]


def _kind(row: Row, near: Near) -> str:
    if row["class"] is None or near["class"] is None:
        return ""
    return "right" if row["class"] == near["class"] else "wrong"


def as_png(rows: list[Row], read_query: Reader, read: Reader) -> bytes:
    """A contact sheet of the first ``SHEET_ROWS`` queries with their answers, as PNG; without an answer: last."""
    from idml_jax.reporting import plots

    short = lambda lines: "\n".join(line if len(line) <= 22 else line[:21] + "…" for line in map(printable, lines))

    def asked(row: Row) -> plots.Cell:
        return read_query(row["query"]), short([*_facts(row), row["class"] or Path(row["query"]).name]), "query"

    def found(row: Row, near: Near) -> plots.Cell:
        kind = _kind(row, near)
        first, *more = _near(near)
        return read(near["file"]), short([f"{pages.SIGNS.get(kind, '')} {first}".strip(), *more]), kind

    shown = rows[:SHEET_ROWS]
    cells = [[asked(row), *(found(row, near) for near in row["neighbours"])] for row in shown if row["answered"]]
    others = [asked(row) for row in shown if not row["answered"]]
    width = max(map(len, cells), default=10)
    cells += [others[first : first + width] for first in range(0, len(others), width)]
    return plots.sheet(cells)
