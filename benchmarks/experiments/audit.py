"""Planted mistakes found by ``idml_jax.audit``: wrong labels and copies, by scores of the package and of cleanlab.

    python benchmarks/experiments/audit_copies.py --images=BIRDS --out=birds_copies
    python -m idml_jax.embed --workdir=runs/birds --images=BIRDS --out=birds.npz
    python -m idml_jax.embed --workdir=runs/birds --images=birds_copies --out=birds_copies.npz
    python benchmarks/experiments/audit.py --index=birds.npz --copies=birds_copies.npz \\
        --origins=birds_copies/origins.csv

Three seeds. *Wrong labels*: 5 % of the labels are replaced by those of other classes, drawn at random, or by the class
of the nearest image of another class (``confusable``, as people do). *Copies*: as many as 5 % of the images are joined
by a copy, of one kind or of all. For every score: the precision at the number of planted mistakes, i.e. of the N images
(pairs) with the largest score, the share that was planted; N is the number planted. Mistakes that the set had before
count as false alarms. If cleanlab is installed, its scores of the same out-of-sample probabilities and its own
``find_label_issues`` are given beside.
"""

import argparse
import csv
import os
import statistics

import numpy as np

from idml_jax.inference.index import read
from idml_jax.metrics import duplicates, label_errors, retrieval, vote

SEEDS, SHARE = (0, 1, 2), 0.05


def hits(wrong: np.ndarray, score: np.ndarray) -> float:
    """Precision at the number of planted mistakes."""
    return float(wrong[np.argsort(-score, kind="stable")[: wrong.sum()]].mean())


def peers(rows: np.ndarray, labels: np.ndarray, found: retrieval.Neighbours) -> dict[str, np.ndarray]:
    """Scores of cleanlab, on the vote of the 50 nearest and on a logistic regression in five folds."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_predict
    except ImportError:
        return {}
    ballot = vote.cast(rows, rows, labels, found, vote.Vote(50, label_errors.VOTE_TEMPERATURE))
    voted = np.zeros((len(rows), labels.max() + 1))
    np.put_along_axis(voted, ballot.labels, ballot.share, axis=1)
    voted = 0.99 * voted + 0.01 / voted.shape[1]
    folds = cross_val_predict(LogisticRegression(C=10.0, max_iter=200), rows, labels, cv=5, method="predict_proba")
    result = {}
    for name, p in (("vote", voted), ("logistic", folds)):
        for method in ("self_confidence", "normalized_margin"):
            result[f"cleanlab {method}, {name}"] = -get_label_quality_scores(labels, p, method=method)
        issues = find_label_issues(labels, p, return_indices_ranked_by="normalized_margin", n_jobs=1)
        print(f"  cleanlab find_label_issues, {name}: {len(issues)} listed")
    return result


def planted_labels(
    labels: np.ndarray, found: retrieval.Neighbours, how: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels with mistakes, and where they are."""
    rng, count = np.random.default_rng(seed), labels.max() + 1
    wrong = np.zeros(len(labels), bool)
    wrong[rng.choice(len(labels), round(SHARE * len(labels)), replace=False)] = True
    changed = labels.copy()
    if how == "random":
        changed[wrong] = (labels[wrong] + rng.integers(1, count, wrong.sum())) % count
        return changed, wrong
    for row in np.flatnonzero(wrong):
        others = [n for n in labels[found.index[row]] if n != labels[row]]
        changed[row] = others[0] if others else (labels[row] + 1) % count
    return changed, wrong


def copies(index, more, origins: dict[str, tuple[str, str]], kind: str, seed: int) -> dict[str, float]:
    """Precision at the number of planted copies, and precision and recall of the default threshold."""
    place = {os.path.realpath(name): row for row, name in enumerate(index.files.tolist())}
    told = [origins[os.path.realpath(name)] for name in more.files.tolist()]
    usable = [row for row, (_, k) in enumerate(told) if kind in (k, "all")]
    chosen: dict[str, int] = {}
    for row in np.random.default_rng(seed).permutation(usable).tolist():
        chosen.setdefault(told[row][0], row)
    rows = list(chosen.values())[: round(SHARE * len(index))]
    whole = np.concatenate([index.semantic, more.semantic[rows]])
    truth = {(place[told[row][0]], len(index) + at) for at, row in enumerate(rows)}
    pairs = duplicates.near_pairs(retrieval.neighbours(whole, k=duplicates.CANDIDATES), np.inf)
    right = np.asarray([tuple(pair) in truth for pair in pairs.rows.tolist()])
    by_distance = np.argsort(pairs.distance, kind="stable")
    listed = pairs.ratio <= duplicates.NEAR
    return {
        "ratio": float(right[: len(rows)].mean()),
        "distance": float(right[by_distance[: len(rows)]].mean()),
        f"precision of ratio <= {duplicates.NEAR}": float(right[listed].mean()) if listed.any() else float("nan"),
        f"recall of ratio <= {duplicates.NEAR}": float(right[listed].sum() / len(rows)),
    }


def show(title: str, found: dict[str, list[float]]) -> None:
    """A table of means and deviations in percent."""
    print(f"\n{title}")
    for name, values in found.items():
        print(f"| {name} | {100 * statistics.mean(values):.1f} ± {100 * statistics.pstdev(values):.1f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--copies", default="")
    parser.add_argument("--origins", default="")
    given = parser.parse_args()
    index = read(given.index)
    rows, labels = index.semantic, index.embedded.labels
    near = retrieval.neighbours(rows, k=label_errors.NEAREST)
    for how in ("random", "confusable"):
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            changed, wrong = planted_labels(labels, near, how, seed)
            seen = label_errors.evidence(rows, changed, near)
            for name, score in (seen.scores() | peers(rows, changed, near)).items():
                found.setdefault(name, []).append(hits(wrong, score))
            flagged = seen.wrong
            found.setdefault("listed: precision", []).append(float(wrong[flagged].mean()))
            found.setdefault("listed: recall", []).append(float(flagged[wrong].mean()))
            found.setdefault("proposed class is the true one", []).append(
                float((seen.proposed == labels)[flagged & wrong].mean())
            )
        show(f"{given.index}: {round(SHARE * len(labels))} wrong labels, {how}", found)
    if not given.copies:
        return
    with open(given.origins, newline="") as file:
        origins = {row["copy"]: (row["origin"], row["kind"]) for row in csv.DictReader(file)}
    more = read(given.copies)
    for kind in ("mirrored", "encoded", "cropped", "all"):
        found = {}
        for seed in SEEDS:
            for name, value in copies(index, more, origins, kind, seed).items():
                found.setdefault(name, []).append(value)
        show(f"{given.index}: copies, {kind}", found)


if __name__ == "__main__":
    main()
