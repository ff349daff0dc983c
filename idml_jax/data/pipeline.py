"""Batches of images from a source: the Grain pipeline, the host's slice, padding and mask."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from idml_jax.data.files import FileError, shown
from idml_jax.data.images.decode import one_image_fails
from idml_jax.data.images.transforms import DecodeError, Picture, Transform
from idml_jax.data.samplers import Sampler
from idml_jax.data.sources import Source, box_of, sets_of
from idml_jax.data.unreadable import reason_of
from idml_jax.errors import UserError

Batch = dict[str, np.ndarray]
OnBad = Literal["raise", "skip"]


def slot_generator(seed: int, slot: int) -> np.random.Generator:
    """Random generator for the image in a slot (its position over all steps), the same for every reader."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, slot))))


@dataclass(frozen=True)
class Reading:
    """How images are read and turned into pixels, and which part of every batch this host reads.

    Attributes:
      transform: from an encoded image to the pixels that the network sees.
      channels: 3 for colour, 1 for grey.
      threads: number of reader and decoder threads.
      prefetch: number of batches read ahead; with the one in use, memory is ``prefetch`` + 1 batches of uint8 images.
      workers: number of worker processes used instead of the threads in training, for hosts with many cores.
      host: index of this host.
      hosts: number of hosts.
    """

    transform: Transform
    channels: int = 3
    threads: int = 4
    prefetch: int = 4
    workers: int = 0
    host: int = 0
    hosts: int = 1

    def part(self, batch_size: int, field: str) -> slice:
        """The rows of a global batch that this host reads.

        Raises:
          UserError: if the batch does not divide evenly among the hosts; ``field`` is the setting to name.
        """
        if batch_size % self.hosts:
            raise UserError(f"{field} ({batch_size}) must be a multiple of the {self.hosts} hosts")
        size = batch_size // self.hosts
        return slice(self.host * size, (self.host + 1) * size)

    def load(self, source: Source, record: int, seed: int, slot: int) -> UInt8[np.ndarray, "size size c"]:
        """Reads, decodes and transforms one image; every image that enters the network passes through here.

        Args:
          source: images.
          record: index of the image in the source.
          seed: seed of the transform's randomness.
          slot: position of the image over all steps.

        Returns:
          The pixels, which are the same for the same (seed, slot) on every host and thread.

        Raises:
          FileError: for any problem with the image, which it names.
        """
        rng = slot_generator(seed, slot)
        try:
            with one_image_fails():
                return self.transform(Picture(source.read(record), self.channels, box_of(source, record)), rng)
        except DecodeError as error:
            raise FileError(f"{shown(source.name(record))}: {error}") from error


