"""From a source to batches: the Grain chain, the host's slice, padding and mask."""

import contextlib
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import UInt8

from idml_jax.data.files import FileError, shown
from idml_jax.data.images.decode import one_image_fails
from idml_jax.data.images.transforms import DecodeError, Picture, Transform
from idml_jax.data.samplers import Sampler
from idml_jax.data.sources import Source
from idml_jax.errors import UserError

Batch = dict[str, np.ndarray]


def load_image(
    source: Source, record: int, transform: Transform, channels: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size c"]:
    """Reads, decodes and transforms one image: the way of all images into the network.

    Args:
      source: images.
      record: which.
      transform: from the encoded image to the pixels that the network sees.
      channels: 3 for colour, 1 for grey.
      rng: of the transform.

    Raises:
      FileError: naming the image, whatever is wrong with it.
    """
    try:
        with one_image_fails():
            return transform(Picture(source.read(record), channels), rng)
    except DecodeError as error:
        raise FileError(f"{shown(source.name(record))}: {error}") from error


class _Batches:
    """This host's part of the batches of some steps, by number; randomness depends on (seed, slot) alone.

    A whole batch is one element for Grain: its threads make several at a time, and each is put together in place.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        transform: Transform,
        *,
        seed: int,
        start: int,
        stop: int,
        channels: int,
        host: int,
        hosts: int,
    ):
        if sampler.batch_size % hosts:
            raise UserError(f"config.batch_size ({sampler.batch_size}) must be a multiple of the {hosts} hosts")
        self._source, self._sampler, self._transform = source, sampler, transform
        self._seed, self._start, self._steps, self._channels = seed, start, max(stop - start, 0), channels
        self._local = sampler.batch_size // hosts
        self._offset = host * self._local

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, number: int) -> Batch:
        step = self._start + int(number)
        records = self._sampler.batch(step)[self._offset : self._offset + self._local]
        first_slot = step * self._sampler.batch_size + self._offset
        images = None
        for place, record in enumerate(records.tolist()):
            image = self._load(record, first_slot + place)
            if images is None:
                images = np.empty((self._local, *image.shape), np.uint8)
            images[place] = image
        return {
            "image": images,
            "label": self._source.labels[records].astype(np.int32),
            "index": records.astype(np.int32),
        }

    def _load(self, record: int, slot: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, slot))))
        return load_image(self._source, record, self._transform, self._channels, rng)


def _iterate(batches: _Batches, threads: int, prefetch: int, workers: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    chain = grain.MapDataset.source(batches).to_iter_dataset(options)
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
      threads: number of reader and decoder threads.
      prefetch: batches made or held ready; with the one in use, memory is ``prefetch`` + 1 batches of uint8 images.
      workers: worker processes instead of threads in this process, for hosts with many cores.

    Yields:
      ``image`` [b, size, size, channels] uint8, ``label`` [b] int32, ``index`` [b] int32, the record.

    Raises:
      UserError: naming an unreadable file.
    """
    batches = _Batches(
        source, sampler, transform, seed=seed, start=start, stop=stop, channels=channels, host=host, hosts=hosts
    )
    yield from _iterate(batches, threads, prefetch, workers)


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
      threads: number of reader and decoder threads.
      prefetch: number of batches held ready.

    Yields:
      As ``train_batches``, and ``mask`` [b] bool, false for padding.

    Raises:
      UserError: naming an unreadable file.
    """
    records = np.arange(len(source)) if order is None else np.asarray(order)
    sampler = _InOrder(records, batch_size)
    local = batch_size // hosts
    batches = _Batches(
        source,
        sampler,
        transform,
        seed=0,
        start=0,
        stop=sampler.steps_per_epoch,
        channels=channels,
        host=host,
        hosts=hosts,
    )
    for step, batch in enumerate(_iterate(batches, threads, prefetch, 0)):
        places = step * batch_size + host * local + np.arange(local)
        batch["mask"] = places < len(records)
        yield batch
