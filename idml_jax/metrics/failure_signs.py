"""Signs that the uncertainty of a trained network has failed."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from idml_jax.ism import Metric
from idml_jax.metrics.checks import Array, embedding_rows


def similarity_correlation(
    semantic: Float[Array, "n d"], uncertainty: Float[Array, "n k"], *, rows: int = 2048
) -> float:
    """Tests whether u copies s: correlation over pairs of images of their similarities in s and in u.

    Pearson's coefficient of the centred inner products <s_i, s_j> and <u_i, u_j>, i < j: independent of the bases and
    widths of the two spaces, 1 where u is a rotation of s, about 0 if they are unrelated. On `rows`
    evenly spaced images; NaN where one side is constant.
    """
    semantic = embedding_rows(semantic, "semantic")[0]
    uncertainty = embedding_rows(uncertainty, "uncertainty", small=True)[0]
    if len(semantic) != len(uncertainty):
        raise ValueError(f"uncertainty: {len(uncertainty)} rows, semantic has {len(semantic)}")
    some = np.unique(np.linspace(0, len(semantic) - 1, rows).astype(int))
    pairs = np.triu_indices(len(some), 1)
    grams = []
    for side in (semantic[some], uncertainty[some]):
        side = (side - side.mean(axis=0)).astype(np.float64)
        grams.append((side @ side.T)[pairs])
    return pearson(*grams)


def failure_signs(
    semantic: Float[Array, "n d"],
    uncertainty: Float[Array, "n k"],
    metric: Metric = Metric(),  # noqa: B008 (immutable)
    *,
    small: float = 0.01,
    correlated: float = 0.8,
) -> list[str]:
    """Signs of a failed uncertainty head, one line each; empty if there are none.

    Collapsed: 95% of all images have |u| < small (with semantic distances about 1 and temperature 5 it then weakens
    no distance by more than half a percent). Outgrown: under the metric half of all pairs keep less than a tenth of
    their semantic distance. Constant: |u| varies by less than a thousandth of its mean. Copy:
    |`similarity_correlation`| above `correlated`.
    """
    norms = np.sqrt(embedding_rows(uncertainty, "uncertainty", small=True)[1].astype(np.float64))
    signs = []
    if (large := np.quantile(norms, 0.95)) < small:
        signs.append(
            f"uncertainty collapsed: 95% of |u| are below {large:.2g}, so it changes no distance "
            "(training with config.ism.ranking=1.0 or config.ism.prior=0.01 keeps it alive)"
        )
    if (kept := _kept_distance(semantic, uncertainty, metric)) < 0.1:
        signs.append(
            f"uncertainty has outgrown the metric: half of all pairs keep less than {max(100 * kept, 0.1):.2g}% of "
            "their distance, so that what compares them by it sees hardly any (in training config.ism.prior holds it; "
            "arcface needed 10)"
        )
    if norms.std() < 1e-3 * norms.mean():
        signs.append(f"uncertainty is constant: |u| = {norms.mean():.4g} for every image")
    correlation = similarity_correlation(semantic, uncertainty)
    if abs(correlation) > correlated:
        signs.append(f"uncertainty copies the semantic embedding: their similarities correlate at {correlation:.2f}")
    return signs


def _kept_distance(semantic: Float[Array, "n d"], uncertainty: Float[Array, "n k"], metric: Metric) -> float:
    """Median over pairs of 256 evenly spaced images of the share of their distance that the metric leaves."""
    some = np.unique(np.linspace(0, len(semantic) - 1, 256).astype(int))
    one, other = np.triu_indices(len(some), 1)
    s, u = (np.asarray(side, np.float32)[some] for side in (semantic, uncertainty))
    alpha, beta = np.linalg.norm(s[one] - s[other], axis=1), np.linalg.norm(u[one] + u[other], axis=1)
    return float(np.median(metric.for_ranking().weakening(alpha, beta))) if len(one) else 1.0


def pearson(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    """Pearson's correlation; NaN where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt(np.sum(a * a) * np.sum(b * b))
    return float(np.sum(a * b) / spread) if spread > 0 else float("nan")
