"""Formats the answers of a search as a table, records, a page or a contact sheet."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from jaxtyping import Int, UInt8
from markupsafe import Markup

from idml_jax.errors import printable
from idml_jax.inference.encoded import Box, encoded_reader
from idml_jax.inference.index import named
from idml_jax.inference.search import Answers
from idml_jax.inference.store import Index
from idml_jax.reporting import html as pages
from idml_jax.reporting.thumbnails import thumbnail
from idml_jax.runtime.files import without_nan

SHEET_ROWS = 40
OPEN = 60  # answered queries that a page shows unfolded; the others are folded by as many
# Gives the thumbnail of an image; called with its name, and with its box if it is a part of a picture.
Reader = Callable[..., UInt8[np.ndarray, "h w 3"] | None]
# ``classes`` and ``box`` are there where images have several classes, or are parts of pictures.
Near = TypedDict(
    "Near",
    {
        "file": str,
        "box": NotRequired[Box | None],
        "class": str | None,
        "classes": NotRequired[list[str]],
        "distance": float,
        "introspective_distance": float | None,
        "speaks": bool,  # for the answer: it is of the answer's class
    },
)
Share = TypedDict("Share", {"class": str | None, "share": float})
VOTES = 5  # classes listed
_FARTHEST = 2.001  # distance of normalised embeddings, with room for rounding
Row = TypedDict(
    "Row",
    {
        "query": str,
        "box": NotRequired[Box | None],
        "class": str | None,
        "classes": NotRequired[list[str]],
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
    optional = lambda column, i: None if column is None else float(column[i])
    rows = []
    for i, file in enumerate(queries.files):
        first = index.classes_of(int(answers.index[i, 0]))
        near = [
            {
                "file": str(index.files[row]),
                **_told(index, row),
                "distance": float(answers.distance[i, j]),
                "introspective_distance": optional(answers.introspective, (i, j)),
                "speaks": not set(first).isdisjoint(index.classes_of(row)),
            }
            for j, row in enumerate(answers.index[i].tolist())
        ]
        known, row = queries, i
        if own is not None and own[i] >= 0 and queries.class_names is None:
            known, row = index, int(own[i])
        rows.append(
            {
                "query": str(file),
                **_told(known, row),
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


def _told(index: Index, row: int) -> dict[str, Any]:
    """Class of an image, and its box and all its classes if images of the index have such."""
    box = {} if index.boxes is None else {"box": index.box_of(row)}
    several = {} if index.embedded.sets is None else {"classes": list(index.classes_of(row))}
    return {**box, "class": index.class_of(row), **several}


def _classes(told: Row | Near) -> list[str]:
    """The classes of a query or an answer."""
    first = told["class"]
    return told.get("classes", [] if first is None else [first])


def _label(told: Row | Near, file: str) -> str:
    """What is written below an image: its classes, or else the name of its file."""
    return ", ".join(_classes(told)) or Path(file).name


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
        lines.append(f"{printable(named(row['query'], row.get('box')))}   {'   '.join(_facts(row))}")
        for place, near in enumerate(row["neighbours"], 1):
            inner = near["introspective_distance"]
            shown = "" if inner is None else f"  D {inner:.3f}"
            told = f"{printable(', '.join(_classes(near)))}  {printable(named(near['file'], near.get('box')))}"
            lines.append(f"  {place:3d}  distance {near['distance']:.3f}{shown}  {told}")
    return "\n".join(lines)


def _facts(row: Row) -> list[str]:
    facts = [] if row["answered"] else ["no answer"]
    if row["answer"] is not None:
        names = _classes(row["neighbours"][0])
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        facts.append(f"answer {printable(', '.join(names[:2] if more else names))}{more}")
    values = (
        (row["sure"], "sure {:.0%}"),
        (row["known"], "known {:.0%}"),
        (row["uncertainty"], "|u| {:.2f}"),
        (row["margin"], "margin {:.3f}"),
    )
    return facts + [form.format(value) for value, form in values if value is not None]


def picture_reader(index: Index, workdir: str) -> Reader:
    """A function from the name of a row, and its box, to its thumbnail; see ``encoded.encoded_reader``."""
    encoded = encoded_reader(index, workdir)

    def read(file: str, box: Box | None = None) -> UInt8[np.ndarray, "h w 3"] | None:
        picture = encoded(file, box)
        return None if picture is None else thumbnail(picture, within=box)

    return read


def noting(read: Reader, missing: list[str]) -> Reader:
    """A reader that also notes the names of pictures that cannot be shown."""

    def noted(file: str, *box: Box) -> UInt8[np.ndarray, "h w 3"] | None:
        found = read(file, *box)
        if found is None:
            missing.append(file)
        return found

    return noted


def as_html(rows: list[Row], read_query: Reader, read: Reader, note: str) -> str:
    """An HTML page with the queries and their answers; queries without an answer come last, folded."""

    def tiles(row: Row) -> list[Markup]:
        label, facts = _label(row, row["query"]), [f for f in _facts(row) if f != "no answer"]
        # Several classes can be many lines, of which a tile shows the first only.
        caption = [*facts, label] if len(_classes(row)) > 1 else [label, *facts]
        cells = [_tile(read_query, row["query"], row.get("box"), caption, "query")]
        for near in row["neighbours"]:
            cells.append(_tile(read, near["file"], near.get("box"), _near(near), _kind(row, near)))
        return cells

    answered, others = [r for r in rows if r["answered"]], [r for r in rows if not r["answered"]]
    body = [
        pages.html(
            '<h1>{:,} {}</h1><p class="muted">{}</p>', len(rows), "query" if len(rows) == 1 else "queries", note
        ),
        _legend(rows),
    ]
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


def picture(read: Reader, file: str, box: Sequence[int] | None) -> UInt8[np.ndarray, "h w 3"] | None:
    """The thumbnail that a reader gives of an image."""
    return read(file) if box is None else read(file, tuple(box))


def _tile(read: Reader, file: str, box: Box | None, lines: Sequence[str], kind: str) -> Markup:
    return tile(picture(read, file, box), lines, kind, named(file, box))


def tile(pixels: UInt8[np.ndarray, "h w 3"] | None, lines: Sequence[str], kind: str, title: str) -> Markup:
    """A thumbnail on a page, with lines of text, as ``html.tile``."""
    from idml_jax.reporting import plots  # loads matplotlib, which a table does without

    return pages.tile(None if pixels is None else plots.encode(pixels), lines, kind, title)


def _legend(rows: list[Row]) -> Markup:
    """What the frames and the numbers of the page mean."""
    first = next((row for row in rows if row["neighbours"]), None)
    parts = ["Each query (blue frame, round corners) is followed by its nearest images, nearest first."]
    if any(_kind(row, near) for row in rows for near in row["neighbours"]):
        signs = pages.key("right"), pages.key("wrong")
        words = "{} is of the query's class, {} (dashed frame) is of another."
        if any("classes" in row for row in rows):
            words = "{} shares a class with the query, {} (dashed frame) shares none."
        parts.append(pages.html(words, *signs))
    if any(row["sure"] is not None for row in rows):
        parts.append("<b>sure</b>: probability that the nearest image has the query's class.")
    if any(row["known"] is not None for row in rows):
        parts.append("<b>known</b>: probability that the query's class is among the images searched.")
    if any(row["uncertainty"] is not None for row in rows):
        parts.append("<b>|u|</b>: length of the query's uncertainty; larger is more ambiguous.")
    if any(row["margin"] is not None for row in rows):
        parts.append(
            "<b>margin</b>: how much more similar the nearest image is than the tenth, or than the second where fewer "
            "than ten are searched."
        )
    if any(near["distance"] > _FARTHEST for row in rows for near in row["neighbours"]):
        parts.append("<b>distance</b>: of embeddings that are not normalised; from 0 (the same), without a limit.")
    else:
        parts.append("<b>distance</b>: from 0 (the same direction) to 2 (opposite) for normalised embeddings.")
    if first and first["neighbours"][0]["introspective_distance"] is not None:
        parts.append("<b>D</b>: the introspective distance, which is smaller for uncertain images.")
    parts.append("A click enlarges an image.")
    return pages.html('<p class="small">{}</p>', Markup(" ").join(Markup(part) for part in parts))


def _near(near: Near) -> list[str]:
    inner = near["introspective_distance"]
    lines = [f"distance {near['distance']:.3f}"] + ([] if inner is None else [f"D {inner:.3f}"])
    return [*lines, _label(near, near["file"])]


def _kind(row: Row, near: Near) -> str:
    asked, found = _classes(row), _classes(near)
    if not (asked and found):
        return ""
    return "wrong" if set(asked).isdisjoint(found) else "right"


def as_png(rows: list[Row], read_query: Reader, read: Reader) -> bytes:
    """A contact sheet of the first ``SHEET_ROWS`` queries with their answers, as PNG; without an answer: last."""
    from idml_jax.reporting import plots

    short = lambda lines: "\n".join(line if len(line) <= 22 else line[:21] + "…" for line in map(printable, lines))

    def asked(row: Row) -> plots.Cell:
        pixels = picture(read_query, row["query"], row.get("box"))
        return pixels, short([_label(row, row["query"]), *_facts(row)]), "query"

    def found(row: Row, near: Near) -> plots.Cell:
        kind = _kind(row, near)
        first, *more = _near(near)
        return (
            picture(read, near["file"], near.get("box")),
            short([f"{pages.SIGNS.get(kind, '')} {first}".strip(), *more]),
            kind,
        )

    shown = rows[:SHEET_ROWS]
    cells = [[asked(row), *(found(row, near) for near in row["neighbours"])] for row in shown if row["answered"]]
    others = [asked(row) for row in shown if not row["answered"]]
    width = max(map(len, cells), default=10)
    cells += [others[first : first + width] for first in range(0, len(others), width)]
    return plots.sheet(cells)
