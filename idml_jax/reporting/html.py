"""Self-contained HTML pages: style, tables, embedded images.

HTML made by this package has the type ``markupsafe.Markup``; every other value is text and is escaped when inserted
into HTML. No value is trusted because of its content.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from idml_jax.errors import printable

STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2933; background: #fff;
  max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; }
p { max-width: 48rem; margin: .3rem 0 .8rem; } .muted { color: #5b6673; } .small { font-size: 13px; }
code { background: #f1f3f5; padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .3rem 0 1.1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #e6e9ec; vertical-align: top; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
td:first-child { overflow-wrap: anywhere; min-width: 11em; }
th { font-weight: 600; color: #4a5560; }
.plots { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: flex-start; margin: .4rem 0 1.1rem; }
img.plot { max-width: 100%; height: auto; display: block; flex: 0 1 auto; }
.tiles, .row { display: flex; flex-wrap: wrap; gap: 10px 8px; align-items: flex-start; margin: .4rem 0 1rem; }
figure { margin: 0; width: 92px; flex: none; font-size: 11.5px; line-height: 1.3; color: #4a5560; position: relative; }
figure img { width: 84px; height: 84px; object-fit: contain; border: 4px solid #ccd2d8; background: #fff;
  display: block; border-radius: 3px; }
figure.right img { border-color: #2f8f5b; } figure.wrong img { border: 4px dashed #c8423b; }
figure.query img { border-color: #33658a; border-radius: 14px; } figure.query { margin-right: 12px; }
.sign { position: absolute; top: 0; left: 0; width: 20px; height: 20px; font: bold 15px/20px system-ui, sans-serif;
  text-align: center; color: #fff; background: #2f8f5b; border-radius: 3px 0 6px 0; pointer-events: none; }
.wrong .sign { background: #c8423b; }
.key { display: inline-block; position: relative; width: 20px; height: 20px; vertical-align: middle; }
.key.wrong .sign, .key.right .sign { position: static; display: block; }
figure summary { list-style: none; cursor: zoom-in; } figure summary::-webkit-details-marker { display: none; }
figure details[open] img { position: fixed; inset: 0; margin: auto; z-index: 9; width: min(88vw, 80vh, 560px);
  height: min(88vw, 80vh, 560px); cursor: zoom-out; box-shadow: 0 0 0 100vmax rgba(0, 0, 0, .6); }
.pair { display: flex; margin-right: 22px; } .pair figure.query { margin-right: 4px; }
figcaption { overflow: hidden; overflow-wrap: anywhere; max-height: 9.1em; } .query figcaption { max-height: 11.7em; }
.fold { margin: .4rem 0 1rem; } .fold > summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.badge { display: inline-block; padding: 0 .5em; border-radius: 9px; background: #e6e9ec; font-weight: 600; }
.badge.yes { background: #d8efe2; color: #1d6b42; } .badge.no { background: #f8dedc; color: #95261f; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 1rem 0; }
.card { border: 1px solid #e0e4e8; border-radius: 6px; padding: .6rem 1rem; flex: 1 1 150px; max-width: 240px; }
.card b { display: block; font-size: 1.45rem; font-weight: 600; }
.card small { display: block; font-size: 12.5px; line-height: 1.35; color: #5b6673; margin-top: .2rem; }
.warning { border-left: 5px solid #d98e04; background: #fdf6e7; padding: .5rem .9rem; margin: .5rem 0;
  max-width: 48rem; }
.finding { border-left: 5px solid #e0e4e8; padding: .4rem 0 .1rem .8rem; margin: 0 0 .6rem; }
.finding.here { background: #f1f6fb; outline: 2px solid #33658a; }
.finding.accept { border-color: #2f8f5b; }
.finding.reject { border: dashed #c8423b; border-width: 0 0 0 5px; opacity: .75; }
.bar { position: sticky; top: 0; z-index: 5; background: #fff; padding: .4rem 0; border-bottom: 1px solid #e0e4e8;
  max-width: none; }
button { font: inherit; font-size: 13px; margin: 2px 0; padding: .2em .6em; border: 1px solid #b8c0c8;
  border-radius: 5px; background: #f6f8fa; cursor: pointer; }
@media (max-width: 640px) {
  body { margin: 1rem auto; padding: 0 .9rem; } .card { flex-basis: 40%; max-width: none; padding: .5rem .7rem; }
  .pair { margin-right: 0; } .row { border-bottom: 1px solid #e6e9ec; }
  table, tbody, tr, td { display: block; } thead { display: none; }
  tr { border-bottom: 1px solid #ccd2d8; padding: .35rem 0; }
  td, td.number { border: 0; padding: 0; text-align: left; white-space: normal; }
  td:first-child { font-weight: 600; min-width: 0; }
  td + td::before { content: attr(data-name) ": "; color: #5b6673; }
}
@media print {
  body { max-width: none; margin: 0; padding: 0; } * { print-color-adjust: exact; } .bar { position: static; }
  figure, .card, .finding, .warning, tr, img.plot, .pair { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .fold::details-content { content-visibility: visible; height: auto; }
}
"""


