"""Draws docs/concepts_metric.png and docs/concepts_uncertainty.png, from the functions and from a trained run.

    python docs/concepts_pictures.py --workdir=runs/glyphs

The run is that of ``configs/glyphs.py:quick``; without ``--workdir`` the first picture alone is drawn.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from idml_jax import embed, ism
from idml_jax.data.images.transforms import Changed, Picture
from idml_jax.inference.model import load

HERE = Path(__file__).parent
BETAS = (0.0, 1.0, 3.0, 6.0, 12.0)
KINDS = ("blur", "noise", "occlusion")
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8)
PICTURES = 300


def metric():
    """The introspective distance and the pull that is left, for pairs of growing uncertainty."""
    alpha = np.linspace(0.01, 2.0, 200)
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.2), sharex=True, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(BETAS)))
    for column, relative in enumerate((True, False)):
        for beta, colour in zip(BETAS, colours, strict=True):
            one = ism.Embedding(jnp.zeros((1, 1)), jnp.full((1, 1), beta / 2))
            others = ism.Embedding(jnp.asarray(alpha)[:, None], jnp.full((200, 1), beta / 2))
            distance = ism.introspective_distance(one, others, relative=relative)[0]
            factor = ism.gradient_factor(alpha, jnp.full(200, beta), relative=relative)
            axes[0, column].plot(alpha, distance, color=colour, lw=2, label=f"{beta:g}")
            axes[1, column].plot(alpha, factor, color=colour, lw=2)
        axes[0, column].set_title(("relative (the default)", "absolute")[column], fontsize=11)
        axes[1, column].set_xlabel("semantic distance of the pair")
    axes[0, 0].set_ylabel("introspective distance D")
    axes[1, 0].set_ylabel("pull or push that is left, H")
    axes[0, 0].legend(title="||u1 + u2||", frameon=False, fontsize=9)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, 2)
    figure.savefig(HERE / "concepts_metric.png", dpi=110)


def uncertainty(workdir):
    """Pictures of growing damage with the length of u beneath them, and its mean over many."""
    model = load(workdir)
    source = embed.split_source(model, "test")
    clean = np.flatnonzero(source.fields["ambiguity"] == 0)
    chosen = clean[np.linspace(0, len(clean) - 1, PICTURES).astype(int)]

    def lengths(kind, strength):
        change = model.transform if strength == 0 else Changed(model.transform, kind, strength)
        images = np.stack(
            [
                change(
                    Picture(source.read(int(record)), model.config.data.channels), np.random.default_rng(int(record))
                )
                for record in chosen
            ]
        )
        return images, np.linalg.norm(model.embedder.images(images)["uncertainty"], axis=1)

    figure = plt.figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    grid = left.subplots(len(KINDS), len(STRENGTHS), squeeze=False)
    axis = right.subplots()
    for row, kind in enumerate(KINDS):
        means = []
        for column, strength in enumerate(STRENGTHS):
            images, length = lengths(kind, strength)
            means.append(length.mean())
            cell = grid[row, column]
            cell.imshow(images[7 * (row + 2), ..., 0], cmap="gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
            cell.set_xlabel(f"|u| {length[7 * (row + 2)]:.2f}", fontsize=9)
        grid[row, 0].set_ylabel(kind, fontsize=10)
        axis.plot(STRENGTHS, means, "o-", lw=2, label=kind)
        print(kind, " ".join(f"{mean:.3f}" for mean in means))
    axis.set(xlabel="strength", ylabel=f"mean |u| of {PICTURES} clean pictures, changed")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "concepts_uncertainty.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="run of configs/glyphs.py:quick")
    workdir = parser.parse_args().workdir
    metric()
    if workdir:
        uncertainty(workdir)


if __name__ == "__main__":
    main()
