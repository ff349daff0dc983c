"""Data sets by name: folders of images, the built-in glyphs, and tfds sets stored as array_record."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idml_jax.data.sources import (
    Joined,
    Source,
    Subset,
    TfdsSource,
    check_classes,
    drop_unreadable,
    hold_out_classes,
    scan_folder,
    split_by_class,
)
from idml_jax.errors import UserError


class Splits(NamedTuple):
    """Training and evaluation images, whose classes are usually disjoint.

    Attributes:
      train: images to learn from.
      test: images on which the final figures are taken.
      validation: images of classes held out of the training classes, for choosing settings; ``None`` if none are.
    """

    train: Source
    test: Source
    validation: Source | None = None


def load_folder(
    *,
    root: str,
    train_classes: float = 0.5,
    on_corrupt: str = "refuse",
    warn: Callable[[str], None] = print,
    **_: object,
) -> tuple[Source, Source]:
    """A folder of images: ``root/train/<class>/`` and ``root/test/<class>/`` (or ``val``), or ``root/<class>/`` alone,
    which is split by class."""
    if not root:
        raise UserError("config.data.root is empty; give the folder that holds one folder per class")
    test_root = next((Path(root) / name for name in ("test", "val") if (Path(root) / name).is_dir()), None)
    if test_root is not None and (Path(root) / "train").is_dir():
        parts = [scan_folder(Path(root) / "train"), scan_folder(test_root)]
        return tuple(drop_unreadable(part, on_corrupt, warn) for part in parts)
    everything = drop_unreadable(scan_folder(root), on_corrupt, warn)
    if len(everything.class_names) < 2:
        raise UserError(f"{root}: 1 class ({everything.class_names[0]}); metric learning needs at least 2")
    return split_by_class(everything, train_classes)


def default_data_dir() -> str:
    """Where prepared data sets live unless told otherwise: ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``."""
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")


def load_glyphs(*, data_dir: str = "", variant: str = "default", **_: object) -> tuple[Source, Source]:
    """The built-in characters; made on first use."""
    import tensorflow_datasets as tfds

    from idml_jax.data import glyphs

    builder = glyphs.prepare(data_dir or default_data_dir(), variant or "default")
    names = builder.info.features["label"].names
    skip = {"image": tfds.decode.SkipDecoding()}
    parts = []
    for split in ("train", "test"):
        records = builder.as_data_source(split, decoders=skip)
        fields = ("ambiguity", "kind")
        source = TfdsSource(records, f"glyphs/{split}", names, field_keys=fields)
        parts.append(Subset(source, np.arange(len(source))))
    return parts[0], parts[1]


def load_tfds(
    *, data_dir: str = "", variant: str = "", train_classes: float = 0.5, **_: object
) -> tuple[Source, Source]:
    """A tfds data set that is already prepared as array_record: all its splits together, split by class."""
    import tensorflow_datasets as tfds

    if not variant:
        raise UserError("config.data.variant is empty; give the tfds data set, e.g. cars196 or my_set:1.0.0")
    data_dir = data_dir or default_data_dir()
    try:
        builder = tfds.builder(variant, data_dir=data_dir, file_format="array_record")
        splits = list(builder.info.splits)
        if not splits:
            raise FileNotFoundError(f"nothing is prepared for {variant}")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = f"tfds data set {variant!r} is not prepared as array_record under {data_dir}"
        raise UserError(f"{where}: {reason}") from error
    skip = {"image": tfds.decode.SkipDecoding()}
    names = builder.info.features["label"].names
    parts = [TfdsSource(builder.as_data_source(s, decoders=skip), f"{variant}/{s}", names) for s in splits]
    return split_by_class(Joined(parts), train_classes)


DATASETS: dict[str, Callable[..., tuple[Source, Source]]] = {
    "folder": load_folder,
    "glyphs": load_glyphs,
    "tfds": load_tfds,
}


def load_dataset(
    name: str,
    *,
    validation_classes: float = 0.0,
    on_small_class: str = "refuse",
    seed: int = 0,
    warn: Callable[[str], None] = print,
    **options: object,
) -> Splits:
    """A data set by name.

    Args:
      name: key of ``DATASETS``.
      validation_classes: share of the training classes to hold out for choosing settings.
      on_small_class: see ``check_classes``.
      seed: of the choice of validation classes.
      warn: receives lines about what was left out.
      **options: ``root``, ``data_dir``, ``variant``, ``train_classes``, ``on_corrupt``; each loader takes what it
        needs.

    Returns:
      The splits, with at least two classes each.

    Raises:
      UserError: for an unknown name (with the known ones) or unusable data.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r} (config.data.name); known: {', '.join(sorted(DATASETS))}")
    train, test = DATASETS[name](warn=warn, **options)
    train = check_classes(train, "training images", on_small_class, warn)
    test = check_classes(test, "test images", on_small_class, warn)
    if not validation_classes:
        return Splits(train, test)
    train, validation = hold_out_classes(train, validation_classes, seed)
    return Splits(train, test, validation)
