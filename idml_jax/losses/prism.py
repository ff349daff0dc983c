"""PRISM, Liu et al., "Noise-resistant deep metric learning with ranking-based instance selection", CVPR 2021.

An image whose label is probably wrong is left out of its batch's loss. How well a label fits is read from a memory of
past features: the probability of the label in a mixture of von Mises-Fisher distributions, one per class, of equal
concentration (the paper's eqs. 3 to 8). The images below a threshold, an average over batches of the quantile of
``share``, are left out (section 3.2, "smooth top-R").

A state is a pytree of fixed shape. One training step::

    kept, threshold = prism.select(state, semantic, labels, share=0.2, num_classes=100)
    loss = ...  # of the images that are kept
    state = prism.update(state, semantic, labels, kept, threshold)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idml_jax.ism import Embedding
from idml_jax.losses import memory as memory_lib

__all__ = ["Prism", "clean_probability", "create", "number_below", "select", "update"]


class Prism(NamedTuple):
    """What is remembered between batches.

    Attributes:
      memory: past features of images that were kept, with their labels.
      thresholds: ``[window]`` of past batches, NaN where there was none yet.
      batches: number of batches seen.
    """

    memory: memory_lib.Memory
    thresholds: Float[Array, "window"]
    batches: Int[Array, ""]


def create(size: int, dimension: int, window: int) -> Prism:
    """An empty state.

    Args:
      size: number of features in the memory.
      dimension: their width.
      window: number of batches whose thresholds are averaged; 1: each batch by itself (the paper's "top-R").

    Raises:
      ValueError: if size or window is below 1.
    """
    if window < 1:
        raise ValueError(f"a threshold is of at least 1 batch; got a window of {window}")
    return Prism(memory_lib.create(size, dimension), jnp.full((window,), jnp.nan), jnp.zeros((), jnp.int32))


def number_below(share: float, batch_size: int) -> int:
    """How many images of a batch lie below its own threshold: ``share`` of them, rounded down.

    >>> number_below(0.29, 100), number_below(0.6, 128)
    (29, 76)
    """
    return int(share * batch_size + 1e-6)  # 0.29 * 100 is a little less than 29


def clean_probability(
    memory: memory_lib.Memory, semantic: Float[Array, "n d"], labels: Int[Array, "n"], num_classes: int
) -> Float[Array, "n"]:
    """The probability of each image's label, by the similarity to the mean features of the classes.

        P_i = exp(m_y . f_i) / sum over classes c of  exp(m_c . f_i),   m_c the mean of the class's features in memory

    Args:
      memory: past features.
      semantic: ``[n, d]`` features of length 1; not differentiated.
      labels: ``[n]`` in ``[0, num_classes)``.
      num_classes: number of classes.

    Returns:
      ``[n]``; 1 for a class that is not in the memory. Such classes are not in the sum.
    """
    semantic = jax.lax.stop_gradient(semantic).astype(jnp.float32)
    # Empty slots go to the index `num_classes`, which is dropped.
    places = jnp.where(memory.valid, memory.labels, num_classes)
    sums = jnp.zeros((num_classes, semantic.shape[1])).at[places].add(memory.embedding.semantic, mode="drop")
    counts = jnp.zeros((num_classes,)).at[places].add(1.0, mode="drop")
    means = sums / jnp.maximum(counts, 1.0)[:, None]
    scores = jnp.matmul(semantic, means.T, precision=jax.lax.Precision.HIGHEST)
    known = counts > 0
    scores = jnp.where(known[None, :], scores, -jnp.inf)
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    everything = jax.nn.logsumexp(scores, axis=1)
    judged = known[labels]
    return jnp.where(judged, jnp.exp(jnp.where(judged, own - everything, 0.0)), 1.0)


def select(
    state: Prism,
    semantic: Float[Array, "n d"],
    labels: Int[Array, "n"],
    *,
    share: float,
    num_classes: int,
    warmup: int = 0,
) -> tuple[Bool[Array, "n"], Float[Array, ""]]:
    """Which images of a batch are kept, and the batch's own threshold.

    Args:
      state: state before the batch.
      semantic: ``[n, d]`` features of length 1.
      labels: ``[n]``.
      share: share of a batch that lies below its own threshold: the expected share of wrong labels.
      num_classes: number of classes.
      warmup: number of batches that are kept whole.

    Returns:
      ``[n]`` bool, and the threshold: the largest probability among the ``share`` of the images with the smallest; NaN
      during the warm-up, and if these images' classes are not in the memory. At least the images above the own
      threshold are kept where the averaged one would leave none, and always images of classes that the memory lacks.
    """
    probability = clean_probability(state.memory, semantic, labels, num_classes)
    count = number_below(share, labels.shape[0])
    if count < 1:
        return jnp.ones(labels.shape, bool), jnp.asarray(jnp.nan)
    active = state.batches >= warmup
    order = jnp.argsort(probability)
    lowest = probability[order[count - 1]]
    usable = active & (lowest < 1.0)
    threshold = jnp.where(usable, lowest, jnp.nan)
    window = jnp.where(usable, _pushed(state.thresholds, threshold), state.thresholds)
    kept = probability > jnp.nanmean(window)  # false for a NaN, where the window is empty
    own = jnp.ones(labels.shape, bool).at[order[:count]].set(False) | (probability >= 1.0)
    return jnp.where(active, jnp.where(jnp.any(kept), kept, own), True), threshold


def update(
    state: Prism,
    semantic: Float[Array, "n d"],
    labels: Int[Array, "n"],
    kept: Bool[Array, "n"],
    threshold: Float[Array, ""],
) -> Prism:
    """The state after a batch: kept images enter the memory, and the threshold enters the window.

    Args:
      state: state before the batch.
      semantic: ``[n, d]`` features.
      labels: ``[n]``.
      kept: as ``select`` returns it.
      threshold: as ``select`` returns it.
    """
    memory = memory_lib.enqueue(state.memory, Embedding(semantic), labels, kept)
    thresholds = jnp.where(jnp.isfinite(threshold), _pushed(state.thresholds, threshold), state.thresholds)
    return Prism(memory, thresholds, state.batches + 1)


def _pushed(window: Float[Array, "window"], value: Float[Array, ""]) -> Float[Array, "window"]:
    """The window with the oldest value replaced."""
    return jnp.concatenate([window[1:], value[None]])
