"""The section of a report that sets two runs side by side."""

import json
from pathlib import Path

from markupsafe import Markup

from idml_jax.errors import UserError
from idml_jax.metrics.names import compared, describe
from idml_jax.reporting import html as pages
from idml_jax.reporting import notes, plots
from idml_jax.reporting import sections as parts
from idml_jax.reporting.record import read_record
from idml_jax.reporting.seen import Seen
from idml_jax.training import data_record
from idml_jax.training import workdir as workdir_lib

# Settings that decide which images are searched, for runs without a record of their images.
DATA = ("data.name", "data.variant", "data.root", "data.data_dir", "data.train_classes", "data.validation_classes")
SAME_RUN = (*workdir_lib.FREE_FIELDS, "seed", "model.init_origin")  # settings that two runs may differ in anyway
ARROWS = {"higher": "larger is better", "lower": "smaller is better", "neither": ""}


def comparison(seen: Seen, other: Path) -> Markup:
    """Compares another run's metrics with this run's."""
    config = workdir_lib.read(other)
    rows, result = read_record(other)
    if not result:
        raise UserError(f"{other}: holds no result.json: the run is not finished")
    name = lambda path, introspective: f"{'introspective' if introspective else 'plain'} ({path.name})"
    names = name(seen.model.workdir, seen.model.introspective), name(other, config.ism.enabled)
    if names[0] == names[1]:
        names = names[0], str(other)
    first, shown = next(iter(seen.task.headline.items()))
    curves = {
        n: c
        for n, r in zip(names, (seen.history, rows), strict=True)
        for c in [parts.curves(r, {f"eval/{first}": n}, 100).get(n)]
        if c
    }
    ours, theirs = seen.result.get("best", seen.figures), result.get("best", {})
    table = [
        (n, *(notes.value_of(n, values.get(n)) for values in (ours, theirs)), _explained(n))
        for n in compared()
        if n in ours or n in theirs
    ]
    mine, its = (workdir_lib.flatten(c.to_dict()) for c in (seen.model.config, config))
    body = [
        pages.html("<h2>Beside {}</h2>", other),
        *map(pages.warning, _different_data((seen.model.workdir, mine, ours), (other, its, theirs))),
        pages.table(("metric", *names, "meaning"), table),
    ]
    if curves:
        plot = plots.lines((f"{shown} on test images, %", "", curves), "step")
        body.append(pages.plots([pages.plot(plot, f"{shown} of both runs")]))
    differing = [
        (n, _word(mine.get(n)), _word(its.get(n)))
        for n in sorted(set(mine) | set(its))
        if mine.get(n) != its.get(n) and not n.startswith(SAME_RUN[-1])
    ]
    if differing:
        head = ("setting", *names)
        body.append(pages.fold(f"Settings that differ ({len(differing)})", pages.table(head, differing)))
    return pages.join(body)


def _explained(name: str) -> str:
    words, direction = notes.meaning(name), ARROWS[describe(name).better]
    return f"{words[:-1]}; {direction}." if direction else words


def _word(value: object) -> str:
    return "(not set)" if value is None else str(value)


Side = tuple[Path, dict[str, object], dict[str, float]]  # folder, settings, metrics of a run


def _different_data(ours: Side, theirs: Side) -> list[str]:
    """Why the numbers of two runs cannot be compared, one text each; empty if nothing is known against it."""
    said = []
    one, two = _test_images(ours[0]), _test_images(theirs[0])
    if one is not None and two is not None:
        if one != two:
            sizes = (f"{side.get('images', '?')} images" for side in (one, two))
            said.append(
                f"the two runs were tested on different images ({' and '.join(sizes)}), so their numbers do not "
                f"tell which "
                "run is better. Evaluate both on the same images."
            )
    else:
        fields = [name for name in DATA if ours[1].get(name) != theirs[1].get(name)]
        if fields:
            said.append(
                f"the two runs differ in {', '.join(fields)}, so they may have been tested on different images; "
                f"then their "
                "numbers do not tell which run is better."
            )
    counts = [side[2].get("queries") for side in (ours, theirs)]
    if not said and None not in counts and counts[0] != counts[1]:
        said.append(f"the two runs were tested with {counts[0]:,.0f} and {counts[1]:,.0f} queries.")
    return said


def _test_images(workdir: Path) -> dict[str, object] | None:
    """The record of the test images of a run, as `data_record` writes it; ``None`` without one that can be read."""
    try:
        found = json.loads((workdir / data_record.FILE).read_text()).get("test")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, dict) else None
