"""From a source to batches: the Grain chain, the host's slice, padding and mask."""

import collections
import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import Literal

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
OnBad = Literal["raise", "skip"]


def slot_generator(seed: int, slot: int) -> np.random.Generator:
    """The random numbers of the image in a slot, its place in the order of all steps, whoever reads it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, slot))))


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
        return load_image(self._source, record, self._transform, self._channels, slot_generator(self._seed, slot))


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
    prefetch: int = 2,
    on_bad: OnBad = "raise",
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
      prefetch: number of batches read ahead; with the one in use, memory is ``prefetch`` + 1 batches of uint8 images.
      on_bad: ``raise`` ends at an image that cannot be read; ``skip`` masks it and gives the reason.

    Yields:
      ``image`` [b, size, size, channels] uint8, zeros where nothing could be read (absent if that is so for the whole
      batch), ``label`` [b] int32, ``index`` [b] int32, the record, ``mask`` [b] bool, false for padding and for
      images that cannot be read, and ``problem`` [b], why an image cannot be read, empty for the others.

    Raises:
      UserError: naming an unreadable file, unless ``on_bad`` is ``skip``.
    """
    if batch_size % hosts:
        raise UserError(f"config.eval.batch_size ({batch_size}) must be a multiple of the {hosts} hosts")
    records = np.arange(len(source)) if order is None else np.asarray(order)
    local = batch_size // hosts
    places = np.arange(0, len(records), batch_size)[:, None] + host * local + np.arange(local)[None, :]

    def load(record: int, slot: int) -> np.ndarray | str:
        try:
            return load_image(source, record, transform, channels, slot_generator(0, slot))
        except UserError as error:
            if on_bad == "raise":
                raise
            return str(error).removeprefix(f"{shown(source.name(record))}: ")

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        started: collections.deque[tuple[np.ndarray, list[concurrent.futures.Future]]] = collections.deque()
        try:
            for number in range(len(places) + prefetch):
                if number < len(places):
                    slots = places[number][places[number] < len(records)]
                    real = records[slots]
                    tasks = zip(real.tolist(), slots.tolist(), strict=True)
                    started.append((real, [pool.submit(load, record, slot) for record, slot in tasks]))
                if number >= prefetch:
                    real, loaded = started.popleft()
                    images = [one.result() for one in loaded]
                    batch = _collected(source, real, images, local, int(records[0]))
                    if not len(real):  # the last batch is too short for this host, which takes part all the same
                        batch["image"] = np.zeros((local, *np.shape(load(int(records[0]), 0))), np.uint8)
                    yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collected(source: Source, real: np.ndarray, loaded: list[np.ndarray | str], size: int, padding: int) -> Batch:
    """A batch of ``size`` places from what was read of the ``real`` records; ``padding`` names the others."""
    index = np.full(size, padding, np.int32)
    index[: len(real)] = real
    problem = np.full(size, "", object)
    mask = np.zeros(size, bool)
    batch: Batch = {"label": source.labels[index].astype(np.int32), "index": index, "mask": mask, "problem": problem}
    for place, image in enumerate(loaded):
        if isinstance(image, str):
            problem[place] = image
            continue
        mask[place] = True
        if "image" not in batch:
            batch["image"] = np.zeros((size, *image.shape), np.uint8)
        batch["image"][place] = image
    return batch
