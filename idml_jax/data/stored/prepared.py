"""Finds and opens data sets that lie prepared under a data folder: ours, or tfds' own if stored as array_record."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idml_jax.data.sources import TfdsSource
from idml_jax.data.stored import label_index as index
from idml_jax.data.stored.benchmarks import BENCHMARKS
from idml_jax.data.stored.shards import ABOUT, FILE_FORMAT
from idml_jax.errors import UserError

PREFIX = "idml_"
# tfds' own sets, where their label is not called "label".
_LABEL_KEYS = ("label", "class_id")


class Prepared(NamedTuple):
    """A stored set.

    Attributes:
      folder: with ``dataset_info.json``.
      builder: of tfds, read-only.
      ours: whether ``idml_jax.prepare`` wrote it.
      complete: whether its counts are the benchmark's; ``None`` where that was not checked yet.
    """

    folder: Path
    builder: Any
    ours: bool
    complete: bool | None

    @property
    def splits(self) -> list[str]:
        """Names of its splits."""
        return list(self.builder.info.splits)


def version_folder(home: Path) -> Path | None:
    """The folder of the newest version below ``home``, perhaps one configuration further down."""
    found = []
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        for path in home.glob(pattern):
            numbers = path.parent.name.split(".")
            if len(numbers) == 3 and all(n.isdigit() for n in numbers):
                found.append((tuple(map(int, numbers)), path.parent))
    return max(found, default=(None, None))[1]


def file_format(folder: Path) -> str:
    """How a stored tfds set keeps its records; tfds' default is ``tfrecord``."""
    try:
        return json.loads((folder / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'dataset_info.json'}: not readable as JSON ({error})") from error


def open_folder(folder: Path) -> Prepared:
    """Opens the set in a version's folder.

    Raises:
      UserError: if it is damaged or allows no random access.
    """
    import tensorflow_datasets as tfds

    found = file_format(folder)
    if found != FILE_FORMAT:
        raise UserError(
            f"{folder}: stored as {found}, which allows no random access; "
            f"python -m idml_jax.prepare --source={folder} stores it again as {FILE_FORMAT}"
        )
    try:
        builder = tfds.builder_from_directory(folder)
        about = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).exists() else {}
    except Exception as error:
        raise UserError(f"{folder}: not a readable tfds set ({(str(error) or 'damaged').splitlines()[0]})") from error
    return Prepared(folder, builder, bool(about), about.get("complete"))


def find(dataset: str, data_dir: str, variant: str = "") -> Prepared:
    """A benchmark's set under a data folder.

    Args:
      dataset: key of ``BENCHMARKS``, or ``folder``.
      data_dir: folder of data sets.
      variant: which of the prepared image folders.

    Raises:
      UserError: if there is none, naming the command that makes one.
    """
    root = Path(data_dir).expanduser()
    tfds_names = BENCHMARKS[dataset].tfds_names if dataset in BENCHMARKS else ()
    unreadable = None
    for name in (PREFIX + dataset, *tfds_names):
        folder = version_folder(root / name / variant if variant else root / name)
        if folder is None:
            continue
        if file_format(folder) == FILE_FORMAT:
            return open_folder(folder)
        unreadable = unreadable or folder
    if unreadable:
        raise UserError(
            f"{unreadable}: stored as {file_format(unreadable)}, which allows no random access; "
            f"python -m idml_jax.prepare --dataset={dataset} --source={unreadable} stores it again as {FILE_FORMAT}"
        )
    looked = " nor ".join([f"{root / PREFIX}{dataset}{'/' + variant if variant else ''}", *tfds_names])
    raise UserError(
        f"no prepared {dataset} under {root} (neither {looked}); "
        f"python -m idml_jax.prepare --dataset={dataset} --source=PATH --data_dir={data_dir} makes it"
    )


class _Records(Sequence[dict[str, Any]]):
    """Some features of a split's records; the image stays encoded.

    Further pictures (masks) and boxes, which tfds' own sets may have, would else be decoded with every record.
    """

    def __init__(self, builder: Any, split: str, keys: Sequence[str]):
        from tensorflow_datasets import decode
        from tensorflow_datasets import features as features_lib

        self._raw = builder.as_data_source(split, deserialize_method=decode.DeserializeMethod.RAW_BYTES)
        # tfds' own PartialDecoding compares types by importing TensorFlow.
        self._features = features_lib.FeaturesDict({key: builder.info.features[key] for key in keys})
        self._decoders = {"image": decode.SkipDecoding()} if "image" in keys else None

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, record: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        return self._features.deserialize_example_np(self._raw[record], decoders=self._decoders)


def source(
    prepared: Prepared, split: str, *, field_keys: Sequence[str] = (), say: Callable[[str], None] = print
) -> TfdsSource:
    """A split of a stored set; its labels come from the index, or are read once.

    Args:
      prepared: the set.
      split: name.
      field_keys: further features to hold in ``fields``.
      say: receives a line before labels are read.

    Raises:
      UserError: if it lacks an image or a label.
    """
    known = prepared.builder.info.features
    label_key = next((key for key in _LABEL_KEYS if key in known), None)
    if "image" not in known or label_key is None:
        raise UserError(f"{prepared.folder}: has the features {', '.join(known)}; expected an image and a label")
    file_key = next((key for key in ("file_name", "image/filename") if key in known), None)
    records = lambda keys: _Records(prepared.builder, split, keys)
    columns = index.load(
        prepared.folder, split, lambda: records([label_key, *field_keys]), [label_key, *field_keys], say
    )
    names = known[label_key].names
    labels = columns[label_key].astype(np.int32)
    total = prepared.builder.info.splits[split].num_examples
    if len(labels) != total or (len(labels) and not 0 <= labels.min() <= labels.max() < len(names)):
        raise UserError(
            f"{prepared.folder}: the split {split!r} has no usable labels ({len(labels)} for {total} images of "
            f"{len(names)} classes)"
        )
    return TfdsSource(
        records(["image", *([file_key] if file_key else [])]),
        f"{prepared.builder.info.name}/{split}",
        names,
        labels,
        {key: columns[key] for key in field_keys},
        file_key=file_key,
    )