SIGNS = {"right": "✓", "wrong": "✗"}
SHARPER = 1.3  # pixels of a plot for one of the page


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# A page cannot load anything or run scripts; only its own style sheet is allowed, and where it has one its own script.
POLICY = f"default-src 'none'; img-src data:; style-src {_digest(STYLE)}; base-uri 'none'; form-action 'none'"


def text(value: object) -> Markup:
    """Escapes a value for HTML and shows control characters as escapes; HTML of this package is unchanged."""
    return value if isinstance(value, Markup) else escape(printable(value))


def html(template: str, *values: object, **named: object) -> Markup:
    """Fills a template, as ``str.format`` does, with values that are escaped unless they are HTML.

    Args:
      template: HTML, written in this package; ``{{`` and ``}}`` are braces.
      *values: numbers, which may have a format, or anything that ``text`` takes.
      **named: as ``values``.
    """
    shown = lambda value: value if isinstance(value, int | float) else text(value)
    return Markup(template).format(*map(shown, values), **{name: shown(value) for name, value in named.items()})


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """Concatenates pieces of a page, each passed through ``text``; the separator is HTML."""
    return Markup(separator).join(map(text, parts))


def page(title: str, body: Iterable[Markup], script: str = "") -> str:
    """A complete self-contained page; script: JavaScript, written in this package, the only one that may run."""
    policy = f"{POLICY}; script-src {_digest(script)}" if script else POLICY
    return str(
        html(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" content="{}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<title>{}</title><style>{}</style></head>\n<body>\n{}\n{}</body></html>\n",
            Markup(policy),
            title,
            Markup(STYLE),
            join(body, "\n"),
            Markup(f"<script>{script}</script>\n") if script else Markup(""),
        )
    )


