"""Draws docs/losses_*.png: the pull or push that each loss gives to one pair, by the pair's distance.

    python docs/losses_picture.py

Nothing is drawn from formulas: the losses themselves are differentiated, and averaged over many anchors whose other
pairs lie as in a half-trained network.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from idml_jax import ism, losses

GROUPS = {
    "proxies": {
        "proxy_nca": "ProxyNCA",
        "proxy_anchor": "ProxyAnchor",
        "normalized_softmax": "normalized softmax",
        "cosface": "CosFace",
        "arcface": "ArcFace",
        "subcenter_arcface": "sub-centre ArcFace",
        "soft_triple": "SoftTriple",
    },
    "pairs": {
        "contrastive": "contrastive",
        "margin_distance_weighted": "margin, distance-weighted",
        "multi_similarity": "multi-similarity",
        "circle": "circle",
    },
    "softmax": {"info_nce": "InfoNCE", "sup_con": "SupCon", "n_pair": "N-pair"},
    "ranks": {
        "triplet_semihard": "triplet, semi-hard",
        "triplet_hard": "triplet, hardest",
        "lifted_structure": "lifted structure",
        "fast_ap": "FastAP",
        "smooth_ap": "Smooth-AP",
        "recall_at_k": "recall@k",
    },
    "schools": {"mc_info_nce": "MC-InfoNCE", "elk": "ELK", "hedged_instance": "hedged instance"},
}
COLUMNS = 4
ANCHORS, POSITIVES, NEGATIVES = 400, 3, 40
POSITIVE, NEGATIVE = (0.8, 0.2), (1.25, 0.12)  # mean and standard deviation of the other distances
DIMENSIONS, SCHOOL_ANCHORS = 64, 100  # of the losses that read embeddings
UNCERTAINTIES = (0.3, 1.0)
PULL, PUSH, INK = "#1f6fb2", "#c8442c", "#444444"


def distances(positives, negatives, anchors):
    """The distances of every anchor's pairs, positives first: ``[anchors, positives + negatives]``."""
    rng = np.random.default_rng(0)
    drawn = [rng.normal(*POSITIVE, (anchors, positives)), rng.normal(*NEGATIVE, (anchors, negatives))]
    return jnp.asarray(np.clip(np.concatenate(drawn, axis=1), 0.05, 1.95), jnp.float32)


def similarity(distance):
    """The cosine of normalised vectors."""
    return 1 - distance * distance / 2


def on_row(name, spec):
    """Loss of one anchor from its row of distances, and its numbers of positives and negatives."""
    # For one image a loss on proxies knows one class as positive; ProxyAnchor's anchor is the proxy.
    positives = spec.centres if spec.references == "proxies" and name != "proxy_anchor" else POSITIVES
    positives = 1 if name == "n_pair" else positives
    negatives = NEGATIVES * spec.centres
    is_positive = jnp.arange(positives + negatives) < positives
    shape = (-1, 1) if name == "proxy_anchor" else (1, -1)
    pairs = losses.Pairs(is_positive.reshape(shape), ~is_positive.reshape(shape))

    def loss(row):
        matrix = row if spec.reads == "distance" else similarity(row)
        return spec.function(matrix.reshape(shape), pairs)

    def n_pair(row):
        # Its negatives are the positives of other anchors, so those need rows, too.
        own = jnp.eye(len(row), dtype=bool)
        matrix = jnp.broadcast_to(similarity(row), own.shape)
        return losses.n_pair(matrix, losses.Pairs(own, ~own), reduction="none")[0]

    return n_pair if name == "n_pair" else loss, positives, negatives


def weights(name, grid, kind):
    """dL/dd of one positive pair, or -dL/dd of a negative, at each distance of the grid, averaged over the anchors."""
    loss, positives, negatives = on_row(name, losses.LOSSES[name])
    varied = 0 if kind == "positive" else positives
    one = jax.grad(lambda d, row: loss(row.at[varied].set(d)))
    gradient = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(grid, distances(positives, negatives, ANCHORS))
    mean = np.mean(np.asarray(gradient), axis=1)
    return mean if kind == "positive" else -mean


