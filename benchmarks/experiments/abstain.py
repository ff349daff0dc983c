"""What `--abstain` and `--strangers` promise and keep on one network: two tables of docs/uncertainty.md.

    python benchmarks/experiments/abstain.py --data=glyphs --out=runs/open_set
    python benchmarks/experiments/abstain.py --data=omniglot --root=data --out=runs/open_set

The network is that of seed 0 of `open_set.py`, whose finished run is used. First table: every query's class is in the
gallery; held-out classes and searched ones are drawn from the test classes, or held-out classes of training and all
test classes. Second table: a third of the test classes is taken out of the gallery, and 400 queries have a share of
strangers, over five choices, with the held-out classes of training.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from open_set import CHOICES, QUERIES, SETTINGS, TAKEN, HeldOut, among, some, trained
from rows import DATA

from idml_jax.inference.index import Index
from idml_jax.metrics import strangers

SHARES, WANTED, ALLOWED = (0.0, 0.2, 0.5, 0.8, 1.0), (0.8, 0.9, 0.95), (0.1, 0.01)


def splits(held_out: Index, test: Index) -> Iterator[tuple[Index, Index]]:
    """Held-out images and the gallery that is searched."""
    classes = np.unique(test.embedded.labels)
    for count in (len(classes) // 2, 60):
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(classes)
            parts = [np.isin(test.embedded.labels, order[place : place + count]) for place in (0, count)]
            fitted, searched = (some(test, np.flatnonzero(part)) for part in parts)
            yield fitted, searched
    yield held_out, test


def known_classes(held_out: Index, test: Index) -> None:
    print("| held out: classes, images | searched: classes, images | R@1 | wanted | answered | of these right |")
    print("|---|---|---|---|---|---|")
    rows: dict[str, list[tuple[float, float, float]]] = {}
    for fitted, gallery in splits(held_out, test):
        right, found = among(gallery, gallery, HeldOut(fitted), np.arange(len(gallery)))
        calibrated = found.confidence.calibrated
        assert calibrated is not None
        share = strangers.estimated_share(calibrated, found.scores)
        sure = strangers.judge(calibrated, found.scores, share).sure
        sizes = [f"{len(np.unique(one.embedded.labels))}, {len(one):,}" for one in (fitted, gallery)]
        for wanted in WANTED:
            answered = 1 - sure <= strangers.rule(calibrated, share, precision=wanted).value
            kept = right[answered].mean() if answered.any() else float("nan")
            measured = 100 * right.mean(), 100 * answered.mean(), 100 * kept
            rows.setdefault(f"{sizes[0]} | {sizes[1]} | {{}} | {wanted:.0%}", []).append(measured)
    for name, found in rows.items():
        recall, answered, kept = np.asarray(found).T
        spread = f"{np.nanmin(kept):.1f} to {np.nanmax(kept):.1f} %" if len(kept) > 1 else f"{kept[0]:.1f} %"
        print(f"| {name.format(f'{recall.mean():.1f}')} | {answered.mean():.0f} % | {spread} |", flush=True)


def unknown_classes(held_out: Index, test: Index) -> None:
    print("| strangers | right without a threshold | estimated share |", end="")
    print("".join(f" {wanted:.0%} wanted: answered, right |" for wanted in WANTED[:2]), end="")
    print("".join(f" strangers answered, {allowed:g} allowed |" for allowed in ALLOWED))
    print("|---" * 7 + "|")
    rng, labels = np.random.default_rng(0), test.embedded.labels
    classes = np.unique(labels)
    taken = [rng.choice(classes, round(len(classes) * TAKEN), replace=False) for _ in range(CHOICES)]
    for share in SHARES:
        recall, estimated = [], []
        answers: dict[float, list[tuple[float, float]]] = {wanted: [] for wanted in WANTED[:2]}
        given: dict[float, list[float]] = {allowed: [] for allowed in ALLOWED}
        for one in taken:
            strange = np.isin(labels, one)
            count = round(QUERIES * share)
            parts = [rng.permutation(np.flatnonzero(part)) for part in (~strange, strange)]
            rows = np.concatenate([parts[0][: QUERIES - count], parts[1][:count]])
            inside = np.flatnonzero(~strange)
            own = np.where(strange[rows], -1, (np.cumsum(~strange) - 1)[rows])
            right, found = among(some(test, rows), some(test, inside), HeldOut(held_out), own)
            calibrated = found.confidence.calibrated
            assert calibrated is not None
            assumed = strangers.estimated_share(calibrated, found.scores)
            doubt = 1 - strangers.judge(calibrated, found.scores, assumed).sure
            recall.append(100 * right.mean())
            estimated.append(100 * assumed)
            for wanted, kept in answers.items():
                answered = doubt <= strangers.rule(calibrated, assumed, precision=wanted).value
                kept.append((answered.sum(), right[answered].sum()))
            for allowed, kept in given.items():
                answered = doubt <= strangers.rule(calibrated, assumed, answered_strangers=allowed).value
                kept.extend([100 * answered[strange[rows]].mean()] if count else [])
        cells = [f"{100 * share:.0f} %", f"{np.mean(recall):.1f}", f"{np.mean(estimated):.0f} %"]
        for kept in answers.values():
            total, rights = np.sum(kept, axis=0)
            some_right = f"{100 * total / (QUERIES * CHOICES):.0f} %, {100 * rights / max(total, 1):.1f} %"
            cells.append(some_right if total else "nothing")
        cells += [f"{np.mean(kept):.1f} %" if kept else "" for kept in given.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the image sets")
    parser.add_argument("--out", type=Path, default=Path("runs/open_set"))
    given = parser.parse_args()
    DATA["birds_imagenet"]["overrides"].pop("model.init_from")
    held_out, test = trained(given.data, 0, given.root.resolve(), given.out.resolve(), "held_out")
    assert held_out.images is not None
    if given.data == "glyphs":
        known_classes(held_out.images, test)
    unknown_classes(held_out.images, test)


if __name__ == "__main__":
    main()
