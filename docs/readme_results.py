"""Writes the table of results in README.md from the tables of docs/introspection.md: ``python docs/readme_results.py``.

``tests/test_docs.py`` fails if it is out of date.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SETS = {
    "omniglot": "Omniglot", "glyphs": "Glyphs", "tiny_pretrained": "Tiny ImageNet at 32 px",
    "birds_imagenet": "Birds at 96 px, ImageNet weights",
}  # fmt: skip
ROWS = {"plain+mixup": "plain", "ism+mixup": "introspective"}
BASELINES = {"distance": "distance", "margin 10": "margin 10", "margin 20": "margin 20", "ratio 20": "ratio 20"}
BEGIN, END = "<!-- results: python docs/readme_results.py -->\n", "<!-- end of results -->"


def table_of(page: str, name: str) -> list[dict[str, str]]:
    """The rows of a table of the page, by the names of its columns."""
    text = page.split(f"<!-- table {name} -->")[1].split("<!-- end -->")[0]
    head, _, *rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip((cell.strip() for cell in head), (cell.strip() for cell in row), strict=True)) for row in rows]


def results(page: str) -> str:
    """The table of README.md."""
    lines = [
        "| ProxyAnchor + Mixup | R@1, % | R-AUROC of the norm of u | of the best baseline | of all scores joined |",
        "|---|---|---|---|---|",
    ]
    for name, shown in SETS.items():
        for row in table_of(page, f"B {name}"):
            if row["row"] not in ROWS:
                continue
            best = max(BASELINES, key=lambda score: float(row[score].split()[0]))
            seeds = f"{row['seeds']} seed{'s' * (row['seeds'] != '1')}"
            cells = (
                f"{shown}, {ROWS[row['row']]}, {seeds}", row["R@1"], row["norm of u"],
                f"{row[best]} ({best})", row["all joined"],
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def beaten(page: str, queries: str) -> tuple[int, int]:
    """In how many runs, and of how many, all scores joined are above the nearest distance, the margins and the norm."""
    found = re.findall(rf"^\* {queries}, all joined: above every baseline score in (\d+) of (\d+) runs", page, re.M)
    return sum(int(n) for n, _ in found), sum(int(n) for _, n in found)


def main() -> None:
    """Writes the table."""
    readme, page = DOCS.parent / "README.md", (DOCS / "introspection.md").read_text()
    text = readme.read_text()
    first, last = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(f"{text[:first]}\n{results(page)}\n{text[last:]}")
    for queries in ("clean queries", "clean and corrupted queries"):
        print(queries, beaten(page, queries))


if __name__ == "__main__":
    main()
