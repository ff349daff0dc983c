"""Evaluation: embed every image once, tail included, then all metrics on the whole set."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from idml_jax import sharding, steps
from idml_jax.data import pipeline
from idml_jax.data.sources import Source
from idml_jax.data.transforms import Transform
from idml_jax.metrics import retrieval, uncertainty
from idml_jax.steps import StepSetup


class Embedded(NamedTuple):
    """Embeddings of a whole source, on the host, in its order.

    Attributes:
      semantic: ``[n, d]``.
      uncertainty: ``[n, k]``.
      semantic_norm: ``[n]``, length of the semantic embedding before normalising.
      labels: ``[n]``.
    """

    semantic: Float[np.ndarray, "n d"]
    uncertainty: Float[np.ndarray, "n k"]
    semantic_norm: Float[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]

    @property
    def uncertainty_norm(self) -> Float[np.ndarray, "n"]:
        """Length of the uncertainty embedding, the score of a single image."""
        return np.linalg.norm(self.uncertainty, axis=1)


def embed(
    variables: Any,
    source: Source,
    transform: Transform,
    setup: StepSetup,
    mesh: Mesh,
    *,
    batch_size: int,
    order: np.ndarray | None = None,
    partners: np.ndarray | None = None,
    channels: int = 3,
    threads: int = 4,
) -> Embedded:
    """Embeds every image of a source (or those of ``order``) once.

    Args:
      variables: of the model, on the mesh.
      source: images.
      transform: test transform.
      setup: of the steps.
      mesh: devices.
      batch_size: images per step over all devices.
      order: records to embed, ``[n]``; all by default.
      partners: records to blend each of them with at equal weight, ``[n]``.
      channels: 3 or 1.
      threads: that read and decode.

    Returns:
      The embeddings, padding removed.
    """
    order = np.arange(len(source)) if order is None else np.asarray(order)
    options = dict(
        batch_size=batch_size, channels=channels, threads=threads, host=jax.process_index(), hosts=jax.process_count()
    )
    batches = pipeline.eval_batches(source, transform, order=order, **options)
    others = None if partners is None else pipeline.eval_batches(source, transform, order=partners, **options)
    parts = []
    for batch in batches:
        images = sharding.shard_batch({"image": batch["image"]}, mesh)["image"]
        if others is None:
            out = steps.jit_embed_step(variables, images, setup=setup)
        else:
            second = sharding.shard_batch({"image": next(others)["image"]}, mesh)["image"]
            out = steps.jit_embed_mixed_step(variables, images, second, setup=setup)
        parts.append(out)
    # Hosts hold the parts of one global batch side by side, so the padding is at the end of the whole.
    arrays = [sharding.to_host(part) for part in parts]
    whole = {k: np.concatenate([a[k] for a in arrays])[: len(order)] for k in arrays[0]}
    return Embedded(**whole, labels=source.labels[order])


def partners_of_other_classes(labels: Int[np.ndarray, "n"], seed: int) -> Int[np.ndarray, "n"]:
    """For every image a random one of another class.

    Args:
      labels: ``[n]`` with at least two classes.
      seed: of the choice.

    Returns:
      ``[n]`` records.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    partner = rng.permutation(len(labels))
    while (same := np.flatnonzero(labels[partner] == labels)).size:
        partner[same] = rng.integers(0, len(labels), same.size)
    return partner


def retrieval_report(embedded: Embedded, ks: Sequence[int]) -> dict[str, float]:
    """R@K, RP, MAP@R of the semantic embeddings, and mean and deviation of the uncertainty's length."""
    metrics = retrieval.retrieval_metrics(embedded.semantic, embedded.labels, ks=ks)
    length = embedded.uncertainty_norm
    return {**metrics, "uncertainty_mean": float(length.mean()), "uncertainty_std": float(length.std())}


def baseline_report(embedded: Embedded) -> dict[str, float]:
    """What the distance to the nearest neighbour, which costs nothing, knows about wrong answers.

    Args:
      embedded: the images.

    Returns:
      ``R-AUROC(distance)`` (Kirchhof et al., URL benchmark, 2023).
    """
    ranks = retrieval.retrieval_ranks(embedded.semantic, embedded.labels)
    return {"R-AUROC(distance)": float(uncertainty.r_auroc(ranks.nearest_distance, ranks.nearest_correct))}


def uncertainty_report(
    embedded: Embedded, mixed: Embedded, ambiguity: Float[np.ndarray, "n"] | None = None
) -> dict[str, float]:
    """What the uncertainty's length knows, beside the baseline.

    Args:
      embedded: the images.
      mixed: each of them blended with one of another class.
      ambiguity: true ambiguity of each image, ``[n]``, where it is known.

    Returns:
      ``P(u_mixed>u)``, ``R-AUROC(u)``, ``R-AUROC(distance)`` and, if the truth is known, ``spearman(u,ambiguity)``.
    """
    score = embedded.uncertainty_norm
    ranks = retrieval.retrieval_ranks(embedded.semantic, embedded.labels)
    report = {
        "P(u_mixed>u)": float(uncertainty.probability_greater(mixed.uncertainty_norm, score)),
        "R-AUROC(u)": float(uncertainty.r_auroc(score, ranks.nearest_correct)),
        **baseline_report(embedded),
    }
    if ambiguity is not None:
        report["spearman(u,ambiguity)"] = float(uncertainty.spearman(score, ambiguity))
    return report
