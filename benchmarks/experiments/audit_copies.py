"""Copies of images as near-duplicates in disguise: mirrored, re-encoded and cropped ones, for ``audit.py``.

    python benchmarks/experiments/audit_copies.py --images=data/cub100/test --count=300 --out=data/cub100_copies

Writes ``OUT/mirrored/``, ``OUT/encoded/`` and ``OUT/cropped/`` with one copy each of the chosen images, and
``OUT/origins.csv`` with the columns copy, origin and kind. The choice is by a fixed seed.
"""

import argparse
import csv
from pathlib import Path

import cv2
import numpy as np

from idml_jax.data.lists import list_images

KINDS = ("mirrored", "encoded", "cropped")


def copy_of(pixels: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A copy and the JPEG quality that it is written with."""
    height, width = pixels.shape[:2]
    if kind == "mirrored":
        return pixels[:, ::-1], 95
    if kind == "encoded":  # half the pixels per side, a low quality
        return cv2.resize(pixels, (max(8, width // 2), max(8, height // 2)), interpolation=cv2.INTER_AREA), 40
    share = rng.uniform(0.75, 0.9)
    tall, wide = round(share * height), round(share * width)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    return pixels[top : top + tall, left : left + wide], 95


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    source, _ = list_images(given.images)
    rng = np.random.default_rng(0)
    rows = []
    for record in sorted(rng.choice(len(source), given.count, replace=False).tolist()):
        origin = source.name(record)
        pixels = cv2.imread(origin)
        for kind in KINDS:
            changed, quality = copy_of(pixels, kind, rng)
            path = given.out / kind / f"{record:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.ascontiguousarray(changed), [cv2.IMWRITE_JPEG_QUALITY, quality])
            rows.append((str(path.resolve()), str(Path(origin).resolve()), kind))
    with (given.out / "origins.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("copy", "origin", "kind"), *rows])


if __name__ == "__main__":
    main()
