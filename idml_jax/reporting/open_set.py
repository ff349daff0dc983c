"""The table of a report on queries whose class is not among the images searched."""

from collections.abc import Mapping

from markupsafe import Markup

from idml_jax.reporting import html as pages

_MEASURES = (
    ("AUROC", "AUROC (50 %: chance)"),
    ("TPIR@0.1", "answered rightly, 10 % of strangers answered"),
    ("TPIR@0.01", "answered rightly, 1 % of strangers answered"),
    ("AURC", "AURC (0 %: perfect)"),
)


def table(best: Mapping[str, float], names: Mapping[str, str]) -> Markup:
    """A row for each score, the best first; empty for a run that was evaluated without these metrics.

    Args:
      best: metrics of ``result.json``.
      names: displayed names of the scores.
    """
    start = "open_set/AUROC("
    scores = [name[len(start) : -1] for name in best if name.startswith(start) and name.endswith(")")]
    rows = []
    for score in scores:
        values = [best.get(f"open_set/{measure}({score})") for measure, _ in _MEASURES]
        if all(value is not None for value in values):
            rows.append((names.get(score, score), [pages.Share(value) for value in values if value is not None]))
    if not rows:
        return Markup()
    rows.sort(key=lambda row: -row[1][0])
    said = Markup()
    answered, right = best.get("open_set/answered"), best.get("open_set/answered_precision")
    if answered is not None:
        told = "none of these queries is answered"
        if right is not None:
            shares = 100 * float(answered), 100 * float(right)
            told = "{:.0f} % of these queries are answered, {:.1f} % of them rightly".format(*shares)
        wanted = float(best.get("wanted_precision", float("nan")))
        said = pages.html("<p>With a wanted precision of {}, {}.</p>", f"{100 * wanted:.0f} %", told)
    return pages.html(
        "<h2>Does it know what it has never seen?</h2><p>Half of the classes are taken out of the images searched; the "
        "queries of those classes are strangers, and every answer to them is wrong. Means over several choices of the "
        "classes. AUROC: probability that the score is larger for a stranger than for another query. AURC: mean "
        "share of "
        "wrong answers as the least sure are dropped.</p>{}{}",
        said,
        pages.table(("score", *(shown for _, shown in _MEASURES)), [(name, *values) for name, values in rows]),
    )
