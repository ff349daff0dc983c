"""How well answers and strangers are told, over several seeds: runs and the tables of docs/uncertainty.md.

    python benchmarks/experiments/open_set.py --data=glyphs --seeds=0,1,2 --out=runs/open_set
    python benchmarks/experiments/open_set.py --data=omniglot --root=data --seeds=0,1,2 --out=runs/open_set
    python benchmarks/experiments/open_set.py --data=birds --root=data --seeds=0,1,2 --out=runs/open_set

Each seed trains a network with a fifth of the training classes held out (birds: the closed form on EfficientNet-Lite0,
96 pixels; there a seed only chooses the held-out classes), embeds held-out and test classes, and measures on the test
classes: wrong answers against right ones and the calibration with all classes known, and strangers with a third of the
classes taken out of the gallery, over five choices of classes. The baseline score of a set is fixed beforehand: the
share of the vote. Finished runs are skipped.

``--fitted_on`` says which images fit the confidence: ``held_out``, classes held out from training; ``distractors``, the
same, which search the training images, too; ``gallery``, the images that are searched. Queries are then never images
of the gallery: each quarter of the images of every class asks the other three; with ``other classes`` in the name of a
measure the confidence of a query is fitted on the half of the classes that is not the query's.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from rows import DATA
from run import ROOT, command

from idml_jax import embeddings
from idml_jax.inference import sureness
from idml_jax.inference.index import Index
from idml_jax.metrics import calibration, strangers, uncertainty
from idml_jax.metrics.classification import calibration_error, calibration_error_by_chance
from idml_jax.metrics.embedded import rows_of, scores_of

COMMON = {"data.validation_classes": 0.2, "eval.ambiguity_images": 0, "eval.cluster": False}
SETTINGS = {
    "glyphs": COMMON,
    "omniglot": {**COMMON, "epochs": 6},
    "birds": {
        **COMMON,
        "model.name": "auto",
        "model.init_from": "efficientnet_lite0",
        "data.image_size": 96,
        "data.resize": 96,
        "ism.enabled": False,
    },
}
CHOICES, QUERIES, TAKEN = 5, 400, 1 / 3  # choices of classes, queries of each, share of the classes taken out
SHARES, WANTED, ALLOWED = (0.0, 0.2, 0.5), (0.8, 0.9), (0.1, 0.01)
BASELINE = "vote_share"
SPLITS = ("validation", "test", "train")
QUARTERS = 4
FittedOn = Literal["held_out", "distractors", "gallery"]


class HeldOut(NamedTuple):
    """The images that the confidence is fitted on: ``None`` is the gallery; and distractors, if they are wanted."""

    images: Index | None
    distractors: Index | None = None


def trained(data: str, seed: int, root: Path, out: Path, fitted_on: FittedOn) -> tuple[HeldOut, Index]:
    """The held-out images and the test images of the run of a seed."""
    workdir = out / data / f"seed{seed}"
    name = "birds_imagenet" if data == "birds" else data
    train = command(name, data, SETTINGS[data], seed, root, out, workdir)
    if data == "birds":
        train[train.index("idml_jax.main")] = "idml_jax.fit"
    embed = lambda split: [
        sys.executable, "-m", "idml_jax.embed", f"--workdir={workdir}", f"--split={split}",
        f"--out={workdir / split}.npz",
    ]  # fmt: skip
    steps = [(workdir / "result.json", train)]
    steps += [(workdir / f"{split}.npz", embed(split)) for split in SPLITS]
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir.parent / f"seed{seed}.log").open("a") as log:
        for made, run in steps:
            if not made.exists():
                subprocess.run(run, cwd=ROOT, stdout=log, stderr=log, check=True)
    held_out, test, images = (embeddings.read(workdir / f"{split}.npz") for split in SPLITS)
    fits = {"held_out": HeldOut(held_out), "distractors": HeldOut(held_out, images), "gallery": HeldOut(None)}
    return fits[fitted_on], test


def some(index: Index, chosen: np.ndarray) -> Index:
    """Some images of an index, without the file they come from."""
    return dataclasses.replace(
        index, embedded=rows_of(index.embedded, chosen), files=index.files[chosen], path=None, ambiguity=None
    )


def among(
    queries: Index, gallery: Index, held_out: HeldOut, own: np.ndarray | None
) -> tuple[np.ndarray, sureness.Scored]:
    """Whether the nearest image is of the query's class, and the scores of the answers with their confidence."""
    near = uncertainty.nearest_twenty(queries.embedded.semantic, gallery.embedded.semantic, own=own)
    right = gallery.embedded.labels[near.index[:, 0]] == queries.embedded.labels
    images = gallery if held_out.images is None else held_out.images
    fit = lambda names: sureness.fit(images, gallery, names, sureness.Wanted(), held_out.distractors)
    confident = lambda names: sureness.Confidence(fit(names), "")
    return right, sureness.scored(queries, gallery, own, confident)


