"""What the metrics of a page mean, and the warnings about a run with advice."""

import re
from collections.abc import Iterator

from idml_jax.metrics import uncertainty
from idml_jax.metrics.names import describe
from idml_jax.reporting.html import Share, number
from idml_jax.reporting.seen import Seen

# What to do about the signs of `uncertainty.failure_signs`, by how they begin; the others say it themselves.
ADVICE = {
    "uncertainty is constant": "Do not use |u| of this run. Train longer, or with config.ism.ranking=1.0.",
    "uncertainty copies": "Do not read |u| of this run as ambiguity; sort by the joined scores instead.",
}
FEW = 500  # queries


def meaning(name: str) -> str:
    """One sentence about a metric of ``result.json``; empty for one that is not known."""
    try:
        row = describe(name)
    except KeyError:
        return ""
    place = re.search(r"@(\d+)|top(\d+)", name) if "{k}" in row.name else None
    if place is None:
        return row.meaning
    k = place[1] or place[2]
    return row.meaning.replace("among the k nearest", f"among the {k} nearest" if k != "1" else "as the nearest")


def value_of(name: str, value: float | None) -> object:
    """A metric as a table shows it: shares in percent, counts whole, a dash if there is none."""
    if value is None:
        return "-"
    try:
        unit = describe(name).unit
    except KeyError:
        return float(value)
    return Share(value) if unit == "share" else int(value) if unit in ("images", "steps") else float(value)


def card(name: str, shown: str, value: float) -> tuple[str, str, str]:
    """A card of the page: displayed name, value, meaning."""
    made = value_of(name, value)
    return shown, f"{made:.2f}" if type(made) is float else str(number(made)), meaning(name)


def warnings(seen: Seen) -> list[str]:
    """What a reader of the page should know before trusting its numbers, with advice, one text each."""
    return [*seen.warnings, *_of_uncertainty(seen), *_of_result(seen), *_of_queries(seen)]


def _of_uncertainty(seen: Seen) -> Iterator[str]:
    if not seen.model.introspective or seen.embedded.uncertainty is None:
        return
    for sign in uncertainty.failure_signs(seen.embedded.semantic, seen.embedded.uncertainty, seen.model.metric):
        advice = next((words for start, words in ADVICE.items() if sign.startswith(start)), "")
        yield f"{sign}. {advice}".strip()


def _of_result(seen: Seen) -> Iterator[str]:
    best, final = seen.result.get("best", {}), seen.result.get("final", {})
    if not best:
        yield (
            "the run is not finished: there is no result.json, and metrics that need the end of training are missing. "
            "The training command continues it."
        )
        return
    name, shown = next(iter(seen.task.headline.items()))
    now, then, last = seen.figures.get(name), best.get(name), final.get(name)
    if now is not None and then is not None and abs(now - then) > 0.005:
        yield (
            f"{shown} is {100 * now:.1f} % now and was {100 * then:.1f} % when the run ended: the images or the "
            f"settings "
            "have changed since. Evaluate again (idml-jax eval), or restore the data."
        )
    if then is not None and last is not None and then - last > 0.02:
        yield (
            f"{shown} fell from {100 * then:.1f} % at step {int(best.get('step', 0)):,} to {100 * last:.1f} % "
            f"at the end: "
            "the run learned too long, or too fast. Try fewer epochs or a lower config.optim.learning_rate. "
            "This page shows "
            "the best checkpoint."
        )


def _of_queries(seen: Seen) -> Iterator[str]:
    wrong = int((~seen.correct).sum())
    if len(seen.correct) < FEW:
        yield (
            f"{len(seen.correct):,} queries are few: R@1 is uncertain by about "
            f"{100 * 1.96 * (0.25 / max(len(seen.correct), 1)) ** 0.5:.0f} points. Use more test images to "
            f"compare runs."
        )
    elif wrong < 30:
        yield (
            f"only {wrong} answers are wrong: the numbers about detecting wrong answers rest on these alone. "
            f"Use more or "
            "harder test images for them."
        )
