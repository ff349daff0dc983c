"""The section of a report about pairs of images: is it the same class?"""

from collections.abc import Mapping
from typing import Protocol

from markupsafe import Markup

from idml_jax.reporting import html as pages


class HasResult(Protocol):
    """What the section needs of an evaluated run."""

    @property
    def result(self) -> dict[str, dict[str, float]]: ...


def verification(seen: HasResult, images: object) -> Markup:
    """FNMR by FMR of the best checkpoint; empty for a run that was evaluated before there was verification."""
    best = seen.result.get("best", {})
    if "verification/EER" not in best:
        return Markup()
    start = "verification/FNMR@"
    rows = [_row(best, name.removeprefix(start)) for name in best if name.startswith(start)]
    head = ("wanted FMR", "FNMR", "FMR of the threshold of held-out classes", "its FNMR")
    if all(row[2:] == ("-", "-") for row in rows):  # there are no held-out classes
        head, rows = head[:2], [row[:2] for row in rows]
    return pages.html(
        "<h2>Is it the same class?</h2><p>All pairs of test images by cosine similarity: EER {}, AUROC {}. FMR is the "
        "share of pairs of different classes taken for the same, FNMR the share of pairs of one class that is "
        "missed; at "
        "the EER the two are equal. AUROC: probability that a pair of one class is more similar than another "
        "pair.</p>{}",
        pages.number(pages.Share(best["verification/EER"])),
        pages.number(pages.Share(best.get("verification/AUROC", float("nan")))),
        pages.table(head, rows),
    )


def _row(best: Mapping[str, float], fmr: str) -> tuple[str, ...]:
    cells = [best.get(f"verification/{name}@{fmr}") for name in ("FNMR", "chosen/FMR", "chosen/FNMR")]
    shown = ["-" if value is None else _percent(value) for value in cells]
    return _percent(fmr), shown[0], shown[1], shown[2]


def _percent(value: float | str) -> str:
    """A share, or its text in the name of a metric, in percent; small ones keep three digits."""
    try:
        return f"{100 * float(value):.3g} %"
    except ValueError:
        return str(value)
