"""Draws docs/design.svg: the floors of the package and the imports that are allowed between them.

    python docs/design_picture.py

Floors and imports are read from ``FLOORS`` and ``DOORS`` in ``tests/test_structure.py``, which the tests enforce.
"""

import runpy
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "design.svg"
DOORS_NAME = "commands"

# A few words about each floor, below its name.
ABOUT = {
    "errors": "one-line messages",
    "geometry": "distances, cosines",
    "ism": "the introspective metric",
    "mixing": "Mixup, CutMix",
    "losses": "losses, miners, memory",
    "metrics": "retrieval, uncertainty, ...",
    "models": "trunks and heads",
    "runtime": "devices, checkpoints, files",
    "data": "images to batches",
    "training": "config, build, tasks, loop",
    "inference": "load, embed, search, export",
    "reporting": "pages and plots",
}
WIDTH, MARGIN, GAP, BOX = 880, 16, 14, 204  # px
HEIGHT, STEP = 50, 82  # px: of a box, and from one level to the next
INK, LINE, MUTED = "#0f172a", "#94a3b8", "#475569"
PURE, EFFECTS, TOP = "#dbeafe", "#fef3c7", "#e2e8f0"


def read_floors() -> tuple[dict[str, set[str]], set[str]]:
    """Allowed imports of each floor, and the names of the commands, as the structure test has them."""
    rules = runpy.run_path(str(ROOT / "tests" / "test_structure.py"))
    return rules["FLOORS"], rules["DOORS"]


def levels(floors: dict[str, set[str]]) -> dict[str, int]:
    """Height of each floor: as high as its importers allow, 0 for the lowest."""
    depth: dict[str, int] = {}

    def place(name: str) -> int:
        if name not in depth:
            depth[name] = max((1 + place(user) for user in floors if name in floors[user]), default=0)
        return depth[name]

    lowest = max(place(name) for name in floors)
    return {name: lowest - depth[name] for name in floors}


def below(floors: dict[str, set[str]], name: str) -> set[str]:
    """All floors that a floor reaches through allowed imports."""
    return floors[name].union(*(below(floors, other) for other in floors[name]))


def direct(floors: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Allowed imports that do not follow from a chain of others, as (importing, imported)."""
    return [
        (a, b) for a in floors for b in sorted(floors[a]) if not any(b in below(floors, c) for c in floors[a] - {b})
    ]


def exceptions(floors: dict[str, set[str]]) -> list[str]:
    """Floors that not all may import which a chain of arrows leads to them, as text."""
    hidden = sorted({other for name in floors for other in below(floors, name) - floors[name]})
    return [f"only {' and '.join(n for n in floors if other in floors[n])} may import {other}" for other in hidden]


def uses_effects(floors: dict[str, set[str]], name: str) -> bool:
    """Whether a floor touches files or devices: ``runtime``, and whatever may import it."""
    return name == "runtime" or "runtime" in floors[name]


def draw(floors: dict[str, set[str]], doors: set[str]) -> str:
    """The picture as SVG."""
    floors = {**floors, DOORS_NAME: set(floors)}
    height_of = levels(floors)
    top = max(height_of.values())
    edges = direct(floors)
    centre: dict[str, float] = {}
    boxes: dict[str, tuple[float, float, float]] = {}  # left, upper edge, width
    for level in range(top, -1, -1):
        row = [name for name, height in height_of.items() if height == level]
        row.sort(key=lambda name: (uses_effects(floors, name), len(floors[name]), name))
        width = min(BOX, (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row))
        if row == [DOORS_NAME]:
            width = WIDTH - 2 * MARGIN
        spread = (WIDTH - width * len(row)) / (len(row) + 1)
        for i, name in enumerate(row):
            # Below its importers where there is room, else spread evenly.
            users = [centre[user] for user, used in edges if used == name]
            alone = spread + i * (width + spread) + width / 2
            centre[name] = sum(users) / len(users) if users and len(row) <= 3 else alone
        row.sort(key=lambda name: centre[name])
        for before, name in pairwise(row):
            centre[name] = max(centre[name], centre[before] + width + GAP)
        for name in row:
            boxes[name] = (centre[name] - width / 2, MARGIN + (top - level) * STEP, width)
    total = 2 * MARGIN + top * STEP + HEIGHT + 28 + 18 * len(exceptions(floors))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        "<title>Folders of idml_jax and the imports allowed between them</title>",
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{total}" rx="10" fill="#ffffff"/>',
    ]
    for upper, lower in edges:
        (x1, y1, w1), (x2, y2, w2) = boxes[upper], boxes[lower]
        # Straight down where the box it leaves is above its target.
        end = x2 + w2 / 2
        start = min(max(end, x1 + 14), x1 + w1 - 14)
        out, into = y1 + HEIGHT, y2 - 2
        parts.append(
            f'<path d="M{start:.0f} {out} C{start:.0f} {out + 26} {end:.0f} {into - 24} {end:.0f} {into}" fill="none" '
            f'stroke="{LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    for name, (x, y, width) in boxes.items():
        about = ", ".join(sorted(doors)) if name == DOORS_NAME else ABOUT.get(name, "")
        fill = TOP if name == DOORS_NAME else EFFECTS if uses_effects(floors, name) else PURE
        middle = x + width / 2
        parts += [
            f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="6" fill="{fill}" stroke="{LINE}"/>',
            f'<text x="{middle:.0f}" y="{y + 21}" font-size="15" font-weight="bold" fill="{INK}">{escape(name)}</text>',
            f'<text x="{middle:.0f}" y="{y + 39}" font-size="12" fill="{MUTED}">{escape(about)}</text>',
        ]
    legend = [
        "Arrow: may import that floor and whatever that may import. Blue: no files, no devices. "
        "Yellow: files, devices, processes.",
        *(f"Except: {text}." for text in exceptions(floors)),
    ]
    for i, line in enumerate(legend):
        y = total - 14 - 18 * (len(legend) - 1 - i)
        parts.append(f'<text x="{WIDTH / 2:.0f}" y="{y}" font-size="12" fill="{MUTED}">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.write_text(draw(*read_floors()))