class _Batches:
    """This host's part of the batches of a range of steps; randomness depends on (seed, slot) only.

    A whole batch is one Grain element. Its images are read by a pool of ``threads`` threads, which all batches in
    preparation share: as many images are read at a time, however few batches are.
    """

    def __init__(self, source: Source, sampler: Sampler, reading: Reading, *, seed: int, start: int, stop: int):
        self._source, self._sampler, self._reading = source, sampler, reading
        self._seed, self._start, self._steps = seed, start, max(stop - start, 0)
        self._part = reading.part(sampler.batch_size, "config.batch_size")
        self._begin()

    def _begin(self) -> None:
        self._closed = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._reading.threads, "read images")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_pool", "_closed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
        _end_with_parent()  # a copy is unpickled in worker processes only

    def close(self) -> None:
        """Ends the threads, each after the image that it reads."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, number: int) -> Batch:
        step = self._start + int(number)
        records = self._sampler.batch(step)[self._part]
        first_slot = step * self._sampler.batch_size + self._part.start

        buffer: list[np.ndarray] = []
        lock = threading.Lock()

        def fill(places: range) -> None:
            for place in places:
                if self._closed.is_set():
                    raise concurrent.futures.CancelledError
                image = self._reading.load(self._source, int(records[place]), self._seed, first_slot + place)
                with lock:
                    if not buffer:  # the first image tells the size of all
                        buffer.append(np.empty((len(records), *image.shape), np.uint8))
                buffer[0][place] = image

        # Several images a task, since handing over a task takes as long as reading a small image.
        size = max(1, len(records) // (4 * self._reading.threads))
        tasks = [
            self._pool.submit(fill, range(at, min(at + size, len(records)))) for at in range(0, len(records), size)
        ]
        for task in tasks:  # in order, so that of several unreadable images the first is named
            task.result()
        sets = sets_of(self._source)
        return {
            "image": buffer[0],
            "label": (self._source.labels if sets is None else sets)[records].astype(np.int32),
            "index": records.astype(np.int32),
        }


def _end_with_parent() -> None:
    """Ends this worker process when the one that started it is gone, even if that was killed.

    Grain's workers wait for work without end, and so would keep their memory.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def refuse_in_a_starting_process() -> None:
    """Ends a process that runs its parent's script once more: what multiprocessing does with a script without a guard.

    Such a process would train, too, in the same folder.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks
        sys.exit(
            "error: config.data.workers starts processes that read the script again: put what it does below "
            'if __name__ == "__main__":'
        )


def load_reader() -> ModuleType:
    """Imports Grain, which takes a while and only training needs.

    To be called before other threads import anything: while Grain is imported, it replaces Python's import for all
    threads, and what they import at that moment may be unusable (seen with TensorFlow).
    """
    import grain

    return grain


def _iterate(batches: _Batches, reading: Reading) -> Iterator[Batch]:
    grain: Any = load_reader()
    # A thread per batch in preparation, which waits for those that read its images.
    options = grain.ReadOptions(num_threads=reading.prefetch, prefetch_buffer_size=reading.prefetch)
    chain = grain.MapDataset.source(batches).to_iter_dataset(options)
    if reading.workers:
        refuse_in_a_starting_process()
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; notebooks and own programs parse none
            flags.FLAGS.mark_as_parsed()
        chain = chain.mp_prefetch(grain.MultiprocessingOptions(num_workers=reading.workers, per_worker_buffer_size=2))
    iterator = iter(chain)
    try:
        yield from iterator
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise UserError(
            "a reader process (config.data.workers) has ended unexpectedly; what it said stands above. A script that "
            'uses them does its work below if __name__ == "__main__":'
        ) from error
    finally:
        batches.close()
        with contextlib.suppress(Exception):
            iterator.close()


def train_batches(
    source: Source, sampler: Sampler, reading: Reading, *, seed: int, start: int, stop: int
) -> Iterator[Batch]:
    """This host's part of the training batches of the steps ``start`` to ``stop - 1``.

    A batch depends on (seed, step) only, so a resumed run sees the same batches as an uninterrupted one.

    Args:
      source: images.
      sampler: order of records.
      reading: training transform, threads and host.
      seed: seed of the transform's randomness.
      start: first step.
      stop: step after the last.

    Yields:
      ``image`` [b, size, size, channels] uint8, ``label`` [b] int32 (with several labels per image [b, l], filled up
      with -1), ``index`` [b] int32, the record index.

    Raises:
      UserError: naming an unreadable file.
    """
    yield from _iterate(_Batches(source, sampler, reading, seed=seed, start=start, stop=stop), reading)


def eval_batches(
    source: Source,
    reading: Reading,
    *,
    batch_size: int,
    order: Int[np.ndarray, "m"] | None = None,
    on_bad: OnBad = "raise",
) -> Iterator[Batch]:
    """Yields every image once, in order, in batches of one size; the last batch is padded and masked.

    Args:
      source: images.
      reading: test transform, threads and host.
      batch_size: images per global batch.
      order: ``[m]`` records to read; by default all, in order.
      on_bad: ``raise`` raises at an unreadable image; ``skip`` masks it and gives the reason.

    Yields:
      ``image`` [b, size, size, channels] uint8, zeros for unreadable images (absent if no image of the batch is
      readable); ``label`` [b] int32; ``index`` [b] int32, the record index; ``mask`` [b] bool, false for padding and
      unreadable images; ``problem`` [b], the reason why an image is unreadable, empty for the others.

    Raises:
      UserError: naming an unreadable file, unless ``on_bad`` is ``skip``.
    """
    records = np.arange(len(source)) if order is None else np.asarray(order)
    part = reading.part(batch_size, "config.eval.batch_size")
    places = np.arange(0, len(records), batch_size)[:, None] + np.arange(part.start, part.stop)[None, :]

    def load(record: int, slot: int) -> np.ndarray | str:
        try:
            return reading.load(source, record, 0, slot)
        except UserError as error:
            if on_bad == "raise":
                raise
            return reason_of(source, record, error)

    ahead = min(reading.prefetch, 2)
    with concurrent.futures.ThreadPoolExecutor(reading.threads) as pool:
        started: collections.deque[tuple[np.ndarray, list[concurrent.futures.Future]]] = collections.deque()
        try:
            for number in range(len(places) + ahead):
                if number < len(places):
                    slots = places[number][places[number] < len(records)]
                    real = records[slots]
                    tasks = zip(real.tolist(), slots.tolist(), strict=True)
                    started.append((real, [pool.submit(load, record, slot) for record, slot in tasks]))
                if number >= ahead:
                    real, loaded = started.popleft()
                    images = [one.result() for one in loaded]
                    batch = _collected(source, real, images, part.stop - part.start, int(records[0]))
                    if not len(real):  # the last batch has no rows for this host, which must still take part
                        shape = np.shape(reading.load(source, int(records[0]), 0, 0))
                        batch["image"] = np.zeros((part.stop - part.start, *shape), np.uint8)
                    yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _collected(source: Source, real: np.ndarray, loaded: list[np.ndarray | str], size: int, padding: int) -> Batch:
    """A batch of ``size`` rows: the loaded ``real`` records, then masked rows with the index ``padding``."""
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
