"""Planted junk found by ``idml_jax.audit``: images that show nothing of what the collection is about.

    python benchmarks/experiments/audit_junk.py --images=data/cub100 --strangers=data/omniglot_small --out=junk
    python -m idml_jax.embed --workdir=runs/birds --images=junk --out=junk.npz
    python benchmarks/experiments/audit_junk.py --index=birds.npz --junk=junk.npz

The first command writes ``OUT/noise``, ``blank`` (one colour), ``patch`` (2 % of the area of an image of the
collection, enlarged) and ``stranger`` (images of another collection), ``--count`` of each, chosen by a fixed seed. The
last one joins as many as 5 % of the collection, of one kind or of all, each under a class drawn at random, and prints
for every score the precision at the number of planted images, in percent, mean and deviation of three choices. Unusual
images that the collection had before count as false alarms.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from idml_jax.data.lists import list_images
from idml_jax.inference.audit import own_class_cosines, unusual_scores
from idml_jax.inference.index import read
from idml_jax.metrics import retrieval
from idml_jax.metrics.embedded import joined, rows_of

KINDS = ("noise", "blank", "patch", "stranger")
SEEDS, SHARE = (0, 1, 2), 0.05


def junk_of(kind: str, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One image of junk; ``pixels`` are those of an image of the collection, or of the other one for ``stranger``."""
    height, width = pixels.shape[:2]
    if kind == "noise":
        return rng.integers(0, 256, pixels.shape, np.uint8)
    if kind == "blank":
        return np.broadcast_to(rng.integers(0, 256, pixels.shape[2], np.uint8), pixels.shape).copy()
    if kind == "stranger":
        return pixels
    tall, wide = max(2, round(height * 0.02**0.5)), max(2, round(width * 0.02**0.5))
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    return cv2.resize(pixels[top : top + tall, left : left + wide], (width, height), interpolation=cv2.INTER_LINEAR)


def write(images: str, strangers: str, out: Path, count: int) -> None:
    """Writes the folders of junk."""
    rng = np.random.default_rng(0)
    sources = {kind: list_images(strangers if kind == "stranger" else images)[0] for kind in KINDS}
    for kind, source in sources.items():
        (out / kind).mkdir(parents=True, exist_ok=True)
        for record in rng.choice(len(source), count, replace=False).tolist():
            pixels = junk_of(kind, cv2.imread(source.name(record)), rng)
            cv2.imwrite(str(out / kind / f"{record:06d}.png"), pixels)


def precision(index, more, kind: str, seed: int) -> dict[str, float]:
    """Precision at the number of planted images, of the audit's score and of its parts."""
    kinds = np.asarray([Path(name).parent.name for name in more.files.tolist()])
    usable = np.flatnonzero(np.isin(kinds, KINDS if kind == "all" else [kind]))
    rng = np.random.default_rng(seed)
    rows = rng.permutation(usable)[: round(SHARE * len(index))]
    labels = rng.integers(0, len(index.class_names), len(rows))
    embedded = joined([index.embedded, rows_of(more.embedded, rows)._replace(labels=labels)])
    whole = replace(index, embedded=embedded, files=np.concatenate([index.files, more.files[rows]]))
    found = retrieval.neighbours(whole.semantic, k=20)
    planted = np.arange(len(whole)) >= len(index)
    asked = {"with labels": whole, "without": replace(whole, class_names=None)}
    scores = {name: unusual_scores(one, found, own_class_cosines(one)) for name, one in asked.items()}
    scores["distance to the nearest"] = found.distance[:, 0]
    if whole.uncertainty is not None:
        scores["length of u"] = np.linalg.norm(whole.uncertainty, axis=1)
    hits = lambda score: float(planted[np.argsort(-score, kind="stable")[: len(rows)]].mean())
    return {name: hits(score) for name, score in scores.items()} | {"planted": float(len(rows))}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="the collection, to write junk")
    parser.add_argument("--strangers", default="", help="another collection")
    parser.add_argument("--out", type=Path, default=Path("junk"))
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--index", default="", help="embeddings of the collection, to measure")
    parser.add_argument("--junk", default="", help="embeddings of the junk")
    given = parser.parse_args()
    if given.images:
        write(given.images, given.strangers, given.out, given.count)
        return
    index, more = read(given.index), read(given.junk)
    for kind in (*KINDS, "all"):
        each = [precision(index, more, kind, seed) for seed in SEEDS]
        cells = [
            f"{name} {100 * statistics.mean(one[name] for one in each):.1f} ± "
            f"{100 * statistics.pstdev([one[name] for one in each]):.1f}"
            for name in each[0]
            if name != "planted"
        ]
        print(f"{kind}, {each[0]['planted']:.0f} planted: {', '.join(cells)}")


if __name__ == "__main__":
    main()
