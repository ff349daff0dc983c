"""Writes a data set as a resumable tfds set of array_record files, without TensorFlow.

A set is written to ``<version>.incomplete/`` and renamed to ``<version>/`` when it is complete. A record file ("shard")
gets its final name only when it is complete and on disk, together with a note of its split's progress; the next run
reads the notes and continues from there. Only the content of unfinished shards is read again.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from idml_jax.data import files
from idml_jax.data.files import FileError
from idml_jax.data.images import transforms
from idml_jax.data.stored import label_index as index
from idml_jax.data.stored.benchmarks import Count
from idml_jax.data.stored.layouts import Plan, Record
from idml_jax.errors import UserError
from idml_jax.runtime.files import atomic, write_json

if TYPE_CHECKING:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

VERSION = "1.0.0"
FILE_FORMAT = "array_record"
NOTES = "notes"
IDENTITY = "identity.json"
ABOUT = "idml_jax.json"
# The images are already compressed, so the records are not.
_OPTIONS = "group_size:1,uncompressed"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


class SourceChangedError(Exception):
    """The source no longer begins with the images that were stored from it."""


class Progress(NamedTuple):
    """Progress of writing a set.

    Attributes:
      done: number of images stored or skipped by split, including earlier runs.
      fresh: number of these images in this run.
    """

    done: Mapping[str, int]
    fresh: int


class Stored(NamedTuple):
    """Summary of a stored set.

    Attributes:
      counts: number of images and classes by split.
      skipped: names of the unreadable files that were left out.
    """

    counts: dict[str, Count]
    skipped: list[str]


def features(class_names: Sequence[str]) -> "tfds.features.FeaturesDict":
    """The tfds features of a stored set: encoded image, label, name of its file."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=list(class_names)),
            "file_name": tfds.features.Text(),
        }
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Prevents other processes from writing the same set; the lock ends with the process.

    Raises:
      UserError: if another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is preparing this set; wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield


class _Split:
    """The shards of one split."""

    def __init__(self, folder: Path, prefix: str, split: str, shard_bytes: int):
        self._folder, self._prefix, self._split, self._limit = folder, prefix, split, shard_bytes
        self.lengths: list[int] = []
        self.bytes = 0
        self.labels: list[np.ndarray] = []
        self.skipped: list[str] = []
        self.position = 0  # number of the plan's records that are processed
        self.names = hashlib.sha256()  # digest of all their names, in order
        self._trail = self.names.hexdigest()
        while self._restore(len(self.lengths)):
            pass
        self.resumed, self._resumed_trail = self.position, self._trail
        self._writer: ArrayRecordWriter | None = None
        self._open_labels: list[int] = []
        self._open_bytes = 0
        self._open_skipped: list[str] = []

    def _shard(self, number: int) -> Path:
        return self._folder / f"{self._prefix}-{self._split}.{FILE_FORMAT}-{number:05d}"

    def _note(self, number: int) -> Path:
        return self._folder / NOTES / f"{self._split}-{number:05d}.npz"

    def _restore(self, number: int) -> bool:
        try:
            with np.load(self._note(number), allow_pickle=False) as note:
                if self._shard(number).stat().st_size != int(note["file_bytes"]):
                    return False
                labels = note["labels"]
                self.position, self.skipped = int(note["position"]), self.skipped + note["skipped"].tolist()
                self.bytes, self._trail = self.bytes + int(note["bytes"]), str(note["names"])
        except Exception:  # missing or damaged: written again
            return False
        self.lengths.append(len(labels))
        self.labels.append(labels)
        return True

    def meet(self, name: str) -> None:
        """Adds a name to the digest of the names seen so far."""
        self.names.update(name.encode("utf-8", "surrogateescape") + b"\n")

    def same_trail(self) -> bool:
        """Whether the names seen so far are those that earlier runs processed."""
        return self.names.hexdigest() == self._resumed_trail

    def add(self, label: int, record: bytes) -> None:
        if self._writer is None:
            from array_record.python.array_record_module import ArrayRecordWriter

            self._writer = ArrayRecordWriter(str(self._shard(len(self.lengths))) + ".tmp", _OPTIONS)
        self._writer.write(record)
        self._open_labels.append(label)
        self._open_bytes += len(record)
        self.position += 1
        if self._open_bytes >= self._limit:
            self.close_shard()

    def skip(self, name: str) -> None:
        self._open_skipped.append(name)
        self.position += 1

    def close_shard(self) -> None:
        if self._writer is None:
            self.skipped, self._open_skipped = self.skipped + self._open_skipped, []
            return
        self._writer.close()
        self._writer = None
        number = len(self.lengths)
        final = self._shard(number)
        temporary = Path(str(final) + ".tmp")
        labels = np.asarray(self._open_labels, np.int64)
        _check_and_flush(temporary, len(labels))
        size = temporary.stat().st_size
        temporary.replace(final)
        note = self._note(number)
        with atomic(note) as file:
            np.savez(
                file,
                labels=labels,
                position=self.position,
                bytes=self._open_bytes,
                file_bytes=size,
                skipped=np.asarray(self._open_skipped, str),
                names=np.asarray(self.names.hexdigest(), str),
            )
        self.lengths.append(len(labels))
        self.labels.append(labels)
        self.bytes += self._open_bytes
        self.skipped += self._open_skipped
        self._open_labels, self._open_bytes, self._open_skipped = [], 0, []

    @property
    def all_labels(self) -> np.ndarray:
        return np.concatenate(self.labels) if self.labels else np.zeros(0, np.int64)


