"""Draws all images of the data set `glyphs`, in several processes.

Also the program of such a process: it reads every `Series` and its share of the work as JSON, and writes blocks of
images.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np

from idml_jax.data.glyphs import draw
from idml_jax.runtime import cpus

# Fewer images than this are drawn in this process: others need half a second to start.
_FEW = 2_000
_MOST_PROCESSES = 8
_LENGTH = struct.Struct("<Q")  # before each block of a process, its length in bytes


class Series(NamedTuple):
    """The images of a split.

    Attributes:
      seed: seed of all images.
      split: number of the split.
      share: share of images that are not clean.
      side: width and height in pixels.
      images_per_class: images of each character.
      codes: code points of the characters.
    """

    seed: int
    split: int
    share: float
    side: int
    images_per_class: int
    codes: list[int]


class Example(NamedTuple):
    """One image.

    Attributes:
      png: the image, as PNG.
      kind: number of how it was changed, in ``draw.KINDS``.
      ambiguity: see ``builder.Glyphs``.
      other: position of the second character of a blend in ``Series.codes``, otherwise -1.
    """

    png: bytes
    kind: int
    ambiguity: float
    other: int


def example(series: Series, position: int, index: int) -> Example:
    """Draws image `index` of character `series.codes[position]`."""
    codes = series.codes
    rng = np.random.default_rng([series.seed, series.split, codes[position], index])
    is_degraded, kind, ambiguity = rng.random() < series.share, int(rng.integers(1, len(draw.KINDS))), rng.random()
    if not is_degraded:
        kind, ambiguity = 0, 0.0
    other = (position + 1 + int(rng.integers(len(codes) - 1))) % len(codes)
    picture = draw.picture(rng, codes[position], series.side, draw.KINDS[kind], ambiguity, codes[other])
    blend = draw.KINDS[kind] == "blend"
    return Example(cv2.imencode(".png", picture)[1].tobytes(), kind, ambiguity, other if blend else -1)


def drawn(every: Sequence[Series], processes: int = 0) -> Iterator[list[Example]]:
    """All images of several series, character by character.

    The images do not depend on the number of processes. A process that cannot be started or that ends early is replaced
    by this one.

    Args:
      every: what to draw, one series after the other.
      processes: number of processes; 0: one per CPU for many images, else none but this one.
    """
    count = processes or _processes(every)
    own = _characters(every)
    if count < 2:
        yield from (_images(series, position) for series, position in own)
        return
    with contextlib.ExitStack() as stack:
        workers = [_started(every, number, count, stack) for number in range(count)]
        for place, (series, position) in enumerate(own):
            number = place % count
            block = _read(workers[number])
            if block is None:
                workers[number] = None
            yield _images(series, position) if block is None else block


def _processes(every: Sequence[Series]) -> int:
    if sum(len(series.codes) * series.images_per_class for series in every) < _FEW:
        return 1
    return min(_MOST_PROCESSES, cpus.available())


def _characters(every: Sequence[Series]) -> list[tuple[Series, int]]:
    return [(series, position) for series in every for position in range(len(series.codes))]


def _images(series: Series, position: int) -> list[Example]:
    return [example(series, position, index) for index in range(series.images_per_class)]


def _started(every: Sequence[Series], number: int, count: int, stack: contextlib.ExitStack) -> IO[bytes] | None:
    """The output of a process that draws every `count`-th character from `number` on; it ends with the stack."""
    if not sys.executable or getattr(sys, "frozen", False):  # no Python to start, or a program of its own
        return None
    package = Path(__file__).parents[3]
    paths = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", __spec__.name]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths}, start_new_session=True,
        )  # fmt: skip
    except OSError:
        return None
    stack.callback(_end, process)
    assert process.stdin is not None
    work = {"series": [series._asdict() for series in every], "number": number, "count": count}
    with contextlib.suppress(OSError), process.stdin as told:
        told.write(json.dumps(work).encode())
    return process.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read(worker: IO[bytes] | None) -> list[Example] | None:
    """The next block of a process; ``None`` if there is none."""
    if worker is None:
        return None
    head = worker.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    length = _LENGTH.unpack(head)[0]
    body = worker.read(length)
    return unpacked(body) if len(body) == length else None


def packed(images: list[Example]) -> bytes:
    """The images of a character as bytes: a line of JSON that tells about them, and the images one after the other."""
    told = [(len(image.png), *image[1:]) for image in images]
    return b"".join([json.dumps(told).encode(), b"\n", *(image.png for image in images)])


def unpacked(data: bytes) -> list[Example]:
    """The images that ``packed`` was given."""
    head, _, pixels = data.partition(b"\n")
    images, start = [], 0
    for length, *rest in json.loads(head):
        images.append(Example(pixels[start : start + length], *rest))
        start += length
    return images


def main() -> None:
    told = json.loads(sys.stdin.buffer.read())
    every, out = [Series(**series) for series in told["series"]], sys.stdout.buffer
    for series, position in _characters(every)[told["number"] :: told["count"]]:
        block = packed(_images(series, position))
        out.write(_LENGTH.pack(len(block)) + block)
        out.flush()


if __name__ == "__main__":
    main()
