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
  max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; }
p { max-width: 48rem; margin: .3rem 0 .8rem; } .muted { color: #64707d; } .small { font-size: 13px; }
@media (max-width: 640px) { table { display: block; overflow-x: auto; } }
code { background: #f1f3f5; padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .3rem 0 1.1rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #e6e9ec; }
td.number, th.number { text-align: right; }
th { font-weight: 600; color: #4a5560; }
img.plot { max-width: 100%; height: auto; display: block; margin: .4rem 0 1.1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: .4rem 0 1rem; }
.row { display: flex; gap: 8px; align-items: flex-start; margin: 0 0 14px; overflow-x: auto; }
figure { margin: 0; width: 92px; flex: none; font-size: 11.5px; line-height: 1.3; color: #4a5560; }
figure img { width: 84px; height: 84px; object-fit: contain; border: 4px solid #ccd2d8; background: #fff;
  image-rendering: auto; display: block; border-radius: 3px; }
figure.right img { border-color: #2f8f5b; } figure.wrong img { border-color: #c8423b; }
figure.query img { border-color: #33658a; } figure.query { margin-right: 12px; width: 104px; }
.pair { display: flex; margin-right: 22px; } .pair figure.query { width: 92px; margin-right: 4px; }
figcaption { overflow: hidden; overflow-wrap: anywhere; max-height: 6.6em; }
.badge { display: inline-block; padding: 0 .5em; border-radius: 9px; background: #e6e9ec; font-weight: 600; }
.badge.yes { background: #d8efe2; color: #1d6b42; } .badge.no { background: #f8dedc; color: #95261f; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 1rem 0; }
.card { border: 1px solid #e0e4e8; border-radius: 6px; padding: .6rem 1rem; min-width: 118px; }
.card b { display: block; font-size: 1.45rem; font-weight: 600; }
.finding { border-left: 5px solid #e0e4e8; padding: .4rem 0 .1rem .8rem; margin: 0 0 .6rem; }
.finding.here { background: #f1f6fb; outline: 2px solid #33658a; }
.finding.accept { border-color: #2f8f5b; } .finding.reject { border-color: #c8423b; opacity: .75; }
.bar { position: sticky; top: 0; background: #fff; padding: .4rem 0; border-bottom: 1px solid #e0e4e8;
  max-width: none; }
"""


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
    """A plot over the width of the page; the description is its alternative text."""
    return html('<img class="plot" src="{}" alt="{}">', data_url(png), description)


def plots_of(page: str) -> list[tuple[str, bytes]]:
    """The plots of a page: the description and the PNG of each."""
    found = []
    for data, description in re.findall(r'<img class="plot" src="data:image/png;base64,([^"]*)" alt="([^"]*)"', page):
        found.append((Markup(description).unescape(), base64.b64decode(data)))
    return found


def tile(picture: bytes | None, caption: Sequence[str], kind: str = "", title: str = "") -> Markup:
    """A thumbnail with lines of text below it; kind: ``right``, ``wrong``, ``query`` or empty."""
    shown = Markup('<div class="muted">(no image)</div>')
    if picture is not None:
        shown = html('<img src="{}" alt="{}" loading="lazy">', data_url(picture), title or " ".join(caption))
    lines = join(map(_breakable, caption), "<br>")
    figure = '<figure class="{}" title="{}">{}<figcaption>{}</figcaption></figure>'
    return html(figure, kind, title, shown, lines)


def _breakable(line: str) -> Markup:
    """Allows line breaks after the underscores of class and file names."""
    return line if isinstance(line, Markup) else Markup("_<wbr>").join(text(line).split("_"))


def row(tiles: Iterable[Markup]) -> Markup:
    """Tiles in one row."""
    return html('<div class="row">{}</div>', join(tiles))


def tiles(items: Iterable[Markup]) -> Markup:
    """Tiles in as many rows as needed."""
    return html('<div class="tiles">{}</div>', join(items))


def badge(words: str, good: bool | None = None) -> Markup:
    """A word on a coloured background."""
    return html('<span class="badge{}">{}</span>', {True: " yes", False: " no", None: ""}[good], words)


def cards(values: Sequence[tuple[str, str]]) -> Markup:
    """Cards with large values and their names."""
    card = '<div class="card"><b>{}</b><span class="muted">{}</span></div>'
    return html('<div class="cards">{}</div>', join(html(card, value, name) for name, value in values))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; numbers are aligned to the right."""

    def cell(value: object, right: bool) -> Markup:
        shown = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        return html('<td class="number">{}</td>' if right else "<td>{}</td>", shown)

    rows = [list(row) for row in rows]
    # The dash of a missing number is aligned like the numbers.
    number = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    top = join(
        html('<th class="number">{}</th>' if right else "<th>{}</th>", name)
        for name, right in zip(head, number, strict=True)
    )
    body = join(html("<tr>{}</tr>", join(map(cell, row, number))) for row in rows)
    return html("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>", top, body)
