"""From a source to batches: the Grain chain, the host's slice, padding and mask."""

import contextlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from idml_jax.data.samplers import Sampler
from idml_jax.data.sources import Source
from idml_jax.data.transforms import DecodeError, Transform, decode
from idml_jax.errors import UserError

Batch = dict[str, np.ndarray]


class _Slots:
    """Slot number and record of every place in this host's part of the batches of some steps."""

    def __init__(self, sampler: Sampler, start: int, stop: int, host: int, hosts: int):
        if sampler.batch_size % hosts:
            raise UserError(f"config.batch_size ({sampler.batch_size}) must be a multiple of the {hosts} hosts")
        self._sampler, self._start, self._steps = sampler, start, max(stop - start, 0)
        self._local = sampler.batch_size // hosts
        self._offset = host * self._local
        self._last: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return self._steps * self._local

    def __getitem__(self, place: int) -> tuple[int, int]:
        step, position = divmod(int(place), self._local)
        step += self._start
        # One tuple, replaced as a whole: threads may compute a batch twice but never see half of one.
        known, records = self._last
        if known != step:
            records = self._sampler.batch(step)
            self._last = (step, records)
        position += self._offset
        return step * self._sampler.batch_size + position, int(records[position])


class _Load:
    """Slot and record to an example; randomness depends on (seed, slot) alone."""

    def __init__(self, source: Source, transform: Transform, channels: int, seed: int):
        self._source, self._transform, self._channels, self._seed = source, transform, channels, seed

    def __call__(self, slot_and_record: tuple[int, int]) -> dict[str, Any]:
        slot, record = slot_and_record
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, slot))))
        try:
            image = decode(self._source.read(record), self._channels)
        except DecodeError as error:
            raise UserError(f"{self._source.name(record)}: {error}") from error
        return {
            "image": self._transform(image, rng),
            "label": np.int32(self._source.labels[record]),
            "index": np.int32(record),
        }


def _iterate(dataset: grain.MapDataset, threads: int, prefetch: int, workers: int) -> Iterator[Batch]:
    chain = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    if workers:
        chain = chain.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    iterator = iter(chain)
    try:
        yield from iterator
    finally:
        with contextlib.suppress(Exception):
            iterator.close()


def train_batches(
    source: Source,
    sampler: Sampler,
    transform: Transform,
    *,
    seed: int,
    start: int,
    stop: int,
    channels: int = 3,
    host: int = 0,
    hosts: int = 1,
    threads: int = 4,
    prefetch: int = 4,
    workers: int = 0,
) -> Iterator[Batch]:
    """This host's part of the training batches of the steps ``start`` to ``stop - 1``.

    A batch depends on (seed, step) alone, so a resumed run sees what the uninterrupted one would have seen.

    Args:
      source: images.
      sampler: order of records.
      transform: training transform.
      seed: of the transform's randomness.
      start: first step.
      stop: step after the last.
      channels: 3 for colour, 1 for grey.
      host: index of this host.
      hosts: number of hosts.
      threads: reading and decoding threads.
      prefetch: batches held ready; memory is ``prefetch`` batches of uint8 pictures.
      workers: worker processes instead of threads in this process, for hosts with many cores.

    Yields:
      ``image`` [b, size, size, channels] uint8, ``label`` [b] int32, ``index`` [b] int32, the record.

    Raises:
      UserError: naming an unreadable file.
    """
    slots = _Slots(sampler, start, stop, host, hosts)
    dataset = grain.MapDataset.source(slots).map(_Load(source, transform, channels, seed))
    yield from _iterate(dataset.batch(sampler.batch_size // hosts), threads, prefetch, workers)


class _InOrder:
    """Records in a given order in whole batches, the last one filled up with repeats of its first record."""

    steps_per_epoch = 0

    def __init__(self, records: np.ndarray, batch_size: int):
        self.batch_size = batch_size
        self.steps_per_epoch = -(-len(records) // batch_size)
        self._padded = np.resize(records, self.steps_per_epoch * batch_size)
        self._padded[len(records) :] = records[0]

    def batch(self, step: int) -> np.ndarray:
        return self._padded[step * self.batch_size : (step + 1) * self.batch_size]


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    order: np.ndarray | None = None,
    channels: int = 3,
    host: int = 0,
    hosts: int = 1,
    threads: int = 4,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """Every image once, in order, in batches of one size; the tail is padded and masked.

    Args:
      source: images.
      transform: test transform.
      batch_size: images per global batch.
      order: records to read, ``[m]``; all in their order by default.
      channels: 3 for colour, 1 for grey.
      host: index of this host.
      hosts: number of hosts.
      threads: reading and decoding threads.
      prefetch: batches held ready.

    Yields:
      As ``train_batches``, and ``mask`` [b] bool, false for padding.

    Raises:
      UserError: naming an unreadable file.
    """
    records = np.arange(len(source)) if order is None else np.asarray(order)
    sampler = _InOrder(records, batch_size)
    slots = _Slots(sampler, 0, sampler.steps_per_epoch, host, hosts)
    local = batch_size // hosts
    dataset = grain.MapDataset.source(slots).map(_Load(source, transform, channels, 0)).batch(local)
    for step, batch in enumerate(_iterate(dataset, threads, prefetch, 0)):
        places = step * batch_size + host * local + np.arange(local)
        batch["mask"] = places < len(records)
        yield batch
