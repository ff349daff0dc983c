"""Reads sets that tfds stored as TFRecord (its default format, without random access) sequentially and without
TensorFlow, to store them again."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from idml_jax.data.files import MAX_FILE_BYTES, open_file
from idml_jax.data.stored import crc32c
from idml_jax.data.stored.benchmarks import BENCHMARKS
from idml_jax.data.stored.layouts import Plan, Record
from idml_jax.data.stored.prepared import open_builder
from idml_jax.errors import UserError

_LABEL_KEYS = ("label", "class_id")


def is_tfds(source: Path) -> bool:
    """Whether a folder is one version of a tfds set."""
    return source.is_dir() and (source / "dataset_info.json").exists() and (source / "features.json").exists()


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: eight bytes of length, four of its checksum, the record, four of its checksum.

    Raises:
      UserError: if a checksum does not match, or the file ends within a record.
    """
    with open_file(path) as file:
        for number in itertools.count():
            head = file.read(12)
            if not head:
                return
            length = int.from_bytes(head[:8], "little")
            if (
                len(head) != 12
                or length > MAX_FILE_BYTES
                or crc32c.masked(head[:8]) != int.from_bytes(head[8:], "little")
            ):
                raise UserError(f"{path}: damaged (record {number} has an impossible length)")
            record, checksum = file.read(length), file.read(4)
            if len(record) != length or len(checksum) != 4:
                raise UserError(f"{path}: cut short in record {number}")
            if crc32c.masked(record) != int.from_bytes(checksum, "little"):
                raise UserError(f"{path}: damaged (record {number} does not match its checksum); download it again")
            yield record


def plan(dataset: str, source: Path) -> Plan:
    """A plan for a stored tfds set: a benchmark with the protocol's splits, or any set as ``folder``.

    Raises:
      UserError: if it is a different data set, or not stored as TFRecord.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(source)
    benchmark = BENCHMARKS.get(dataset)
    if benchmark and builder.info.name not in benchmark.tfds_names:
        names = ", ".join(benchmark.tfds_names) or "not in tfds"
        raise UserError(f"{source}: the tfds set {builder.info.name}; {benchmark.title} is {names}")
    if builder.info.file_format.value != "tfrecord":
        raise UserError(
            f"{source}: a tfds set stored as {builder.info.file_format.value}; if that is array_record it is used as "
            "it is, with --config.data.data_dir"
        )
    label_key = next((key for key in _LABEL_KEYS if key in builder.info.features), None)
    if label_key is None or "image" not in builder.info.features:
        raise UserError(f"{source}: has the features {', '.join(builder.info.features)}; expected image and label")
    file_key = next((key for key in ("file_name", "image/filename") if key in builder.info.features), None)
    keys = ["image", label_key, *([file_key] if file_key else [])]
    features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})
    decoders = {"image": tfds.decode.SkipDecoding()}
    bound = benchmark.train_classes if benchmark else None
    known = [s for s in ("train", "test", "validation") if s in builder.info.splits]
    stored = known if bound or not benchmark else [s for s in benchmark.splits if s in builder.info.splits]
    splits = ("train", "test") if bound else tuple(stored)

    class_names = builder.info.features[label_key].names

    def records() -> Iterator[Record]:
        for split in stored:
            for path in builder.info.splits[split].filepaths:
                for number, raw in enumerate(read_tfrecord(Path(path))):
                    try:
                        example = features.deserialize_example_np(raw, decoders=decoders)
                        label = int(example[label_key])
                    except Exception as error:  # a record may fail to match the set's features in any way
                        reason = " ".join(str(error).split())[:200] or type(error).__name__
                        raise UserError(f"{path}: record {number} cannot be read ({reason})") from error
                    if not 0 <= label < len(class_names):
                        raise UserError(f"{path}: record {number} has the label {label} of {len(class_names)} classes")
                    name = example[file_key] if file_key else f"{Path(path).name} record {number}"
                    name = name.decode() if isinstance(name, bytes) else str(name)
                    to = split if bound is None else ("train" if label < bound else "test")
                    yield Record(to, label, name, partial(bytes, example["image"]))

    listed = None if bound else {s: builder.info.splits[s].num_examples for s in stored}
    return Plan(f"tfds' {builder.info.full_name}", class_names, splits, records, listed)
