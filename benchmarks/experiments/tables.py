"""Markdown tables from the logs of ``run.py``; ``--write`` inserts them between the marks of a page.

    python benchmarks/experiments/tables.py --out=runs/experiments [--write=docs/introspection.md]

A cell is the mean over the seeds that have finished, +- their standard deviation where there are two or more. Where a
run was evaluated again (``--mode=eval``), those metrics are used.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from rows import COLLAPSING, DATA, FIRST, LATER, METRICS, TABLES
from run import folder_of

ACCURACY = {"R@1": "R@1", "MAP@R": "MAP@R", "NMI": "NMI"}
FREE = ("nearest_distance", "margin_2", "margin_10", "margin_20", "norm")
UNCERTAINTY = {
    "uncertainty": "norm of u", "pair_uncertainty": "norm of u + u'", "introspective_distance": "D",
    "nearest_distance": "distance", "margin_10": "margin 10", "margin_20": "margin 20", "ratio_20": "ratio 20",
    "free_confidence": "baselines joined", "confidence": "all joined",
}  # fmt: skip
AMBIGUITY = {
    "P(u_mixed>u)": "mixed", "P(u_crop>u)": "cropped", "P(u_blur>u)": "blurred", "P(u_noise>u)": "noised",
    "P(u_occlusion>u)": "occluded", "spearman(u,ambiguity)": "Spearman with the truth", "s-u_correlation": "s-u corr.",
}  # fmt: skip
CLASSES = {
    "top1": "top-1", "nll": "NLL", "ece": "ECE", "AUROC_error(u)": "error AUROC of u",
    "AUROC_error(max_softmax)": "of max-softmax", "mean_u": "mean u", "P(u_mixed>u)": "P(u mixed > u)",
    "P(u_cutmix>u)": "P(u CutMix > u)", "P(u_blur>u)": "P(u blurred > u)", "P(u_occlusion>u)": "P(u occluded > u)",
}  # fmt: skip
PERCENT = {*ACCURACY, "top1", "ece", "corrupted/R@1"}


def figures_by_seed(out: Path, table: str, data: str, row: str) -> dict[str, dict[str, float]]:
    """Metrics of every finished seed."""
    found = {}
    for path in sorted((out / table / data / folder_of(row)).glob("seed*/result.json")):
        values = json.loads(path.read_text())["final"]
        again = path.with_name("eval.json")
        found[path.parent.name] = values | (json.loads(again.read_text()) if again.exists() else {})
    return found


def figures(out: Path, table: str, data: str, row: str) -> list[dict[str, float]]:
    return list(figures_by_seed(out, table, data, row).values())


def cell(runs: list[dict[str, float]], name: str) -> str:
    values = [run[name] for run in runs if run.get(name) is not None]
    if not values:
        return ""
    factor, digits = (100, 1) if name in PERCENT else (1, 3)
    text = f"{factor * statistics.mean(values):.{digits}f}"
    return text + (f" ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def show(out: Path, table: str, data: str, columns: dict[str, str]) -> list[str]:
    """One table; rows without any of these metrics are left out."""
    rows = [(row, runs) for row in TABLES[table]() if (runs := figures(out, table, data, row))]
    rows = [(row, runs) for row, runs in rows if any(cell(runs, k) for k in columns)]
    return lines_of("row", rows, columns)


def lines_of(head: str, rows: list[tuple[str, list[dict[str, float]]]], columns: dict[str, str]) -> list[str]:
    """Rows by their names; columns that are empty in all are left out."""
    columns = {k: v for k, v in columns.items() if any(cell(runs, k) for _, runs in rows)}
    lines = [f"| {head} | seeds | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    return lines + [f"| {row} | {len(runs)} | {' | '.join(cell(runs, k) for k in columns)} |" for row, runs in rows]


def accuracy_of(out: Path, table: str, data: str, names: tuple[str, ...], metrics: tuple[str, ...]) -> list[str]:
    """One line per loss with R@1, MAP@R and NMI for each way of training, and the mean over the losses."""
    lines = [f"| loss | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    by_seed = {
        (loss, metric): figures_by_seed(out, table, data, f"{loss}/{metric}") for loss in names for metric in metrics
    }
    found = {key: list(runs.values()) for key, runs in by_seed.items()}
    if not any(found.values()):
        return []
    for loss in names:
        cells = (" / ".join(cell(found[loss, metric], name) for name in ACCURACY) for metric in metrics)
        counts = [len(runs) for m in metrics if (runs := found[loss, m])] or [0]
        seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
        lines.append(f"| {loss} ({seeds}) | {' | '.join(cells)} |")
    means = []
    for metric in metrics:
        every = [runs for loss in names if (runs := found[loss, metric])]
        mean = lambda k, every=every: statistics.mean(statistics.mean(run[k] for run in runs) for runs in every)
        means.append(" / ".join(f"{100 * mean(k):.1f}" for k in ACCURACY) if every else "")
    lines.append(f"| mean | {' | '.join(means)} |")
    pairs = (("plain", "ism"), ("plain+mixup", "ism+mixup"), ("plain", "plain+mixup"), ("ism", "ism+mixup"))
    pairs = tuple(pair for pair in pairs if set(pair) <= set(metrics))
    told = [line for pair in pairs if (line := difference(by_seed, *pair, names))]
    alive = tuple(loss for loss in names if loss not in COLLAPSING)
    if alive == names:
        return [*lines, "", *told]
    told += [f"{line}, losses with a living u" for pair in pairs[:2] if (line := difference(by_seed, *pair, alive))]
    return [*lines, "", *told]


def difference(
    by_seed: dict[tuple[str, str], dict[str, dict[str, float]]], one: str, other: str, of: tuple[str, ...]
) -> str:
    """R@1 of two ways of training, loss by loss and seed by seed."""
    gains = []
    for loss in of:
        before, after = by_seed[loss, one], by_seed[loss, other]
        gains += [after[seed]["R@1"] - before[seed]["R@1"] for seed in before if seed in after]
    if len(gains) < 2:
        return ""
    error = statistics.stdev(gains) / len(gains) ** 0.5
    return (
        f"* R@1 of {other} minus that of {one}, same loss and seed: {100 * statistics.mean(gains):+.1f} points "
        f"(standard error {100 * error:.1f}, {len(gains)} pairs, {sum(gain > 0 for gain in gains)} above 0)"
    )


def of_losses(out: Path, data: str) -> list[str]:
    """Quality of u for every loss, from the runs of table A, and whether D detects errors better than the distance."""
    scores = ("uncertainty", "introspective_distance", "nearest_distance", "margin_20")
    columns = {"R@1": "R@1", "uncertainty_mean": "mean length of u", "uncertainty_std": "its deviation"}
    columns |= {f"R-AUROC({k})": UNCERTAINTY[k] for k in scores} | AMBIGUITY
    rows = [f"{loss}/{metric}" for metric in ("ism", "ism+mixup") for loss in FIRST]
    found = {row.replace("/", ", "): runs for row in rows if (runs := figures(out, "A", data, row))}
    kept = {row.replace(", ", ", ism+mixup, "): runs for row in TABLES["U"]() if (runs := figures(out, "U", data, row))}
    gains = [
        run["R-AUROC(introspective_distance)"] - run["R-AUROC(nearest_distance)"]
        for runs in found.values()
        for run in runs
    ]
    if len(gains) < 2:
        return []
    error = statistics.stdev(gains) / len(gains) ** 0.5
    return [
        *lines_of("loss", list((found | kept).items()), columns),
        "",
        f"* R-AUROC of D minus that of the distance, same run of table A: {statistics.mean(gains):+.3f} (standard "
        f"error {error:.3f}, {len(gains)} runs, {sum(gain > 0 for gain in gains)} above 0)",
    ]


def beaten(out: Path, data: str) -> list[str]:
    """Compares joined scores with the best baseline score, run by run."""
    lines = []
    for place, prefix in (("clean queries", ""), ("clean and corrupted queries", "corrupted/")):
        for name in ("free_confidence", "confidence"):
            gains = []
            for row in TABLES["B"]():
                for run in figures(out, "B", data, row):
                    if (value := run.get(f"{prefix}R-AUROC({name})")) is not None:
                        gains.append(value - max(run.get(f"{prefix}R-AUROC({free})", 0) for free in FREE))
            if gains:
                better = sum(gain > 0 for gain in gains)
                lines.append(
                    f"* {place}, {UNCERTAINTY[name]}: above every baseline score in {better} of {len(gains)} runs; "
                    f"gain over the best of them {statistics.mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
                )
    return lines


def sections(out: Path) -> dict[str, list[str]]:
    """Every table by its mark."""
    joined = {f"R-AUROC({k})": v for k, v in UNCERTAINTY.items()}
    corrupted = {"corrupted/R@1": "R@1"} | {f"corrupted/{k}": v for k, v in joined.items()}
    made = {}
    for data in DATA:
        made[f"A {data}"] = accuracy_of(out, "A", data, FIRST, tuple(METRICS))
        made[f"L {data}"] = accuracy_of(out, "L", data, LATER, ("plain", "ism"))
        made[f"A {data} uncertainty"] = of_losses(out, data)
        made[f"B {data}"] = show(out, "B", data, ACCURACY | joined)
        made[f"B {data} corrupted"] = show(out, "B", data, corrupted)
        made[f"B {data} aurc"] = show(out, "B", data, {f"AURC({k})": v for k, v in UNCERTAINTY.items()})
        made[f"B {data} ambiguity"] = show(out, "B", data, AMBIGUITY)
        made[f"B {data} beaten"] = beaten(out, data)
        made[f"K {data}"] = show(out, "K", data, CLASSES)
    return {mark: lines for mark, lines in made.items() if len(lines) > 2 or (lines and "beaten" in mark)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--write", type=Path, help="page with the marks <!-- table NAME --> and <!-- end -->")
    arguments = parser.parse_args()
    made = sections(arguments.out)
    if not arguments.write:
        for mark, lines in made.items():
            print(f"\n{mark}\n\n" + "\n".join(lines))
        return
    text = arguments.write.read_text()
    for mark, lines in made.items():
        pattern = re.compile(rf"(<!-- table {re.escape(mark)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, lines=lines: m[1] + "\n" + "\n".join(lines) + "\n\n" + m[2], text)
        print(f"{mark}: {'written' if count else 'no such mark'}")
    arguments.write.write_text(text)


if __name__ == "__main__":
    main()
