"""Samplers: orders of records that are pure functions of (seed, slot).

A sampler is an endless sequence of record indices. Slot ``i`` belongs to step ``i // batch_size``, so a run resumes
by starting at the saved step, and each host takes its slice of a batch's slots: neither workers nor iterators hold
state that could be lost.
"""

import functools
import math
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from idml_jax.errors import UserError


class Sampler(Protocol):
    """An endless order of records in full batches."""

    batch_size: int
    steps_per_epoch: int

    def batch(self, step: int) -> Int[np.ndarray, "batch_size"]:
        """Record indices of the global batch of a step."""
        ...


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


# Cached pure functions, at module level so that samplers can be pickled for worker processes. The caches hold a few
# entries because prefetching crosses the boundary between epochs.
@functools.lru_cache(maxsize=8)
def _random_order(size: int, *key: int) -> np.ndarray:
    order = _generator(*key).permutation(size)
    order.flags.writeable = False
    return order


@functools.lru_cache(maxsize=8)
def _class_order(classes: int, per_batch: int, seed: int, number: int) -> np.ndarray:
    """The order of all classes in round ``number``; it does not start with the last classes of the round before."""
    order = _random_order(classes, seed, 1, number)
    if number == 0 or classes < 3 * per_batch:
        return order
    # Only positions outside the last P change, so the end of the previous round is that of its plain random order.
    order = order.copy()
    recent = _random_order(classes, seed, 1, number - 1)[-per_batch:]
    clashes = np.flatnonzero(np.isin(order[:per_batch], recent))
    spare = per_batch + np.flatnonzero(~np.isin(order[per_batch:-per_batch], recent))[: len(clashes)]
    order[clashes], order[spare] = order[spare], order[clashes]
    return order


@functools.lru_cache(maxsize=4)
def _class_block(classes: int, per_batch: int, seed: int, number: int) -> Int[np.ndarray, "batches per_batch"]:
    """Full batches of classes from as many orders as fill them without remainder, for few classes.

    Where a batch holds the end of one order and the start of the next, the start is changed to avoid repeats. As
    ``per_batch`` is at most ``classes``, there are always enough other classes.
    """
    rounds = per_batch // math.gcd(classes, per_batch)
    orders: list[np.ndarray] = []
    for i in range(rounds):
        order = _random_order(classes, seed, 1, number * rounds + i).copy()
        filled = i * classes % per_batch
        if filled:
            head, recent = per_batch - filled, orders[-1][-filled:]
            clashes = np.flatnonzero(np.isin(order[:head], recent))
            spare = head + np.flatnonzero(~np.isin(order[head:], recent))[: len(clashes)]
            order[clashes], order[spare] = order[spare], order[clashes]
        orders.append(order)
    return np.concatenate(orders).reshape(-1, per_batch)


