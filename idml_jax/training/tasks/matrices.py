"""The matrices that losses read: of images with references, by the metric."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idml_jax import ism, losses
from idml_jax.ism import Embedding, Metric
from idml_jax.losses.reductions import ratio, total

# A weakening below this is no longer made more likely by the log term.
_LEAST = 1e-6


class Compared(NamedTuple):
    """What the images of a batch are compared with.

    Attributes:
      embedding: the images, placed on the devices for this comparison.
      references: the references; ``None``: the images themselves.
      pairs: relation of the two.
      stands_for: number of classes that each class stands for as a negative, if only some are compared.
      levels: the relation at each level, if the classes have one (``ClassRelation``).
    """

    embedding: Embedding
    references: Embedding | None
    pairs: losses.Pairs
    stands_for: Float[Array, "m"] | None = None
    levels: tuple[losses.Pairs, ...] = ()

    @property
    def related(self) -> losses.Pairs:
        """Which pairs are positives at some level, and which are negatives at all."""
        return related(self.pairs, self.levels)


def related(pairs: losses.Pairs, levels: tuple[losses.Pairs, ...]) -> losses.Pairs:
    """A relation of classes at several levels as one: positive at some level; negative at some and positive at none."""
    if not levels:
        return pairs
    positive, negative = (functools.reduce(jnp.logical_or, sides) for sides in zip(*levels, strict=True))
    return losses.Pairs(positive, negative & ~positive)


def classes_of_proxies(rows: int, num_classes: int, centres: int) -> Int[Array, "m"]:
    """Class of each proxy of a table with ``rows`` rows; those beyond the classes are padding, which is in no pair."""
    return jnp.repeat(jnp.arange(rows) % num_classes, centres)


def matrix_of(metric: Metric, reads: str, found: Compared, negatives: str = "learn") -> Any:
    """The matrix of all pairs that a loss reads.

    Args:
      metric: the metric.
      reads: ``similarity`` or ``distance``.
      found: images, references and their relation.
      negatives: ``stop``: pairs of different classes read the uncertainty without a gradient, so that only pairs of one
        class teach it; the values are the same.
    """
    compare = metric.similarity if reads == "similarity" else metric
    values = compare(found.embedding, found.references)
    if negatives != "stop" or not metric.introspective:
        return values
    references = None if found.references is None else _still(found.references)
    return jnp.where(found.related.negative, compare(_still(found.embedding), references), values)


def _still(embedding: Embedding) -> Embedding:
    """The embedding with an uncertainty that gets no gradient."""
    if embedding.uncertainty is None:
        return embedding
    return embedding._replace(uncertainty=jax.lax.stop_gradient(embedding.uncertainty))


def log_term(metric: Metric, found: Compared, axis_name: str | None = None) -> Float[Array, ""]:
    """What an uncertain positive costs: the mean over positive pairs of ``-log w``, ``w`` the metric's weakening.

    The second term of learned attenuation, ``exp(-s) L + s`` (Kendall and Gal, NeurIPS 2017, eq. 8), for a discrepancy
    that the metric multiplies with ``w = exp(-s)``. The uncertainty alone learns from it: the semantic distance is read
    without a gradient, and a weakening below 1e-6 costs no more.

    Args:
      metric: the metric, with a weakening.
      found: images, references and their relation.
      axis_name: under ``shard_map``, the mapped axis that the rows are split over.

    Returns:
      The mean, a scalar; 0 without a positive pair or an uncertainty.
    """
    a, b = ism.embedding_pair(found.embedding, found.references)
    if a.uncertainty is None and b.uncertainty is None:
        return jnp.zeros(())
    alpha = jax.lax.stop_gradient(ism.semantic_distance(a.semantic, None if b.semantic is a.semantic else b.semantic))
    if a.uncertainty is None:
        beta = ism.pair_uncertainty(b.uncertainty, None).T
    else:
        beta = ism.pair_uncertainty(a.uncertainty, b.uncertainty)
    cost = -jnp.log(jnp.maximum(metric.weakening(alpha, jnp.broadcast_to(beta, alpha.shape)), _LEAST))
    positive = found.related.positive
    return ratio(total(jnp.where(positive, cost, 0.0), axis_name), total(positive.astype(cost.dtype), axis_name))
