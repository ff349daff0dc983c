"""Finds and opens prepared data sets in a data folder: of this package, or of tfds if stored as array_record."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from idml_jax.data.files import expand, read_file
from idml_jax.data.sources import TfdsSource
from idml_jax.data.stored import label_index as index
from idml_jax.data.stored.benchmarks import BENCHMARKS
from idml_jax.data.stored.shards import ABOUT, FILE_FORMAT
from idml_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

PREFIX = "idml_"
# Label features of tfds' own sets that are not called "label".
_LABEL_KEYS = ("label", "class_id")
_MAX_METADATA = 2**26
# The keys that name the class of a feature, in all spellings that tfds reads.
_CLASS_KEYS = {"pythonClassName", "python_class_name", "type"}
_OWN_FEATURES = "tensorflow_datasets.core.features."


class Prepared(NamedTuple):
    """A stored set.

    Attributes:
      folder: folder with ``dataset_info.json``.
      builder: read-only tfds builder.
      ours: whether ``idml_jax.prepare`` wrote it.
      complete: whether its counts are the benchmark's; ``None`` if not yet checked.
    """

    folder: Path
    builder: "tfds.core.DatasetBuilder"
    ours: bool
    complete: bool | None

    @property
    def splits(self) -> list[str]:
        """Names of its splits."""
        return list(self.builder.info.splits)


def version_folder(home: Path) -> Path | None:
    """The folder of the newest version below ``home``, directly or below a configuration's folder."""
    found = []
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        for path in home.glob(pattern):
            numbers = path.parent.name.split(".")
            if len(numbers) == 3 and all(n.isascii() and n.isdigit() for n in numbers):
                found.append((tuple(map(int, numbers)), path.parent))
    return max(found, default=(None, None))[1]


def _metadata(folder: Path, name: str) -> dict[str, object]:
    path = folder / name
    try:
        found = json.loads(read_file(path, _MAX_METADATA))
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not readable as JSON (no object)")
    return found


def open_builder(folder: Path) -> "tfds.core.DatasetBuilder":
    """The read-only tfds builder of a stored set.

    tfds imports any module that the set's ``features.json`` names, so names of other packages are refused first.

    Raises:
      UserError: if the set is damaged or names features that are not tfds' own.
    """
    import tensorflow_datasets as tfds

    pending: list[object] = [_metadata(folder, "features.json")]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
            for key in _CLASS_KEYS & value.keys():
                if isinstance(value[key], str) and not value[key].startswith(_OWN_FEATURES):
                    raise UserError(
                        f"{folder / 'features.json'}: names the feature {value[key][:100]!r}, which is not "
                        "tfds' own; refused"
                    )
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise UserError(f"{folder}: not a readable tfds set ({(str(error) or 'damaged').splitlines()[0]})") from error


def file_format(folder: Path) -> str:
    """The file format of a stored tfds set; tfds' default is ``tfrecord``."""
    return str(_metadata(folder, "dataset_info.json").get("fileFormat", "tfrecord"))


def open_folder(folder: Path) -> Prepared:
    """Opens the set in a version's folder.

    Raises:
      UserError: if it is damaged or does not allow random access.
    """
    found = file_format(folder)
    if found != FILE_FORMAT:
        raise UserError(
            f"{folder}: stored as {found}, which allows no random access; "
            f"python -m idml_jax.prepare --source={folder} stores it again as {FILE_FORMAT}"
        )
    builder = open_builder(folder)
    about = _metadata(folder, ABOUT) if (folder / ABOUT).exists() else {}
    complete = about.get("complete")
    return Prepared(folder, builder, bool(about), None if complete is None else bool(complete))


def find(dataset: str, data_dir: str, variant: str = "") -> Prepared:
    """Finds a benchmark's set in a data folder.

    Args:
      dataset: key of ``BENCHMARKS``, or ``folder``.
      data_dir: folder of data sets.
      variant: name of a prepared image folder.

    Raises:
      UserError: if there is none; names the command that creates it.
    """
    root = expand(data_dir)
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


class _Records(Sequence[dict[str, object]]):
    """Some features of a split's records; the image stays encoded.

    Otherwise the additional images (masks) and boxes of some tfds sets would be decoded with every record.
    """

    def __init__(self, builder: "tfds.core.DatasetBuilder", split: str, keys: Sequence[str]):
        from tensorflow_datasets import decode
        from tensorflow_datasets import features as features_lib

        self._raw = builder.as_data_source(split, deserialize_method=decode.DeserializeMethod.RAW_BYTES)
        # tfds' own PartialDecoding compares types by importing TensorFlow.
        self._features = features_lib.FeaturesDict({key: builder.info.features[key] for key in keys})
        self._decoders = {"image": decode.SkipDecoding()} if "image" in keys else None

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, record: int) -> dict[str, object]:  # type: ignore[override]  # no slices
        return self._features.deserialize_example_np(self._raw[record], decoders=self._decoders)


def source(
    prepared: Prepared, split: str, *, field_keys: Sequence[str] = (), say: Callable[[str], None] = print
) -> TfdsSource:
    """Opens a split of a stored set; its labels come from the index, or are read once.

    Args:
      prepared: the set.
      split: name of the split.
      field_keys: additional features to load into ``fields``.
      say: receives a line before labels are read.

    Raises:
      UserError: if the set lacks an image or a label.
    """
    known = prepared.builder.info.features
    label_key = next((key for key in _LABEL_KEYS if key in known), None)
    if "image" not in known or label_key is None:
        raise UserError(f"{prepared.folder}: has the features {', '.join(known)}; expected an image and a label")
    file_key = next((key for key in ("file_name", "image/filename") if key in known), None)
    records = lambda keys: _Records(prepared.builder, split, keys)
    keys = [label_key, *field_keys]
    try:
        columns = index.load(prepared.folder, split, lambda: records(keys), keys, say)
        images = records(["image", *([file_key] if file_key else [])])
    except Exception as error:  # a record file may be damaged in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{prepared.folder}: the split {split!r} cannot be read ({reason[:200]})") from error
    names = known[label_key].names
    labels = columns[label_key]
    total = prepared.builder.info.splits[split].num_examples
    if labels.shape != (total,) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{prepared.folder}: the split {split!r} has no usable labels ({labels.dtype} {list(labels.shape)} for "
            f"{total} images of {len(names)} classes)"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        raise UserError(
            f"{prepared.folder}: {len(wrong):,} records of the split {split!r} have a label outside 0 to "
            f"{len(names) - 1}, the first record {wrong[0]} with {labels[wrong[0]]}"
        )
    labels = labels.astype(np.int32)
    return TfdsSource(
        images,
        f"{prepared.builder.info.name}/{split}",
        names,
        labels,
        {key: columns[key] for key in field_keys},
        file_key=file_key,
    )
