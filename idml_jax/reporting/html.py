"""Self-contained HTML pages: style, tables, pictures inside the page. Strings in, strings out."""

import base64
import html
from collections.abc import Iterable, Sequence

STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1f2933; background: #fff;
  max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .4rem; }
p { max-width: 48rem; margin: .3rem 0 .8rem; } .muted { color: #64707d; } .small { font-size: 13px; }
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
"""


def text(value: object) -> str:
    """Escaped for HTML; names of files that are no valid text are shown with replacement marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def page(title: str, body: str) -> str:
    """A whole page that needs nothing beside it."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def data_url(data: bytes) -> str:
    """An encoded picture as an address."""
    kind = "png" if data[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plot(png: bytes, description: str) -> str:
    """A plot over the page's width; the description is for those who cannot see it."""
    return f'<img class="plot" src="{data_url(png)}" alt="{text(description)}">'


def tile(picture: bytes | None, caption: Sequence[str], kind: str = "", title: str = "") -> str:
    """A small picture with lines beneath it; kind: ``right``, ``wrong``, ``query`` or empty."""
    shown = '<div class="muted">(no picture)</div>'
    if picture is not None:
        shown = f'<img src="{data_url(picture)}" alt="{text(title or " ".join(caption))}" loading="lazy">'
    # Names of classes and files may break behind their underscores.
    lines = "<br>".join(x if x.startswith("<span") else text(x).replace("_", "_<wbr>") for x in caption)
    return f'<figure class="{kind}" title="{text(title)}">{shown}<figcaption>{lines}</figcaption></figure>'


def row(tiles: Iterable[str]) -> str:
    """Tiles in one line."""
    return f'<div class="row">{"".join(tiles)}</div>'


def tiles(items: Iterable[str]) -> str:
    """Tiles in as many lines as they need."""
    return f'<div class="tiles">{"".join(items)}</div>'


def badge(words: str, good: bool | None = None) -> str:
    """A word on a coloured ground."""
    kind = {True: " yes", False: " no", None: ""}[good]
    return f'<span class="badge{kind}">{text(words)}</span>'


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Large figures with their names."""
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{text(value)}</b><span class="muted">{text(name)}</span></div>'
            for name, value in values
        )
        + "</div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers are aligned to the right."""

    def cell(value: object, right: bool) -> str:
        if isinstance(value, str) and value.startswith("<"):
            return f"<td>{value}</td>"
        shown = f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else text(value)
        return f'<td class="number">{shown}</td>' if right else f"<td>{shown}</td>"

    rows = [list(row) for row in rows]
    # A dash for a figure that is missing stands below the figures.
    number = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    top = "".join(
        f'<th class="number">{text(name)}</th>' if right else f"<th>{text(name)}</th>"
        for name, right in zip(head, number, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(cell, row, number))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