class ShuffledSampler:
    """A new random order of all records in every epoch; the incomplete last batch is dropped.

    With weights an epoch has as many places, and a record of weight w has w / mean(w) of them on average: the whole
    number below or above, by systematic sampling.

    Args:
      size: number of records.
      batch_size: number of records per global batch.
      seed: seed of the orders.
      weights: ``[size]`` at least 0, not all 0; ``None``: every record once.

    Raises:
      UserError: if there are fewer records than one batch needs.
    """

    def __init__(self, size: int, batch_size: int, seed: int, weights: Float[np.ndarray, "size"] | None = None):
        if batch_size < 1 or size < batch_size:
            raise UserError(f"a batch of {batch_size} cannot be filled from {size} images; lower config.batch_size")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps_per_epoch = size // batch_size
        self._ends = None if weights is None else np.cumsum(_checked(weights))

    def batch(self, step: int) -> Int[np.ndarray, "batch_size"]:
        """Record indices of the global batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        order = _random_order(self.size, self.seed, 0, epoch)[start : start + self.batch_size]
        if self._ends is None:
            return order
        places = (order + _generator(self.seed, 3, epoch).uniform()) * (self._ends[-1] / self.size)
        return np.minimum(np.searchsorted(self._ends, places, side="right"), self.size - 1)


def _checked(weights: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    if not weights.any():
        raise UserError("all training images have the weight 0")
    return weights


class BalancedSampler:
    """P x K batches: ``P = batch_size / K`` different classes with ``K`` images each, for losses on pairs.

    Classes come in consecutive random orders: every class appears once before any appears again, and none appears twice
    in a batch. The images of a class are drawn without replacement within a batch; a class with fewer than ``K`` images
    is filled up with replacement. An epoch has as many steps as a pass over all images.

    Args:
      labels: ``[n]`` labels, or ``[n, l]``, several per image, filled up with -1. An image with several may be drawn
        for each of its classes, but once in a batch where the class has others.
      batch_size: number of images per global batch, a multiple of ``per_class``.
      per_class: K, number of images per class in a batch.
      seed: seed of the orders.
      weights: ``[n]`` at least 0; the images of a class are drawn in proportion. Images of weight 0 are never drawn.

    Raises:
      UserError: if ``batch_size`` and ``per_class`` do not match, or there are too few classes.
    """

    def __init__(
        self,
        labels: Int[np.ndarray, "n"] | Int[np.ndarray, "n l"],
        batch_size: int,
        per_class: int,
        seed: int,
        weights: Float[np.ndarray, "n"] | None = None,
    ):
        if per_class < 2 or batch_size % per_class:
            raise UserError(
                f"config.batch_size ({batch_size}) must be a multiple of config.data.per_class ({per_class}), "
                "which must be at least 2"
            )
        records, flat = np.arange(len(labels)), labels
        self._several = labels.ndim == 2
        if self._several:
            records, columns = np.nonzero(labels >= 0)
            flat = labels[records, columns]
        self._weights = None if weights is None else _checked(weights)
        if weights is not None:
            drawn = weights[records] > 0
            records, flat = records[drawn], flat[drawn]
        order = np.argsort(flat, kind="stable")
        self._members = np.split(records[order], np.flatnonzero(np.diff(flat[order])) + 1)
        self.batch_size, self.per_class, self.seed = batch_size, per_class, seed
        self._per_batch = batch_size // per_class
        if self._per_batch > len(self._members):
            raise UserError(
                f"{self._per_batch} classes per batch are wanted but there are {len(self._members)}; lower "
                "config.batch_size or raise config.data.per_class"
            )
        self.steps_per_epoch = max(len(labels) // batch_size, 1)

    def _classes(self, step: int) -> np.ndarray:
        total, width = len(self._members), self._per_batch
        if total < 3 * width:
            number, position = divmod(step, total // math.gcd(total, width))
            return _class_block(total, width, self.seed, number)[position]
        places = step * width + np.arange(width)
        return np.asarray([_class_order(total, width, self.seed, int(p) // total)[int(p) % total] for p in places])

    def batch(self, step: int) -> Int[np.ndarray, "batch_size"]:
        """Record indices of the global batch of a step; the images of a class are adjacent."""
        rng = _generator(self.seed, 2, step)
        picked: list[np.ndarray] = []
        for label in self._classes(step):
            members = self._ordered(rng, self._members[label])
            if self._several and picked:  # images that the batch has already come last
                members = members[np.argsort(np.isin(members, np.concatenate(picked)), kind="stable")]
            extra = self.per_class - len(members)
            picked.append(members[: self.per_class])
            if extra > 0:
                picked.append(rng.choice(members, extra))
        return np.concatenate(picked)

    def _ordered(self, rng: np.random.Generator, members: Int[np.ndarray, "m"]) -> Int[np.ndarray, "m"]:
        """The images of a class in random order, those of larger weight earlier."""
        if self._weights is None:
            return rng.permutation(members)
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: draws without replacement.
        return members[np.argsort(rng.exponential(size=len(members)) / self._weights[members], kind="stable")]
