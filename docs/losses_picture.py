"""Draws docs/losses.png: the pull or push that each loss gives to one pair, by the pair's distance.

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

TITLES = {
    "contrastive": "contrastive",
    "triplet_semihard": "triplet, semi-hard",
    "margin_distance_weighted": "margin, distance-weighted",
    "multi_similarity": "multi-similarity",
    "fast_ap": "FastAP",
    "proxy_nca": "ProxyNCA",
    "proxy_anchor": "ProxyAnchor",
}
ANCHORS, POSITIVES, NEGATIVES = 400, 3, 40
POSITIVE, NEGATIVE = (0.8, 0.2), (1.25, 0.12)  # mean and standard deviation of the other distances
PULL, PUSH, INK = "#1f6fb2", "#c8442c", "#444444"


def weights(name, grid, kind):
    """dL/dd of one positive pair, or -dL/dd of a negative, at each distance of the grid, averaged over the anchors."""
    spec = losses.LOSSES[name]
    rng = np.random.default_rng(0)
    # For one image a proxy loss knows one positive, its class's proxy.
    positives = 1 if name == "proxy_nca" else POSITIVES
    others = np.concatenate(
        [rng.normal(*POSITIVE, (ANCHORS, positives)), rng.normal(*NEGATIVE, (ANCHORS, NEGATIVES))], axis=1
    )
    others = jnp.asarray(np.clip(others, 0.05, 1.95), jnp.float32)
    varied = 0 if kind == "positive" else positives
    is_positive = jnp.arange(positives + NEGATIVES) < positives

    def loss(d, row):
        row = row.at[varied].set(d)
        matrix = row if spec.reads == "distance" else 1 - row * row / 2  # cosine of normalised vectors
        column = name == "proxy_anchor"  # there the anchor is the column, and its batch the rows
        shape = (-1, 1) if column else (1, -1)
        pairs = losses.Pairs(is_positive.reshape(shape), ~is_positive.reshape(shape))
        return spec.function(matrix.reshape(shape), pairs)

    gradient = jax.vmap(jax.vmap(jax.grad(loss), (None, 0)), (0, None))(grid, others)
    mean = np.mean(np.asarray(gradient), axis=1)
    return mean if kind == "positive" else -mean


def main():
    grid = jnp.linspace(0.0, 1.9, 150) + 1e-3
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.2), sharex=False, layout="constrained")
    for axis, (name, title) in zip(axes.flat, TITLES.items(), strict=False):
        pull, push = weights(name, grid, "positive"), weights(name, grid, "negative")
        scale = max(pull.max(), push.max())
        for (mean, deviation), colour in ((POSITIVE, PULL), (NEGATIVE, PUSH)):
            density = np.exp(-0.5 * ((grid - mean) / deviation) ** 2)
            axis.fill_between(grid, 0.25 * density, color=colour, alpha=0.12, lw=0)
        axis.plot(grid, pull / scale, color=PULL, lw=2, label="pull of a positive pair")
        axis.plot(grid, push / scale, color=PUSH, lw=2, ls=(0, (5, 1.5)), label="push of a negative pair")
        axis.set_title(title, fontsize=10)
        axis.axhline(0, color=INK, lw=0.5)
        axis.set(xlim=(0, 1.9), ylim=(-0.08, 1.05), xlabel="distance of the pair")
    last = axes.flat[-1]
    beta = jnp.linspace(0, 12, 100)
    for relative, style, label in ((True, "-", "relative"), (False, (0, (5, 1.5)), "absolute")):
        factor = ism.gradient_factor(jnp.ones_like(beta), beta, temperature=5.0, relative=relative)
        last.plot(beta, factor, color=INK, lw=2, ls=style, label=label)
    last.set_title("times the introspective factor", fontsize=10)
    last.set(xlim=(0, 12), ylim=(0, 1.05), xlabel="pair uncertainty (tau = 5, alpha = 1)")
    last.legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(8)
    for axis in axes[:, 0]:
        axis.set_ylabel("weight, of the largest", fontsize=8)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_name("losses.png"), dpi=110)


if __name__ == "__main__":
    main()
