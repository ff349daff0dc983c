"""Cross-batch memory, Wang et al., CVPR 2020: embeddings of past batches as additional references.

A memory is a plain pytree of fixed shape, so it lives in a train state, compiles once, and is saved and restored with
it. The functions return a new memory. One training step::

    references = memory.with_batch(state.memory, embedding)
    pairs = memory.pairs_with_batch(state.memory, labels, active=step >= warmup_steps)
    loss = losses.contrastive(ism.introspective_distance(embedding, references), pairs)
    new_memory = memory.enqueue(state.memory, embedding, labels)

The batch is enqueued after its loss, so that no image is compared with itself. Under ``pmap`` or ``shard_map`` every
device keeps the whole memory: enqueue what ``losses.gather`` returns, and see ``pairs_with_batch`` for the relation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from idml_jax.ism import Embedding
from idml_jax.losses.pairs import AxisName, Pairs, concatenate_pairs, gather, pairs_from_labels

__all__ = ["Memory", "create", "enqueue", "pairs", "pairs_with_batch", "with_batch"]


class Memory(NamedTuple):
    """A ring buffer of ``size`` embeddings.

    Attributes:
      embedding: ``[size, d]`` and ``[size, k]`` (``None`` if the uncertainty is not stored).
      labels: ``[size]`` int32.
      valid: ``[size]`` bool, false for empty slots.
      position: scalar int32, slot of the next embedding.
    """

    embedding: Embedding
    labels: Int[Array, "size"]
    valid: Bool[Array, "size"]
    position: Int[Array, ""]


def create(
    size: int, dimension: int, uncertainty_dimension: int | None = None, dtype: jnp.dtype = jnp.float32
) -> Memory:
    """An empty memory.

    Args:
      size: number of embeddings it holds.
      dimension: width of the semantic embedding.
      uncertainty_dimension: width of the uncertainty embedding; ``None``: not stored, for plain metrics.
      dtype: type of the stored embeddings.

    Returns:
      The memory.

    Raises:
      ValueError: if the size is below 1.
    """
    if size < 1:
        raise ValueError(f"a memory holds at least 1 embedding; got {size}")
    uncertainty = None if uncertainty_dimension is None else jnp.zeros((size, uncertainty_dimension), dtype)
    return Memory(
        Embedding(jnp.zeros((size, dimension), dtype), uncertainty),
        jnp.zeros((size,), jnp.int32),
        jnp.zeros((size,), bool),
        jnp.zeros((), jnp.int32),
    )


def enqueue(
    memory: Memory, embedding: Embedding, labels: Int[Array, "n"], mask: Bool[Array, "n"] | None = None
) -> Memory:
    """Replaces the oldest embeddings with a batch. No gradient flows through the memory.

    Args:
      memory: previous memory.
      embedding: ``n`` embeddings; the uncertainty is dropped if the memory does not store it.
      labels: ``[n]``.
      mask: ``[n]``, false for padding, which is not stored.

    Returns:
      The new memory.

    Raises:
      ValueError: if the batch is larger than the memory, lacks a required uncertainty, has other shapes, or has a label
        that is not an integer in the range of int32 (traced labels are not checked).
    """
    size, n = memory.labels.shape[0], embedding.semantic.shape[0]
    if n > size:
        raise ValueError(f"a batch of {n} does not fit into a memory of {size}")
    if memory.embedding.uncertainty is None:
        embedding = Embedding(embedding.semantic, None)
    elif embedding.uncertainty is None:
        raise ValueError("the memory keeps an uncertainty and the batch has none")
    for kept, new in zip(jax.tree.leaves(memory.embedding), jax.tree.leaves(embedding), strict=True):
        if new.shape != (n, kept.shape[1]):
            raise ValueError(f"the memory keeps rows of length {kept.shape[1]}; got the shape {new.shape}")
    mask = jnp.ones((n,), bool) if mask is None else jnp.asarray(mask, bool)
    labels = _stored(labels, memory.labels.dtype)
    if labels.shape != (n,) or mask.shape != (n,):
        raise ValueError(f"labels and mask need the shape {(n,)}; got {labels.shape} and {mask.shape}")
    order = jnp.cumsum(mask, dtype=jnp.int32)
    # Padding goes to the index `size`, which is dropped.
    places = jnp.where(mask, (memory.position + order - 1) % size, size)

    def store(kept: Array, new: Array) -> Array:
        return kept.at[places].set(jax.lax.stop_gradient(new).astype(kept.dtype), mode="drop")

    return Memory(
        jax.tree.map(store, memory.embedding, embedding),
        store(memory.labels, labels),
        store(memory.valid, mask),
        (memory.position + jnp.sum(mask, dtype=jnp.int32)) % size,
    )


def _stored(labels: Any, dtype: jnp.dtype) -> Array:
    """The labels as the memory holds them: exactly, because later batches are compared with them."""
    if isinstance(labels, jax.core.Tracer) or (isinstance(labels, jax.Array) and labels.dtype == dtype):
        return labels
    given = np.asarray(labels)
    if given.dtype.kind not in "iufb":
        raise ValueError(f"a memory holds labels that are numbers; got {given.dtype}")
    with np.errstate(invalid="ignore"):
        kept = given.astype(dtype)
    if bad := given[kept != given].tolist():
        raise ValueError(f"a memory holds labels as {np.dtype(dtype)}, which does not hold {bad[0]}")
    return jnp.asarray(kept)


def pairs(
    memory: Memory,
    labels: Int[Array, "n"],
    mask: Bool[Array, "n"] | None = None,
    *,
    active: Bool[Array, ""] | bool = True,
) -> Pairs:
    """The relation of a batch (rows) and the content of the memory (columns).

    Args:
      memory: the memory.
      labels: ``[n]`` of the rows.
      mask: ``[n]``, false for rows that are padding.
      active: false during warm-up, when embeddings still change too fast to be reused; then every entry is ignored.

    Returns:
      ``Pairs`` of shape ``[n, size]``.
    """
    return pairs_from_labels(labels, memory.labels, mask, reference_mask=memory.valid & active)


def with_batch(memory: Memory, embedding: Embedding, axis_name: AxisName | None = None) -> Embedding:
    """The batch and the memory as one set of references, ``[n + size]`` rows.

    Args:
      memory: the memory.
      embedding: ``n`` embeddings.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis; the batch is then that of all devices.

    Returns:
      The references. The uncertainty is ``None`` if the memory keeps none, or the batch has none.
    """
    batch = gather(embedding, axis_name)
    kept = memory.embedding
    semantic = jnp.concatenate([batch.semantic, kept.semantic.astype(batch.semantic.dtype)])
    if kept.uncertainty is None or batch.uncertainty is None:
        return Embedding(semantic, None)
    return Embedding(semantic, jnp.concatenate([batch.uncertainty, kept.uncertainty.astype(batch.uncertainty.dtype)]))


def pairs_with_batch(
    memory: Memory,
    labels: Int[Array, "n"],
    mask: Bool[Array, "n"] | None = None,
    *,
    active: Bool[Array, ""] | bool = True,
    axis_name: AxisName | None = None,
) -> Pairs:
    """The relation of a batch to itself and to the memory: the columns of ``with_batch``.

    Args:
      memory: the memory.
      labels: ``[n]``.
      mask: ``[n]``, false for padding.
      active: false during warm-up; then only the batch is compared.
      axis_name: as for ``with_batch``.

    Returns:
      ``Pairs`` of shape ``[n, n + size]``.
    """
    return concatenate_pairs(
        pairs_from_labels(labels, mask=mask, axis_name=axis_name), pairs(memory, labels, mask, active=active)
    )
