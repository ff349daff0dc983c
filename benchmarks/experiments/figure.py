"""The plot of docs/introspection.md: how well each score detects wrong answers, from the logs of ``run.py``.

python benchmarks/experiments/figure.py --out=runs/experiments --write=docs/uncertainty.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import UNCERTAINTY, figures

SETS = {
    "omniglot": "Omniglot", "glyphs": "glyphs", "tiny_pretrained": "Tiny ImageNet", "tiny": "Tiny ImageNet",
    "birds_imagenet": "birds",
}  # fmt: skip
COLOURS = {"learned": "#c2410c", "free": "#64748b", "joined": "#1d4ed8"}
KINDS = {
    "learned": ("uncertainty", "pair_uncertainty", "introspective_distance"),
    "joined": ("free_confidence", "confidence"),
}
LABELS = {"learned": "learned with the metric", "free": "baseline", "joined": "joined on held-out classes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--row", default="ism+mixup")
    parser.add_argument("--write", type=Path, default=Path("docs/uncertainty.png"))
    arguments = parser.parse_args()
    shown = {}
    for data, title in SETS.items():
        if title not in shown and (runs := figures(arguments.out, "B", data, arguments.row)):
            shown[title] = runs
    names = list(UNCERTAINTY)[::-1]
    lines = -(-len(shown) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(8.4, 3.3 * lines + 0.3), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, (title, runs) in zip(axes.flat, shown.items(), strict=False):
        for place, name in enumerate(names):
            kind = next((kind for kind, some in KINDS.items() if name in some), "free")
            for prefix, filled, shift in (("", True, 0.14), ("corrupted/", False, -0.14)):
                values = [run[f"{prefix}R-AUROC({name})"] for run in runs if f"{prefix}R-AUROC({name})" in run]
                axis.scatter(
                    values,
                    [place + shift] * len(values),
                    s=34,
                    linewidths=1.3,
                    edgecolors=COLOURS[kind],
                    facecolors=COLOURS[kind] if filled else "white",
                    zorder=3,
                )
        axis.axvline(0.5, color="#94a3b8", linewidth=1, linestyle=":")
        axis.set_title(f"{title} ({len(runs)} {'seed' if len(runs) == 1 else 'seeds'})", fontsize=10)
        axis.set_xlim(0.25, 1.0)
        axis.set_xlabel("R-AUROC" if axis in axes[-1] else "", fontsize=9)
        axis.grid(axis="x", color="#e2e8f0", linewidth=0.8)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), [UNCERTAINTY[name] for name in names])
    dot = lambda label, colour="#475569", **more: plt.Line2D(
        [], [], marker="o", linestyle="", color=colour, label=label, **more
    )
    handles = [dot(label, COLOURS[kind]) for kind, label in LABELS.items()]
    handles += [dot("clean queries"), dot("clean and corrupted", markerfacecolor="white")]
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(arguments.write, dpi=130)
    print(arguments.write)


if __name__ == "__main__":
    main()
