"""Draws docs/readme.png: queries with their nearest images, and the least and the most uncertain images.

    python -m idml_jax.main --config=glyphs:quick --workdir=runs/glyphs
    python -m idml_jax.embed --workdir=runs/glyphs --split=test --out=glyphs.npz
    python docs/readme_picture.py --index=glyphs.npz

The queries are not picked by hand: they are those at fixed shares of all images sorted by the length of ``u``.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from idml_jax.data import datasets
from idml_jax.data.images.decode import decode

RIGHT, WRONG, QUERY, PLAIN = "#2f8f5b", "#c8423b", "#33658a", "#b8c0c8"
SHARES = (0.02, 0.25, 0.5, 0.97)
SHOWN = 9  # columns


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help="embeddings of the test split of the glyphs")
    parser.add_argument("--write", type=Path, default=Path(__file__).parent / "readme.png")
    given = parser.parse_args()
    with np.load(given.index, allow_pickle=False) as file:
        semantic, labels, length = file["semantic"], file["labels"], file["uncertainty_norm"]
        records = [int(name.rpartition(" ")[2]) for name in file["files"].tolist()]
    source = datasets.load_dataset("glyphs", variant="default").test
    image = lambda row: decode(source.read(records[row]), 1).reshape(32, 32)
    order = np.argsort(length, kind="stable")
    rows = []
    for share in SHARES:
        query = int(order[round(share * (len(order) - 1))])
        near = [int(i) for i in np.argsort(-(semantic @ semantic[query]), kind="stable") if i != query][: SHOWN - 1]
        cells = [(query, QUERY, f"query, |u| {length[query]:.2f}", "-")]
        for row in near:
            right = labels[row] == labels[query]
            distance = np.sqrt(max(0.0, 2 - 2 * float(semantic[row] @ semantic[query])))
            cells.append(
                (row, RIGHT if right else WRONG, f"{'✓' if right else '✗'} {distance:.2f}", "-" if right else ":")
            )
        rows.append(cells)
    step = len(order) // 400
    for those in (order[: SHOWN * step : step], order[::-1][: SHOWN * step : step]):
        rows.append([(int(row), PLAIN, f"|u| {length[row]:.2f}", "-") for row in those])
    titles = {
        0: "Search: a query and its nearest images with their distances, ✓ of the same class, ✗ of another",
        len(SHARES): "The least uncertain images",
        len(SHARES) + 1: "The most uncertain images",
    }
    # All lengths are in pixels of the picture.
    side, across, down, left, title = 70, 100, 100, 14, 26
    tops = np.cumsum([down + title * (i in titles) for i in range(len(rows))]) - down + 6
    width, height = left + across * SHOWN, int(tops[-1]) + down
    figure = plt.figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    for i, (cells, top) in enumerate(zip(rows, tops, strict=True)):
        if i in titles:
            figure.text(left / width, 1 - (top - 7) / height, titles[i], fontsize=10.5, fontweight="bold", va="bottom")
        for j, (row, colour, words, style) in enumerate(cells):
            x, y = left + across * j, top + side
            axis = figure.add_axes((x / width, 1 - y / height, side / width, side / height))
            axis.imshow(image(row), cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(words, fontsize=8.5, labelpad=3)
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2.5, linestyle=style)
    figure.canvas.draw()
    # 16 colours are enough, and keep the file small.
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    pixels.quantize(16, dither=Image.Dither.NONE).save(given.write, optimize=True)


if __name__ == "__main__":
    main()