def school_weights(name, grid, kind, uncertainty):
    """The same for a loss on distributions: a reference moves on a great circle through the anchor."""
    spec = losses.LOSSES[name]
    count = POSITIVES + NEGATIVES
    is_positive = (jnp.arange(count) < POSITIVES)[None, :]
    pairs = losses.Pairs(is_positive, ~is_positive)
    sideways = np.random.default_rng(1).normal(size=(SCHOOL_ANCHORS, count, DIMENSIONS)).astype(np.float32)
    sideways[..., 0] = 0  # the anchors are the first axis
    sideways = jnp.asarray(sideways / np.linalg.norm(sideways, axis=-1, keepdims=True))
    keys = jax.random.split(jax.random.key(2), SCHOOL_ANCHORS)
    spread = lambda n: jnp.full((n, DIMENSIONS), uncertainty / DIMENSIONS**0.5)
    anchor = ism.Embedding(jnp.eye(1, DIMENSIONS), spread(1))
    varied = 0 if kind == "positive" else POSITIVES

    def loss(d, row, sideways, key):
        cosine = similarity(row.at[varied].set(d))[:, None]
        place = jnp.sqrt(1 - cosine**2) * sideways
        references = ism.Embedding(place.at[:, :1].set(cosine), spread(count))
        sampled = {"key": key} if spec.needs_key else {}
        return jnp.sum(spec.function(anchor, pairs, references=references, **sampled))

    rows = distances(POSITIVES, NEGATIVES, SCHOOL_ANCHORS)
    at = jax.jit(lambda d: jnp.mean(jax.vmap(jax.grad(loss), (None, 0, 0, 0))(d, rows, sideways, keys)))
    mean = np.asarray([at(d) for d in grid])
    return mean if kind == "positive" else -mean


def shade(axis, grid):
    """Where the other pairs lie."""
    for (mean, deviation), colour in ((POSITIVE, PULL), (NEGATIVE, PUSH)):
        density = np.exp(-0.5 * ((grid - mean) / deviation) ** 2)
        axis.fill_between(grid, 0.25 * density, color=colour, alpha=0.12, lw=0)


def curves(axis, name, grid):
    """The panel of one loss."""
    shade(axis, grid)
    if losses.LOSSES[name].reads == "embeddings":
        grid = grid[::3]
        found = [(u, [school_weights(name, grid, kind, u) for kind in ("positive", "negative")]) for u in UNCERTAINTIES]
    else:
        found = [(None, [weights(name, grid, kind) for kind in ("positive", "negative")])]
    scale = max(max(pull.max(), push.max()) for _, (pull, push) in found)
    for u, (pull, push) in found:
        more = {"alpha": 0.45 if u == UNCERTAINTIES[-1] else 1.0}
        axis.plot(grid, pull / scale, color=PULL, lw=1.5, label="pull of a positive pair", **more)
        axis.plot(grid, push / scale, color=PUSH, lw=1.5, ls=(0, (5, 1.5)), label="push of a negative pair", **more)
    axis.axhline(0, color=INK, lw=0.5)
    lowest = min(min(pull.min(), push.min()) for _, (pull, push) in found) / scale
    axis.set(xlim=(0, 1.9), ylim=(min(-0.08, 1.1 * lowest), 1.05), xlabel="distance of the pair")


def factor(axis):
    """The panel of the introspective metric."""
    beta = jnp.linspace(0, 12, 100)
    for relative, style, label in ((True, "-", "relative"), (False, (0, (5, 1.5)), "absolute")):
        values = ism.gradient_factor(jnp.ones_like(beta), beta, temperature=5.0, relative=relative)
        axis.plot(beta, values, color=INK, lw=1.5, ls=style, label=label)
    axis.set_title("times the introspective factor", fontsize=8.5)
    axis.set(xlim=(0, 12), ylim=(0, 1.05), xlabel="pair uncertainty, tau = 5")
    axis.legend(frameon=False, fontsize=7.5)


def draw(group, titles):
    """One picture: a panel per loss, and for the first group the introspective factor."""
    grid = jnp.linspace(0.0, 1.9, 150) + 1e-3
    lines = -(-len(titles) // COLUMNS)
    size = (8.4, 1.8 * lines + 0.5)  # a page's width, so that 8 points can be read
    figure, axes = plt.subplots(lines, COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=False):
        curves(axis, name, grid)
        axis.set_title(title, fontsize=8.5)
    spare = axes.flat[len(titles) :]
    if group == "proxies":
        factor(spare[0])
        spare = spare[1:]
    for axis in spare:
        axis.set_axis_off()
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7.5)
        axis.xaxis.label.set_size(7.5)
    for axis in axes[:, 0]:
        axis.set_ylabel("weight, of the largest", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if group == "schools":
        labels = [f"{label}, |u| = {u}" for u in UNCERTAINTIES for label in labels[:2]]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_name(f"losses_{group}.png"), dpi=160)
    plt.close(figure)


def main():
    for group, titles in GROUPS.items():
        draw(group, titles)


if __name__ == "__main__":
    main()
