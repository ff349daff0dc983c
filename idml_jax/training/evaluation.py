"""Evaluation: embeds every image once, tail included, and measures the whole set."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from idml_jax.data import pipeline
from idml_jax.data.images.transforms import CHANGES, Changed, Transform
from idml_jax.data.sources import Source
from idml_jax.ism import Metric
from idml_jax.metrics.embedded import joined
from idml_jax.metrics.summary import Embedded, HeldOut, ambiguity_report, corrupted_report
from idml_jax.runtime import sharding
from idml_jax.training import steps
from idml_jax.training.steps import StepSetup

STRENGTHS = (0.25, 0.5, 0.75)


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
    check: Callable[[], None] = lambda: None,
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
      check: called before every batch; may raise to stop.

    Returns:
      The embeddings in that order, padding removed.
    """
    order = np.arange(len(source)) if order is None else np.asarray(order)
    options = dict(
        batch_size=batch_size, channels=channels, threads=threads, host=jax.process_index(), hosts=jax.process_count()
    )
    batches = pipeline.eval_batches(source, transform, order=order, **options)
    others = None if partners is None else pipeline.eval_batches(source, transform, order=partners, **options)
    parts = []
    for batch in batches:
        check()
        images = sharding.shard_batch({"image": batch["image"]}, mesh)["image"]
        if others is None:
            out = steps.jit_embed_step(variables, images, setup=setup)
        else:
            second = sharding.shard_batch({"image": next(others)["image"]}, mesh)["image"]
            out = steps.jit_embed_mixed_step(variables, images, second, setup=setup)
        parts.append(out)
    return Embedded(labels=source.labels[order], **joined_rows(parts, len(order)))


def joined_rows(parts: Sequence[dict[str, jax.Array]], count: int) -> dict[str, np.ndarray]:
    """The rows of all batches on the host, padding removed.

    Args:
      parts: of each batch, arrays with a row per picture.
      count: pictures in all.

    Returns:
      The same names, ``[count, ...]``.
    """
    # Hosts hold the parts of one global batch side by side, so the padding is at the end of the whole.
    arrays = [sharding.to_host(part) for part in parts]
    return {k: np.concatenate([a[k] for a in arrays])[:count] for k in arrays[0]}


def drawn_pictures(size: int, images: int, seed: int) -> Int[np.ndarray, "m"]:
    """Records of ``images`` of ``size`` pictures, drawn at random, in order; all if there are no more."""
    return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(size)[:images])


def partners_of_other_classes(
    labels: Int[np.ndarray, "n"], chosen: Int[np.ndarray, "m"], seed: int
) -> Int[np.ndarray, "m"]:
    """For every chosen image a random one of another class.

    Args:
      labels: ``[n]`` with at least two classes.
      chosen: ``[m]`` records.
      seed: of the choice.

    Returns:
      ``[m]`` records.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    partner = rng.integers(0, len(labels), len(chosen))
    while (same := np.flatnonzero(labels[partner] == labels[chosen])).size:
        partner[same] = rng.integers(0, len(labels), same.size)
    return partner


def ambiguity(
    variables: Any,
    source: Source,
    transform: Transform,
    setup: StepSetup,
    mesh: Mesh,
    *,
    images: int,
    seed: int,
    gallery: Embedded,
    metric: Metric = Metric(),  # noqa: B008 (immutable)
    kinds: Iterable[str] = CHANGES,
    held_out: HeldOut | None = None,
    **options: Any,
) -> dict[str, float]:
    """Does the uncertainty rise, and tell wrong answers, when pictures are mixed, cropped, blurred, noised or occluded?

    Args:
      variables: of the model.
      source: images.
      transform: test transform.
      setup: of the steps.
      mesh: devices.
      images: how many pictures, drawn at random, the tests are made on.
      seed: of the drawing.
      gallery: embeddings of the whole source; without an uncertainty only the free scores are judged.
      metric: that the embeddings are compared by, beside the semantic distance.
      kinds: changes beside mixing, at the strengths 0.25, 0.5 and 0.75.
      held_out: fits the confidence of answers, see ``held_out_queries``.
      **options: of ``embed``.

    Returns:
      As ``metrics.report.ambiguity_report``, mixing being at equal weights with a picture of another class, and
      ``metrics.report.corrupted_report`` over the changed pictures, without the mixed ones, whose class is not one.
    """
    chosen = drawn_pictures(len(source), images, seed)
    introspective = gallery.uncertainty is not None

    def run(transform: Transform, **more: Any) -> Embedded:
        embedded = embed(variables, source, transform, setup, mesh, order=chosen, **options, **more)
        return embedded if introspective else embedded._replace(uncertainty=None)

    original = run(transform)
    changed = {kind: {s: run(Changed(transform, kind, s)) for s in STRENGTHS} for kind in kinds}
    every = [embedded for by_strength in changed.values() for embedded in by_strength.values()]
    report = corrupted_report(original, every, gallery, chosen, metric, held_out)
    if not introspective:
        return report
    changed["mixed"] = {0.5: run(transform, partners=partners_of_other_classes(source.labels, chosen, seed))}
    lengths = {kind: {s: e.uncertainty_norm for s, e in by_strength.items()} for kind, by_strength in changed.items()}
    return ambiguity_report(original.uncertainty_norm, lengths) | report


def held_out_queries(
    variables: Any,
    validation: Source,
    train: Source,
    transform: Transform,
    setup: StepSetup,
    mesh: Mesh,
    *,
    searched: int,
    images: int,
    seed: int,
    **options: Any,
) -> HeldOut:
    """Held-out classes as queries that teach how sure answers are.

    They search themselves and whole training classes, drawn until the gallery is as large as the one that will be
    searched: among few images hardly an answer is wrong, and every distance means something else.

    Args:
      variables: of the model.
      validation: images of the held-out classes.
      train: images of the training classes.
      transform: test transform.
      setup: of the steps.
      mesh: devices.
      searched: images in the gallery that answers will be sought in.
      images: how many of the held-out pictures are also cropped, blurred, noised and occluded; 0: none.
      seed: of the drawing.
      **options: of ``embed``.

    Returns:
      The queries, to be handed to ``metrics.report``.
    """

    def run(source: Source, order: np.ndarray, transform: Transform = transform) -> Embedded:
        return embed(variables, source, transform, setup, mesh, order=order, **options)

    queries = run(validation, np.arange(len(validation)))
    size = np.bincount(train.labels, minlength=len(train.class_names))
    classes = np.random.Generator(np.random.PCG64(seed)).permutation(len(size))
    wanted = classes[np.cumsum(size[classes]) <= max(0, searched - len(validation))]
    gallery = queries
    if len(wanted):
        others = run(train, np.flatnonzero(np.isin(train.labels, wanted)))
        gallery = joined([queries, others._replace(labels=others.labels + len(validation.class_names))])
    own = np.arange(len(validation))
    chosen = drawn_pictures(len(validation), images, seed)
    if not len(chosen):
        return HeldOut(queries, gallery, own)
    changed = [run(validation, chosen, Changed(transform, kind, s)) for kind in CHANGES for s in STRENGTHS]
    return HeldOut(queries, gallery, own, joined(changed), np.tile(chosen, len(changed)))
