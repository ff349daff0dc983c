"""Plots as PNG bytes, made with matplotlib and numpy only; no window is opened and no global state is changed."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import image as mpl_image
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from idml_jax.errors import printable

# Distinguishable with the common forms of colour blindness (Okabe and Ito, 2008), darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#B0A000")
Values = Sequence[float] | Float[np.ndarray, "n"]
Curve = tuple[Values, Values]
Panel = tuple[str, str, Mapping[str, Curve]]  # title, label of the y axis, curves by name
# Besides the colours, so that nothing is told by colour alone.
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (6, 2, 1, 2)), (0, (2, 1.5)), (0, (9, 2, 2, 2)))
MARKERS = "os^DvPX<>p"
SMALL = (3.3, 2.7)  # inches; three in a row of a page, one in a row of a phone


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


def _axis(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#e6e9ec", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8.5)
    return figure, axis


def _short(name: str, length: int = 26) -> str:
    """A name for a label: its beginning and its end."""
    name = printable(name)
    return name if len(name) <= length else name[: length // 3] + "…" + name[1 + length // 3 - length :]


def _label(name: str) -> str:
    """A name for a legend; matplotlib leaves out those that begin with "_"."""
    return printable(f" {name}" if name.startswith("_") else name)


def lines(panel: Panel, x_label: str) -> bytes:
    """Plots curves as PNG.

    Args:
      panel: title, label of the y axis, and curves by name, each a pair (x, y).
      x_label: label of the x axis.
    """
    title, y_label, curves = panel
    figure, axis = _axis(*SMALL)
    for i, (name, (x, y)) in enumerate(curves.items()):
        # A few points are marked; many markers would hide the line.
        marker = MARKERS[i % len(MARKERS)] if len(x) < 15 else None
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        axis.plot(x, y, color=colour, linestyle=style, label=_label(name), linewidth=1.7, marker=marker, markersize=3.5)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel(y_label, fontsize=9)
    if len(curves) > 1:
        axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def risk_coverage(curves: Mapping[str, Curve], oracle: Curve, risk: float) -> bytes:
    """Plots risk over coverage for each score, with the best possible and a random ordering.

    Args:
      curves: coverage and risk by name, from 0 to 1; the first curve is drawn thicker.
      oracle: curve of the ordering that drops all wrong answers first.
      risk: risk of all answers, which a random ordering has at any coverage.

    Returns:
      PNG.
    """
    percent = lambda values: 100 * np.asarray(values)
    figure, axis = _axis(5.0, 4.4)
    axis.axhline(100 * risk, color="#7b8794", linewidth=1.2, linestyle=":", label="blind ordering")
    axis.plot(*map(percent, oracle), color="#7b8794", linewidth=1.2, linestyle="--", label="best possible")
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i % len(STYLES)]
        axis.plot(percent(x), percent(y), color=colour, linestyle=style, label=name, linewidth=2.2 if i == 0 else 1.5)
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 100 * min(max(risk * 1.6, 0.02), 1.02))
    axis.set_title("Risk over coverage", fontsize=10, loc="left")
    axis.set_xlabel("coverage: share of queries answered, %", fontsize=9)
    axis.set_ylabel("risk: share of wrong answers, %", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside lower left")
    return _png(figure)


def histogram(title: str, x_label: str, groups: Mapping[str, Float[np.ndarray, "n"]]) -> bytes:
    """Plots the distributions of groups of values by name; the second is hatched."""
    figure, axis = _axis(4.6, 3.0)
    everything = np.concatenate([np.asarray(v) for v in groups.values()])
    low, high = np.quantile(everything, [0.002, 0.998])
    bins = np.linspace(low, high if high > low else low + 1e-6, 41)
    for i, (name, values) in enumerate(groups.items()):
        axis.hist(
            np.clip(values, low, high),
            bins.tolist(),
            density=True,
            histtype="stepfilled",
            facecolor=(*to_rgb(COLOURS[i]), 0.35),
            edgecolor=COLOURS[i],
            linestyle=STYLES[i % len(STYLES)],
            hatch="////" if i == 1 else None,
            label=f"{name} ({len(values):,})",
        )
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x_label, fontsize=9)
    axis.set_ylabel("density", fontsize=9)
    axis.set_yticks([])
    axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def against_truth(
    truth: Float[np.ndarray, "n"], scores: Float[np.ndarray, "n"], correct: np.ndarray, rank_correlation: float
) -> tuple[bytes, bytes]:
    """Plots the uncertainty of each image over its known ambiguity, with the median, and the recall."""
    figure, left = _axis(4.6, 3.4)
    left.scatter(truth, scores, s=5, alpha=0.25, color=COLOURS[0], linewidths=0, rasterized=True, label="an image")
    edges = np.concatenate([[-1e-9, 1e-9], np.linspace(0.1, 1.0, 10)])
    groups = [np.flatnonzero((truth > low) & (truth <= high)) for low, high in itertools.pairwise(edges)]
    groups = [group for group in groups if len(group) >= 5]
    middle = [float(truth[group].mean()) for group in groups]
    left.plot(middle, [np.median(scores[g]) for g in groups], "o-", color=COLOURS[1], label="median", linewidth=1.8)
    left.set_title(f"Uncertainty |u| (rank correlation {rank_correlation:.2f})", fontsize=10, loc="left")
    left.set_ylim(*np.quantile(scores, [0.002, 0.998]))
    left.set_ylabel("|u|", fontsize=9)
    for handle in left.legend(fontsize=8, frameon=False, markerscale=1.6).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)  # a single point is too pale to be seen
    other, right = _axis(4.6, 3.4)
    right.plot(middle, [100 * correct[g].mean() for g in groups], "o-", color=COLOURS[0], linewidth=1.8)
    right.set_title("Right answers, %", fontsize=10, loc="left")
    for axis in (left, right):
        axis.set_xlabel("true ambiguity of the image", fontsize=9)
    return _png(figure), _png(other)


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


def _map_axis(height: float) -> tuple[Figure, Axes]:
    figure, axis = _axis(5.0, height)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    return figure, axis


def plane_by_class(places: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, "n"], names: Sequence[str]) -> bytes:
    """Plots a map of embeddings: the largest classes by colour and shape, with a legend, and the rest grey."""
    counts = np.bincount(labels)
    largest = np.argsort(-counts, kind="stable")[:20]
    largest = largest[counts[largest] > 0]
    figure, axis = _map_axis(4.4 + 0.17 * -(-len(largest) // 2))
    rest = ~np.isin(labels, largest)
    others = int((counts > 0).sum()) - len(largest)
    if others:
        # Behind the others, but last in the legend.
        axis.scatter(
            places[rest, 0],
            places[rest, 1],
            s=5,
            color="#c3cad2",
            linewidths=0,
            label=f"{others:,} other classes",
            zorder=1,
        )
    for i, label in enumerate(largest.tolist()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        x, y = places[labels == label].T
        axis.scatter(
            x, y, s=15, color=colour, marker=marker, linewidths=0, label=_label(_short(names[label], 25)), zorder=2
        )
    axis.set_title(f"By class: the {len(largest)} largest", fontsize=10, loc="left")
    handles, shown = axis.get_legend_handles_labels()
    first = int(others > 0)
    figure.legend(
        [*handles[first:], *handles[:first]],
        [*shown[first:], *shown[:first]],
        fontsize=7.5,
        frameon=False,
        ncols=2,
        loc="outside lower left",
        columnspacing=1.0,
        handletextpad=0.2,
        labelspacing=0.3,
    )
    return _png(figure)


def plane_by_score(places: Float[np.ndarray, "n 2"], scores: Float[np.ndarray, "n"], name: str) -> bytes:
    """Plots a map of embeddings coloured by a score, from dark (low) to light (high)."""
    figure, axis = _map_axis(4.9)
    low, high = np.quantile(scores, [0.02, 0.98])
    order = np.argsort(scores)
    x, y = places.T
    drawn = axis.scatter(x[order], y[order], s=8, c=scores[order], cmap="viridis", vmin=low, vmax=high, linewidths=0)
    figure.colorbar(drawn, ax=axis, shrink=0.75, label=name, location="bottom")
    axis.set_title(f"By {name}: light is large", fontsize=10, loc="left")
    return _png(figure)


def matrix(values: Float[np.ndarray, "k k"], names: Sequence[str]) -> bytes:
    """Plots a confusion matrix in percent: rows are the classes of queries, columns those of answers."""
    side = 2.3 + 0.24 * len(names)
    figure = Figure(figsize=(side, side + 0.6), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(100 * values, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(values):
        if value >= 0.005:
            colour = "white" if value > 0.6 else "#1f2933"
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
    short = [_short(name, 22) for name in names]
    axis.set_xticks(range(len(names)), short, rotation=90, fontsize=7.5, parse_math=False)
    axis.set_yticks(range(len(names)), short, fontsize=7.5, parse_math=False)
    axis.set_xlabel("class of the nearest image", fontsize=9)
    axis.set_ylabel("class of the query", fontsize=9)
    figure.colorbar(drawn, ax=axis, shrink=0.8, location="bottom", label="share of the class's queries, %")
    return _png(figure)


Cell = tuple[UInt8[np.ndarray, "h w 3"] | None, str, str]
FRAMES = {"": "#ccd2d8", "right": "#2f8f5b", "wrong": "#c8423b", "query": "#33658a"}


def sheet(rows: Sequence[Sequence[Cell]]) -> bytes:
    """A contact sheet: rows of images, each with lines of text and a kind, one of ``FRAMES``; wrong ones are dashed."""
    columns = max(len(row) for row in rows)
    lines = max(caption.count("\n") + 1 for row in rows for _, caption, _ in row)
    height = 1.35 + 0.11 * (lines + 1)  # of a row, with captions of 6.5 points
    figure = Figure(figsize=(1.35 * columns + 0.2, height * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, cell in zip(line, [*row, *[None] * (columns - len(row))], strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if cell is None:
                axis.axis("off")
                continue
            pixels, caption, kind = cell
            if pixels is not None:
                axis.imshow(pixels)
            axis.set_xlabel(caption, fontsize=6.5, linespacing=1.15)
            for spine in axis.spines.values():
                spine.set_color(FRAMES[kind])
                spine.set_linestyle((0, (2, 1)) if kind == "wrong" else "-")
                spine.set_capstyle("butt")  # projecting ends would close the gaps of dashes
                spine.set_linewidth(2.5)
    return _png(figure)