def _check_and_flush(path: Path, records: int) -> None:
    """Checks that a shard is complete on disk, since a full disk may go unnoticed, and flushes it."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise OSError(0, "the record file is incomplete on disk", str(path)) from error
    if found != records:
        raise UserError(f"{path}: {found} of {records} records are on disk; is it full?")
    with open(path, "rb") as file:
        os.fsync(file.fileno())


class SetWriter:
    """Writes a data set to disk.

    Args:
      home: folder of the set, which will hold ``1.0.0/``.
      name: name of the tfds set, the first part of its file names.
      plan: what to store.
      identity: identifies source and settings; shards written with another identity are discarded.
      shard_bytes: size in bytes at which a shard is closed.
      start_over: discard what earlier runs have stored.
    """

    def __init__(
        self,
        home: Path,
        name: str,
        plan: Plan,
        identity: Mapping[str, object],
        shard_bytes: int,
        start_over: bool = False,
    ):
        self.final, self._folder = home / VERSION, home / f"{VERSION}.incomplete"
        self._name, self._plan = name, plan
        identity = {
            **identity,
            "layout": plan.layout,
            "splits": list(plan.splits),
            "shard_bytes": shard_bytes,
            "classes": hash_of(plan.class_names),
        }
        self.started_over = False
        marker = self._folder / IDENTITY
        if self._folder.exists() and (start_over or _read_json(marker) != identity):
            shutil.rmtree(self._folder)
            self.started_over = True
        (self._folder / NOTES).mkdir(parents=True, exist_ok=True)
        write_json(marker, identity)
        self._splits = {s: _Split(self._folder, name, s, shard_bytes) for s in plan.splits}

    @property
    def resumed(self) -> int:
        """Number of images that earlier runs processed."""
        return sum(split.resumed for split in self._splits.values())

    def write(self, on_corrupt: str, report: Callable[[Progress], None]) -> Stored:
        """Stores all images that are not stored yet.

        Args:
          on_corrupt: ``refuse`` or ``skip`` files that are not complete images.
          report: called after every image.

        Returns:
          Summary of everything stored, including earlier runs.

        Raises:
          UserError: naming the first bad file, under ``refuse``.
          SourceChangedError: if earlier runs stored other files.
        """
        schema = features(self._plan.class_names)
        seen: Counter[str] = Counter()
        fresh = 0
        for record in self._plan.records():
            split = self._splits[record.split]
            seen[record.split] += 1
            split.meet(f"{record.label} {record.name}")
            if seen[record.split] <= split.resumed:
                if seen[record.split] == split.resumed and not split.same_trail():
                    raise SourceChangedError(record.name)
                continue
            data = _checked(record, on_corrupt)
            if data is None:
                split.skip(files.shown(record.name))
            else:
                example = {"image": io.BytesIO(data), "label": record.label, "file_name": files.shown(record.name)}
                serialized = schema.serialize_example(example)
                with self._on_disk():
                    split.add(record.label, serialized)
            fresh += 1
            report(Progress({name: s.position for name, s in self._splits.items()}, fresh))
        for name, split in self._splits.items():
            if seen[name] < split.resumed:
                raise SourceChangedError(name)
            with self._on_disk():
                split.close_shard()
        counts = {n: Count(len(s.all_labels), len(np.unique(s.all_labels))) for n, s in self._splits.items()}
        return Stored(counts, [name for s in self._splits.values() for name in s.skipped])

    @contextlib.contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Reports what is kept when a file cannot be written: array_record raises RuntimeError, others OSError."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            kept = sum(sum(split.lengths) for split in self._splits.values())
            where = getattr(error, "filename", None) or self._folder
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"{where}: cannot be written ({reason}); is the disk full? {kept:,} images are stored; rerun the "
                "same command to resume after them"
            ) from error

    def publish(self, description: str, about: Mapping[str, object]) -> Path:
        """Makes the set visible under its final name.

        Args:
          description: one line for the tfds metadata.
          about: content of ``idml_jax.json`` in the set.

        Returns:
          Folder of the set.
        """
        with self._on_disk():
            return self._publish(description, about)

    def _publish(self, description: str, about: Mapping[str, object]) -> Path:
        import tensorflow_datasets as tfds

        folder, splits = self._folder, {n: s for n, s in self._splits.items() if s.lengths}
        for path in folder.glob("*.tmp"):
            path.unlink()
        infos = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=split.lengths,
                num_bytes=split.bytes,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=folder,
                    template=_TEMPLATE,
                    dataset_name=self._name,
                    split=name,
                    filetype_suffix=FILE_FORMAT,
                ),
            )
            for name, split in splits.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=features(self._plan.class_names),
            split_infos=infos,
            version=VERSION,
            filename_template=_TEMPLATE,
            check_data=False,
            description=description,
        )
        write_json(folder / ABOUT, about)
        for name, split in splits.items():
            index.write(folder, name, {"label": split.all_labels})
        folder.rename(self.final)
        shutil.rmtree(self.final / NOTES, ignore_errors=True)
        (self.final / IDENTITY).unlink(missing_ok=True)
        return self.final


def _checked(record: Record, on_corrupt: str) -> bytes | None:
    try:
        data = record.read()
        transforms.check_whole(data)
    except (transforms.DecodeError, FileError) as error:
        if on_corrupt == "skip":
            return None
        named = "" if isinstance(error, FileError) else f"{files.shown(record.name)}: "
        raise UserError(f"{named}{error}; --on_corrupt=skip leaves such files out") from error
    return data


def hash_of(values: object) -> str:
    """A short fingerprint of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
