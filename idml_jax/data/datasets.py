"""Data sets by name: the benchmarks, image folders, the built-in glyphs, and tfds sets stored as array_record."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idml_jax.data.copies import copies_line
from idml_jax.data.files import expand, shown
from idml_jax.data.listed import table_splits
from idml_jax.data.sources import Joined, Source, Subset, TfdsSource, scan_splits, sets_of
from idml_jax.data.splits import check_classes, hold_out_classes, hold_out_images, select_classes, split_by_class
from idml_jax.data.stored import prepared as prepared_lib
from idml_jax.data.stored.benchmarks import BENCHMARKS, Count, differences
from idml_jax.data.tables import is_table
from idml_jax.data.unreadable import drop_unreadable
from idml_jax.errors import UserError

# Share of the training images that replaces a missing ImageNet validation split: about 50 per class.
_TRAIN_ONLY_SHARE = 0.04


class Splits(NamedTuple):
    """Training and evaluation images, whose classes are usually disjoint.

    Attributes:
      train: images to learn from.
      test: images for the final metrics; the queries, if there is a gallery.
      validation: images held out of the training images, for choosing settings; ``None`` if none are held out. Their
        classes are disjoint from the training classes, unless the test classes are the training classes
        (classification).
      gallery: images that the test images search, with the same labels; ``None`` if the test images search each other.
    """

    train: Source
    test: Source
    validation: Source | None = None
    gallery: Source | None = None


def load_folder(
    *,
    root: str = "",
    image_root: str = "",
    data_dir: str = "",
    variant: str = "",
    train_classes: float = 0.5,
    on_corrupt: str = "refuse",
    warn: Callable[[str], None] = print,
    **_: object,
) -> Splits:
    """Loads a folder of images: ``root/train/<class>/`` and ``root/test/<class>/`` (or ``val``; or ``query`` and
    ``gallery``), or ``root/<class>/`` alone, which is split by class; or a table of images, whose relative paths start
    from ``image_root``; without ``root``, the prepared image folder that ``variant`` names."""
    if not root and variant:
        stored = prepared_lib.find("folder", data_dir or default_data_dir(), variant)
        prepared = {split: prepared_lib.source(stored, split, say=warn) for split in stored.splits}
        if "images" in prepared:
            return Splits(*split_by_class(prepared["images"], train_classes))
        return _separate(prepared)
    if not root:
        raise UserError(
            "config.data.root is empty; give the folder that holds one folder per class (or config.data.variant, the "
            "name of a prepared one)"
        )
    listed = is_table(expand(root))
    if image_root and not listed:
        raise UserError(f"config.data.image_root is for tables; config.data.root = {root} is none")
    found = table_splits(root, image_root, warn) if listed else scan_splits(root, warn)
    parts = {split: drop_unreadable(part, on_corrupt, warn) for split, part in found.items()}
    if "images" not in parts:
        if "query" in parts:
            # Whole classes may be missing from either part.
            query, gallery = _of_one_naming(parts["query"], parts["gallery"])
            return Splits(parts["train"], query, parts.get("validation"), gallery)
        return Splits(parts["train"], parts["test"], parts.get("validation"))
    everything = parts["images"]
    if len(everything.class_names) < 2:
        raise UserError(f"{expand(root)}: 1 class ({everything.class_names[0]}); metric learning needs at least 2")
    return Splits(*split_by_class(everything, train_classes))


class _Renamed(Subset):
    """A source labelled by the names of several."""

    def __init__(self, source: Source, names: list[str]):
        super().__init__(source, np.arange(len(source)))
        numbers = np.searchsorted(names, self.class_names).astype(np.int32)
        self.labels, self.class_names = numbers[self.labels], names
        if sets_of(self) is not None:
            mine = self.fields["labels"]
            self.fields["labels"] = np.where(mine < 0, -1, numbers[mine]).astype(np.int32)


def _of_one_naming(*parts: Source) -> list[Source]:
    """The sources relabelled by the union of their classes."""
    names = sorted(set().union(*(part.class_names for part in parts)))
    return [_Renamed(part, names) for part in parts]


def default_data_dir() -> str:
    """Default folder of prepared data sets: ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``."""
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")


def _dense(source: Source, classes: np.ndarray | None = None) -> Subset:
    return Subset(source, np.arange(len(source)), classes)


def _separate(parts: Mapping[str, Source]) -> Splits:
    """Splits with separate labels each; query and gallery share labels."""
    if "query" not in parts:
        return Splits(_dense(parts["train"]), _dense(parts["test"]))
    both = np.union1d(parts["query"].labels, parts["gallery"].labels)
    query, gallery = _dense(parts["query"], both), _dense(parts["gallery"], both)
    return Splits(_dense(parts["train"]), query, gallery=gallery)


def load_glyphs(*, data_dir: str = "", variant: str = "default", **_: object) -> Splits:
    """Loads the built-in characters; they are drawn on first use."""
    from idml_jax.data.glyphs import builder as glyphs

    builder = glyphs.prepare(data_dir or default_data_dir(), variant or "default")
    found = prepared_lib.Prepared(Path(builder.data_path), builder, True, None)
    say = lambda line: None
    train, test = (
        prepared_lib.source(found, split, field_keys=("ambiguity", "kind"), say=say) for split in ("train", "test")
    )
    return _separate({"train": train, "test": test})


def load_tfds(
    *,
    data_dir: str = "",
    variant: str = "",
    train_classes: float = 0.5,
    warn: Callable[[str], None] = print,
    **_: object,
) -> Splits:
    """Loads a tfds data set already prepared as array_record: all its splits joined, then split by class."""
    if not variant:
        raise UserError("config.data.variant is empty; give the tfds data set, e.g. cars196 or my_set:1.0.0")
    data_dir = data_dir or default_data_dir()
    name, _, version = variant.partition(":")
    home = expand(data_dir) / name
    folder = home / version if version else prepared_lib.version_folder(home)
    if folder is None or not (folder / "dataset_info.json").exists():
        raise UserError(f"tfds data set {variant!r} is not prepared as array_record under {data_dir}")
    found = prepared_lib.open_folder(folder)
    return Splits(
        *split_by_class(Joined([prepared_lib.source(found, s, say=warn) for s in found.splits]), train_classes)
    )


def load_benchmark(
    name: str, *, data_dir: str = "", seed: int = 0, warn: Callable[[str], None] = print, **_: object
) -> Splits:
    """Loads a benchmark with its protocol's splits, prepared by this package or by tfds.

    Args:
      name: key of ``protocol.BENCHMARKS``.
      data_dir: folder of data sets.
      seed: seed of the choice of images that replace a missing ImageNet validation split.
      warn: receives one line if the set is not complete.

    Raises:
      UserError: if the set is missing, or lacks a split.
    """
    data_dir, benchmark = data_dir or default_data_dir(), BENCHMARKS[name]
    found = prepared_lib.find(name, data_dir)
    wanted = ("train", "test") if benchmark.train_classes and not found.ours else tuple(benchmark.splits)
    keys = ("file_name",) if benchmark.group else ()
    opened = {s: prepared_lib.source(found, s, field_keys=keys, say=warn) for s in wanted if s in found.splits}
    for part in opened.values():
        _add_groups(part, benchmark.group)
    parts: dict[str, Source] = dict(opened)
    if benchmark.train_classes and not found.ours:
        # The official splits joined, then divided by class.
        whole = Joined([parts[s] for s in wanted if s in parts])
        bound, last = benchmark.train_classes, len(whole.class_names)
        parts = {"train": select_classes(whole, range(bound)), "test": select_classes(whole, range(bound, last))}
    missing = [s for s in benchmark.splits if s not in parts and not (name == "imagenet" and s == "validation")]
    if missing:
        raise UserError(f"{found.folder}: lacks the split {missing[0]!r} of {benchmark.title}")
    counts = {s: Count(len(p), len(np.unique(p.labels))) for s, p in parts.items()}
    if wrong := differences(name, counts):
        if found.complete:
            raise UserError(f"{found.folder}: {'; '.join(wrong)}; delete it and prepare it again")
        warn(f"{found.folder} is not the complete {benchmark.title}: {'; '.join(wrong)}")
    if not benchmark.shared_classes:
        return _separate(parts)
    if "validation" not in parts and "test" not in parts:
        warn(f"{found.folder} has no validation images; {_TRAIN_ONLY_SHARE:.0%} of the training images replace them")
        return Splits(*hold_out_images(parts["train"], _TRAIN_ONLY_SHARE, seed))
    return Splits(parts["train"], parts["test"] if "test" in parts else parts["validation"])


def _add_groups(source: TfdsSource, pattern: str) -> None:
    """Adds the cameras that the names of the files tell."""
    if pattern:
        names = [os.fsdecode(name).rsplit("/", 1)[-1] for name in source.fields.pop("file_name").tolist()]
        cameras = [re.search(pattern, name) for name in names]
        source.fields["group"] = np.asarray([camera[1] if camera else "" for camera in cameras])


def _benchmark_loader(name: str) -> Callable[..., Splits]:
    return lambda **options: load_benchmark(name, **options)


DATASETS: dict[str, Callable[..., Splits]] = {
    "folder": load_folder,
    "glyphs": load_glyphs,
    "tfds": load_tfds,
    **{name: _benchmark_loader(name) for name in BENCHMARKS},
}


def load_dataset(
    name: str,
    *,
    validation_classes: float = 0.0,
    validation_images: float = 0.0,
    on_small_class: str = "refuse",
    shared_classes: bool = False,
    seed: int = 0,
    warn: Callable[[str], None] = print,
    **options: object,
) -> Splits:
    """Loads a data set by name.

    Args:
      name: key of ``DATASETS``.
      validation_classes: share of the training classes to hold out for choosing settings.
      validation_images: share of each training class's images to hold out, for classification.
      on_small_class: see ``check_classes``.
      shared_classes: the test classes are the training classes (classification), for any data set.
      seed: seed of the choice of held-out classes or images.
      warn: receives one line per kind of thing that is left out.
      **options: ``root``, ``image_root``, ``data_dir``, ``variant``, ``train_classes``, ``on_corrupt``; each
        loader uses those it needs.

    Returns:
      The splits, with at least two classes each.

    Raises:
      UserError: for an unknown name (with the known ones) or unusable data.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r} (config.data.name); known: {', '.join(sorted(DATASETS))}")
    shared = shared_classes or (name in BENCHMARKS and BENCHMARKS[name].shared_classes)
    if shared and validation_classes:
        raise UserError(
            f"config.data.validation_classes: the test images of {name} show the training classes, so images are held "
            "out instead; use config.data.validation_images"
        )
    if validation_images and not shared:
        raise UserError(
            f"config.data.validation_images: the test classes of {name} are not the training classes, so classes are "
            "held out instead; use config.data.validation_classes"
        )
    tell, warn = warn, lambda line: tell(shown(line))
    splits = DATASETS[name](warn=warn, seed=seed, **options)
    _check_copies(splits, warn)
    if splits.validation is not None and (validation_classes or validation_images):
        field = "validation_classes" if validation_classes else "validation_images"
        raise UserError(f"config.data.{field}: the data has validation images of its own; leave it at 0")
    if shared:
        if not validation_images:
            return splits
        train, validation = hold_out_images(splits.train, validation_images, seed)
        return splits._replace(train=train, validation=validation)
    train = check_classes(splits.train, "training images", on_small_class, warn)
    # With a gallery, one query per class is enough.
    test = splits.test if splits.gallery else check_classes(splits.test, "test images", on_small_class, warn)
    if splits.gallery:
        _check_gallery(test, splits.gallery, warn)
    splits = splits._replace(train=train, test=test)
    if not validation_classes:
        return splits
    if sets_of(train) is not None:
        raise UserError(
            "config.data.validation_classes: images with several labels are not divided by class; mark validation "
            "images in the table (split = validation)"
        )
    train, validation = hold_out_classes(train, validation_classes, seed)
    return splits._replace(train=train, validation=validation)


def _check_copies(splits: Splits, warn: Callable[[str], None]) -> None:
    """Warns of parts that were made by copying another one."""
    pairs = (
        (splits.test, splits.train, "test images", "training images"),
        (splits.validation, splits.train, "validation images", "training images"),
        (splits.test if splits.gallery else None, splits.gallery, "queries", "gallery images"),
    )
    for new, known, what, other in pairs:
        if new is not None and known is not None and (line := copies_line(new, known, what, other)):
            warn(line)


def _check_gallery(query: Source, gallery: Source, warn: Callable[[str], None]) -> None:
    absent = np.setdiff1d(_present(query), _present(gallery))
    if len(absent):
        first = query.class_names[absent[0]]
        warn(f"{len(absent)} classes of the queries are not in the gallery and count as misses; the first: {first}")
    if len(_present(query)) < 2 or len(_present(gallery)) < 2:
        raise UserError("query and gallery need at least 2 classes each")


def _present(source: Source) -> np.ndarray:
    """The labels that images have."""
    labels = source.labels if (sets := sets_of(source)) is None else sets
    return np.unique(labels[labels >= 0])