def closed(held_out: HeldOut, test: Index) -> dict[str, float]:
    """All classes known: detection of wrong answers, and the calibration of `sure`."""
    if held_out.images is None:
        return fitted_on_gallery(test)
    right, found = among(test, test, held_out, np.arange(len(test)))
    sure = sure_of(found.confidence.calibrated, found.scores)
    area = lambda doubt: uncertainty.r_auroc(doubt, right)
    without_u = [name for name in found.scores if "uncertainty" not in name and "introspective" not in name]
    beside = sureness.held_out_beside(held_out.images, test, held_out.distractors)
    known = calibration.answer(beside, test.metric, labelled=True, balanced=False)
    plain = calibration.fit(known, without_u)
    no_u = sure_of(plain, {name: found.scores[name] for name in without_u})
    return {
        "R@1": right.mean(),
        "R-AUROC joined": area(1 - sure),
        "R-AUROC joined without u": area(1 - no_u),
        f"R-AUROC {BASELINE}": area(found.scores[BASELINE]),
        "ECE of sure": calibration_error(sure, right),
        "ECE of sure by chance": calibration_error_by_chance(sure),
    }


def fitted_on_gallery(test: Index) -> dict[str, float]:
    """As ``closed``, with a confidence that is fitted on the gallery itself, or on half of its classes."""
    rng, labels = np.random.default_rng(0), test.embedded.labels
    quarter, half = np.empty(len(labels), int), np.zeros(len(labels), bool)
    classes = rng.permutation(np.unique(labels))
    half[np.isin(labels, classes[: len(classes) // 2])] = True
    for one in classes:
        rows = rng.permutation(np.flatnonzero(labels == one))
        quarter[rows] = np.arange(len(rows)) % QUARTERS
    right, sure, other = np.empty(len(labels), bool), np.empty(len(labels)), np.empty(len(labels))
    for number in range(QUARTERS):
        asks = quarter == number
        gallery = some(test, np.flatnonzero(~asks))
        right[asks], found = among(some(test, np.flatnonzero(asks)), gallery, HeldOut(None), None)
        sure[asks] = sure_of(found.confidence.calibrated, found.scores)
        for judged in (half, ~half):
            rows, queries = np.flatnonzero(~judged[~asks]), np.flatnonzero(asks & judged)
            fits = calibration.HeldOut(rows_of(gallery.embedded, rows), gallery.embedded, rows)
            known = calibration.answer(fits, test.metric)
            other[queries] = sure_of(calibration.fit(known), scores_among(some(test, queries), gallery, known))
    return {
        "R@1": right.mean(),
        "R-AUROC joined": uncertainty.r_auroc(1 - sure, right),
        "R-AUROC joined, other classes": uncertainty.r_auroc(1 - other, right),
        "ECE of sure": calibration_error(sure, right),
        "ECE of sure by chance": calibration_error_by_chance(sure),
        "ECE of sure, other classes": calibration_error(other, right),
        "ECE of sure, other classes, by chance": calibration_error_by_chance(other),
    }


def sure_of(calibrated: calibration.Calibration | None, scores: dict[str, np.ndarray]) -> np.ndarray:
    """The probability that each answer is right, where all classes are known."""
    assert calibrated is not None
    return strangers.judge(calibrated, scores, share=0.0).sure


def scores_among(queries: Index, gallery: Index, known: calibration.Known) -> dict[str, np.ndarray]:
    """The scores of a gallery's answers to queries that are not in it."""
    near = uncertainty.nearest_twenty(queries.embedded.semantic, gallery.embedded.semantic)
    return scores_of(queries.embedded, gallery.embedded, gallery.metric, None, near, setting=known.setting)


def opened(held_out: HeldOut, test: Index, seed: int) -> dict[str, float]:
    """A part of the classes unknown: what `--abstain` promises and keeps, and how strangers are told."""
    rng, kept = np.random.default_rng(seed), {}
    classes = np.unique(test.embedded.labels)
    for _ in range(CHOICES):
        taken = rng.choice(classes, round(len(classes) * TAKEN), replace=False)
        strange = np.isin(test.embedded.labels, taken)
        known_rows = rng.permutation(np.flatnonzero(~strange))
        strange_rows = rng.permutation(np.flatnonzero(strange))
        for share in SHARES:
            count = min(round(QUERIES * share), len(strange_rows))
            rows = np.concatenate([known_rows[: QUERIES - count], strange_rows[:count]])
            inside = ~strange
            if held_out.images is None:  # which are the gallery, so no query may be in it
                inside[known_rows[: QUERIES - count]] = False
            gallery, queries = some(test, np.flatnonzero(inside)), some(test, rows)
            own = np.where(inside[rows], (np.cumsum(inside) - 1)[rows], -1)
            right, found = among(queries, gallery, held_out, own)
            calibrated = found.confidence.calibrated
            assert calibrated is not None
            assumed = strangers.estimated_share(calibrated, found.scores)
            judged = strangers.judge(calibrated, found.scores, assumed)
            for wanted in WANTED:
                rule = strangers.rule(calibrated, assumed, precision=wanted)
                answered = 1 - judged.sure <= rule.value
                name = f"{share:.0%} strangers, {wanted:.0%} wanted"
                kept.setdefault(f"answered, {name}", []).append(answered.mean())
                if answered.any():
                    kept.setdefault(f"right, {name}", []).append(right[answered].mean())
            for allowed in ALLOWED if share else ():
                rule = strangers.rule(calibrated, assumed, answered_strangers=allowed)
                answered = (1 - judged.sure <= rule.value)[strange[rows]]
                kept.setdefault(f"strangers answered, {share:.0%} strangers, {allowed:.0%} allowed", []).append(
                    answered.mean()
                )
            if 0 < share < 1 and judged.known is not None:
                for score, values in (("joined", 1 - judged.known), (BASELINE, found.scores[BASELINE])):
                    area = uncertainty.r_auroc(values, ~strange[rows])
                    kept.setdefault(f"AUROC of strangers, {score}", []).append(area)
    return {name: float(np.mean(values)) for name, values in kept.items()} | {
        f"lowest of {name}": float(np.min(values)) for name, values in kept.items() if name.startswith("right")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the image sets")
    parser.add_argument("--out", type=Path, default=Path("runs/open_set"))
    parser.add_argument("--fitted_on", choices=get_args(FittedOn), default="held_out")
    given = parser.parse_args()
    DATA["birds_imagenet"]["overrides"].pop("model.init_from")
    found: dict[str, list[float]] = {}
    for seed in map(int, given.seeds.split(",")):
        held_out, test = trained(given.data, seed, given.root.resolve(), given.out.resolve(), given.fitted_on)
        measured = closed(held_out, test) | opened(held_out, test, seed)
        print(seed, json.dumps({name: round(float(value), 4) for name, value in measured.items()}), flush=True)
        for name, value in measured.items():
            found.setdefault(name, []).append(float(value))
    print(f"| {given.data} | mean | deviation | seeds |\n|---|---|---|---|")
    for name, values in found.items():
        spread = f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else "-"
        print(f"| {name} | {100 * statistics.mean(values):.1f} | {spread} | {len(values)} |")


if __name__ == "__main__":
    main()
