"""Plots as PNG bytes, made with matplotlib and numpy only; no window is opened and no global state is changed."""

import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import image as mpl_image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from idml_jax.errors import printable

# Distinguishable with the common forms of colour blindness (Okabe and Ito, 2008), darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#B0A000")
Values = Sequence[float] | Float[np.ndarray, "n"]
Curve = tuple[Values, Values]


def encode(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encodes an image: as PNG if that is small, otherwise as JPEG."""
    out = io.BytesIO()
    if max(pixels.shape[:2]) <= 64:
        mpl_image.imsave(out, pixels, format="png")
    else:
        mpl_image.imsave(out, pixels, format="jpg", pil_kwargs={"quality": 88})
    return out.getvalue()


def _png(figure: Figure) -> bytes:
    for words in figure.findobj(Text):
        words.set_parse_math(False)  # dollar signs in names are not math
        words.set_text("\n".join(map(printable, words.get_text().split("\n"))))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130, facecolor="white")
    return out.getvalue()


def _axes(panels: int, height: float = 3.4, width: float = 10.0, share: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False, sharex=share, sharey=share)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e6e9ec", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9)
    return figure, axes


def lines(panels: Sequence[tuple[str, str, Mapping[str, Curve]]], x_label: str) -> bytes:
    """Plots curves in panels side by side.

    Args:
      panels: title, label of the y axis, and curves by name, each a pair (x, y).
      x_label: label of all x axes.

    Returns:
      PNG.
    """
    figure, axes = _axes(len(panels))
    for axis, (title, y_label, curves) in zip(axes, panels, strict=True):
        for i, (name, (x, y)) in enumerate(curves.items()):
            # A few points are marked; many markers would hide the line.
            marker = "o" if len(x) < 15 else None
            # matplotlib leaves names that begin with "_" out of the legend.
            label = printable(f" {name}" if name.startswith("_") else name)
            axis.plot(x, y, color=COLOURS[i % len(COLOURS)], label=label, linewidth=1.7, marker=marker, markersize=3.5)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel(x_label, fontsize=9)
        axis.set_ylabel(y_label, fontsize=9)
        if len(curves) > 1:
            axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def risk_coverage(curves: Mapping[str, Curve], oracle: Curve, risk: float) -> bytes:
    """Plots risk over coverage for each score, with the best possible and a random ordering.

    Args:
      curves: coverage and risk by name; the first curve is drawn thicker.
      oracle: curve of the ordering that drops all wrong answers first.
      risk: risk of all answers, which a random ordering has at any coverage.

    Returns:
      PNG.
    """
    figure, (axis,) = _axes(1, 4.2, 8.4)
    axis.axhline(risk, color="#9aa5b1", linewidth=1.2, linestyle=":", label="blind ordering")
    axis.plot(*oracle, color="#9aa5b1", linewidth=1.2, linestyle="--", label="best possible")
    for i, (name, (x, y)) in enumerate(curves.items()):
        axis.plot(x, y, color=COLOURS[i % len(COLOURS)], label=name, linewidth=2.2 if i == 0 else 1.5)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, min(max(risk * 1.6, 0.02), 1.02))
    axis.set_xlabel("coverage: share of queries answered", fontsize=9)
    axis.set_ylabel("risk: share of wrong answers", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _png(figure)


def histograms(panels: Sequence[tuple[str, str, Mapping[str, Float[np.ndarray, "n"]]]]) -> bytes:
    """Plots distributions side by side; each panel has a title, a label of the x axis and values by name."""
    figure, axes = _axes(len(panels), 3.0)
    for axis, (title, x_label, groups) in zip(axes, panels, strict=True):
        everything = np.concatenate([np.asarray(v) for v in groups.values()])
        low, high = np.quantile(everything, [0.002, 0.998])
        bins = np.linspace(low, high if high > low else low + 1e-6, 41)
        for i, (name, values) in enumerate(groups.items()):
            axis.hist(
                np.clip(values, low, high),
                bins.tolist(),
                density=True,
                histtype="stepfilled",
                alpha=0.45,
                color=COLOURS[i],
                label=f"{name} ({len(values):,})",
            )
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel(x_label, fontsize=9)
        axis.set_yticks([])
        axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def against_truth(
    truth: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"], correct: np.ndarray, rank_correlation: float
) -> bytes:
    """Plots the uncertainty of each image over its known ambiguity, with the median, next to the recall."""
    figure, (left, right) = _axes(2, 3.6)
    left.scatter(truth, scores, s=5, alpha=0.25, color=COLOURS[0], linewidths=0, rasterized=True)
    edges = np.concatenate([[-1e-9, 1e-9], np.linspace(0.1, 1.0, 10)])
    groups = [np.flatnonzero((truth > low) & (truth <= high)) for low, high in itertools.pairwise(edges)]
    groups = [group for group in groups if len(group) >= 5]
    middle = [float(truth[group].mean()) for group in groups]
    left.plot(middle, [np.median(scores[g]) for g in groups], "o-", color=COLOURS[1], label="median", linewidth=1.8)
    left.set_title(f"Uncertainty |u| (rank correlation {rank_correlation:.2f})", fontsize=11, loc="left")
    left.set_ylim(*np.quantile(scores, [0.002, 0.998]))
    left.legend(fontsize=8, frameon=False)
    right.plot(middle, [100 * correct[g].mean() for g in groups], "o-", color=COLOURS[0], linewidth=1.8)
    right.set_title("Right answers, %", fontsize=11, loc="left")
    for axis in (left, right):
        axis.set_xlabel("true ambiguity of the image", fontsize=9)
    return _png(figure)


def flatten_to_plane(semantic: Float[np.ndarray, "n d"], seed: int = 0) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Projects to two dimensions, by t-SNE if scikit-learn is installed, else by PCA; also names the method."""
    centred = np.asarray(semantic, np.float64) - semantic.mean(axis=0)
    _, scale, axes = np.linalg.svd(centred, full_matrices=False)
    principal = centred @ axes[:2].T
    if principal.shape[1] < 2:
        principal = np.column_stack([principal, np.zeros(len(principal))])
    share = float((scale[:2] ** 2).sum() / max((scale**2).sum(), 1e-30))
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError:
        return principal, f"the first two principal components ({100 * share:.0f}% of the variance)"
    if len(semantic) < 10:
        return principal, "the first two principal components"
    perplexity = min(30.0, (len(semantic) - 1) / 3)
    # Its threads busy-wait, which on a loaded machine is much slower than one thread.
    with threadpool_limits(1, user_api="openmp"):
        placed = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(centred.astype(np.float32))
    return placed, "t-SNE"


def plane(
    places: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, "n"],
    scores: Float[np.ndarray, "n"] | None,
    score_name: str,
) -> bytes:
    """Plots a map of embeddings, coloured by class (the largest classes, the rest grey) and by a score."""
    figure, axes = _axes(1 if scores is None else 2, 4.9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
    counts = np.bincount(labels)
    largest = np.argsort(-counts, kind="stable")[:20]
    rank = np.full(len(counts), -1)
    rank[largest] = np.arange(len(largest))
    own = rank[labels]
    x, y = places.T
    rest = own < 0
    axes[0].scatter(x[rest], y[rest], s=4, color="#d5dae0", linewidths=0)
    some = own >= 0
    axes[0].scatter(x[some], y[some], s=12, c=own[some], cmap="tab20", vmin=0, vmax=19, linewidths=0)
    others = f", {len(counts) - len(largest)} others grey" if len(counts) > len(largest) else ""
    axes[0].set_title(f"By class ({len(largest)} coloured{others})", fontsize=11, loc="left")
    if scores is not None:
        low, high = np.quantile(scores, [0.02, 0.98])
        order = np.argsort(scores)
        drawn = axes[1].scatter(
            x[order], y[order], s=7, c=scores[order], cmap="viridis", vmin=low, vmax=high, linewidths=0
        )
        figure.colorbar(drawn, ax=axes[1], shrink=0.75, label=score_name)
        axes[1].set_title(f"By {score_name}", fontsize=11, loc="left")
    return _png(figure)


def matrix(values: Float[np.ndarray, "k k"], names: Sequence[str]) -> bytes:
    """Plots a confusion matrix: rows are the classes of queries, columns those of answers."""
    side = 3.6 + 0.24 * len(names)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(values, cmap="Blues", vmin=0, vmax=1)
    short = [name if len(name) <= 26 else name[:8] + "…" + name[-17:] for name in map(printable, names)]
    axis.set_xticks(range(len(names)), short, rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(names)), short, fontsize=8, parse_math=False)
    axis.set_xlabel("class of the nearest image", fontsize=9)
    axis.set_ylabel("class of the query", fontsize=9)
    figure.colorbar(drawn, ax=axis, shrink=0.6, label="share of the class's queries")
    return _png(figure)


def sheet(rows: Sequence[Sequence[tuple[UInt8[np.ndarray, "h w 3"] | None, str, str]]]) -> bytes:
    """A contact sheet: rows of images, each with lines of text and a frame colour."""
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.35 * columns + 0.2, 1.95 * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, cell in zip(line, [*row, *[None] * (columns - len(row))], strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if cell is None:
                axis.axis("off")
                continue
            pixels, caption, colour = cell
            if pixels is not None:
                axis.imshow(pixels)
            axis.set_xlabel(caption, fontsize=6.5, linespacing=1.15)
            for spine in axis.spines.values():
                spine.set_color(colour)
                spine.set_linewidth(2.5)
    return _png(figure)