def data_url(data: bytes) -> str:
    """An encoded image as a data URL."""
    kind = "png" if data[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot(png: bytes, description: str) -> Markup:
    """A plot, at most as wide as the page; the description is its alternative text."""
    width = int.from_bytes(png[16:20], "big") if png[12:16] == b"IHDR" else 0
    # Drawn with more pixels than it takes on the page, so that it is sharp on fine screens.
    size = html(' width="{}"', round(width / SHARPER)) if width else Markup()
    return html('<img class="plot" src="{}" alt="{}"{}>', data_url(png), description, size)


def plots(items: Iterable[Markup]) -> Markup:
    """Plots side by side where the screen is wide enough, else below each other."""
    return html('<div class="plots">{}</div>', join(items))


def plots_of(page: str) -> list[tuple[str, bytes]]:
    """The plots of a page: the description and the PNG of each."""
    found = []
    for data, description in re.findall(r'<img class="plot" src="data:image/png;base64,([^"]*)" alt="([^"]*)"', page):
        found.append((Markup(description).unescape(), base64.b64decode(data)))
    return found


def tile(picture: bytes | None, caption: Sequence[str], kind: str = "", title: str = "") -> Markup:
    """A thumbnail with lines of text below it; a click enlarges it and another one ends that.

    Args:
      picture: the encoded image; ``None``: it cannot be read.
      caption: the lines.
      kind: ``right``, ``wrong``, ``query`` or empty.
      title: shown where the pointer rests.
    """
    shown = Markup('<div class="muted">(no image)</div>')
    if picture is not None:
        image = html('<img src="{}" alt="{}">', data_url(picture), title or " ".join(caption))
        shown = html("<details><summary>{}</summary></details>", image)
    lines = join(map(_breakable, caption), "<br>")
    figure = '<figure class="{}" title="{}">{}{}<figcaption>{}</figcaption></figure>'
    return html(figure, kind, title, shown, _sign(kind), lines)


def _sign(kind: str) -> Markup:
    return html('<span class="sign">{}</span>', SIGNS[kind]) if kind in SIGNS else Markup()


def key(kind: str) -> Markup:
    """The sign of ``right`` or ``wrong`` inside of a line that explains it."""
    return html('<span class="key {}">{}</span>', kind, _sign(kind))


def fold(title: str, body: Markup, opened: bool = False) -> Markup:
    """A part of the page that is shown when its title is clicked, and in print."""
    return html('<details class="fold"{}><summary>{}</summary>{}</details>', Markup(" open" * opened), title, body)


def warning(words: object) -> Markup:
    """A marked paragraph."""
    return html('<div class="warning"><b>Warning:</b> {}</div>', words)


def _breakable(line: str) -> Markup:
    """Allows line breaks in the names of classes, files and metrics: after underscores and slashes, before brackets."""
    if isinstance(line, Markup):
        return line
    parts = (part for part in re.split(r"(?<=[_/])|(?=\()", line) if part)
    return Markup("<wbr>").join(map(text, parts))


def row(tiles: Iterable[Markup]) -> Markup:
    """Tiles in one row."""
    return html('<div class="row">{}</div>', join(tiles))


def tiles(items: Iterable[Markup]) -> Markup:
    """Tiles in as many rows as needed."""
    return html('<div class="tiles">{}</div>', join(items))


def badge(words: str, good: bool | None = None) -> Markup:
    """A word on a coloured background."""
    return html('<span class="badge{}">{}</span>', {True: " yes", False: " no", None: ""}[good], words)


def cards(values: Sequence[tuple[str, ...]]) -> Markup:
    """Cards with large values; each is a name, a value and, if given, a sentence that explains it."""
    card = '<div class="card"><b>{}</b>{}{}</div>'
    more = lambda words: html("<small>{}</small>", words[0]) if words else Markup()
    return html('<div class="cards">{}</div>', join(html(card, value, name, more(w)) for name, value, *w in values))


class Share(float):
    """A number from 0 to 1 that is shown in percent."""


def number(value: object) -> object:
    """A number as it is shown; anything else unchanged."""
    if isinstance(value, Share):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; numbers are aligned to the right. On a narrow screen each row becomes a list of its cells."""
    rows = [list(row) for row in rows]
    # The dash of a missing number is aligned like the numbers.
    numbers = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    top = join(
        html('<th class="number">{}</th>' if right else "<th>{}</th>", name)
        for name, right in zip(head, numbers, strict=True)
    )

    def cells(row: Sequence[object]) -> Markup:
        name = number(row[0])
        first = html("<td>{}</td>", _breakable(name) if isinstance(name, str) else name)
        of = lambda name, value, right: html(
            '<td class="number" data-name="{}">{}</td>' if right else '<td data-name="{}">{}</td>', name, number(value)
        )
        return first + join(map(of, head[1:], row[1:], numbers[1:]))

    body = join(html("<tr>{}</tr>", cells(row)) for row in rows)
    return html("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", top, body)
