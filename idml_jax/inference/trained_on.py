"""Finds the images of an index that the run behind it was trained on."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from idml_jax.data.copies import is_copy
from idml_jax.data.tables import is_table
from idml_jax.errors import UserError, warn
from idml_jax.inference.index import Index
from idml_jax.inference.own import existing_place
from idml_jax.runtime.files import first_line
from idml_jax.training import data_record
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import data_of

LOOKED_AT = 50  # images of an index that are compared with training images of their name, and so many of those


def training_images_in(index: Index) -> int:
    """The number of images of an index that are training images of the run that embedded it.

    They are the split ``train`` of that run, or its training images by their paths. Of another split, and where the
    images of the run have changed since it was started, they are those of the classes that it was trained on. 0 where
    the index does not say which files of which run its images are, and where the run's own images are no files.

    Raises:
      UserError: if the run, its images or those of the index are not at their places any more, or have changed so that
        the training images are not known; or if some of these are copies of training images in another place.
    """
    origin, run = str(index.about.get("images", "")), index.about.get("workdir")
    if origin == "split:train":
        return len(index)
    if not run:
        return 0
    split = origin.partition("split:")[2]
    if split and (found := _of_training_classes(index, split, Path(run))):
        return found
    paths = [name for name in index.files.tolist() if os.path.isabs(name)] if index.named else []
    if not paths:
        return 0
    config = workdir_lib.read(Path(run))
    if not config.data.root or (split and not is_table(config.data.root)):  # a folder has an image once
        return 0
    trained = _training_names(config, Path(run))
    known = set(_without_links(trained))
    found = sum(path in known for path in _without_links(paths))
    if not found and existing_place(paths[0]) is None and existing_place(paths[-1]) is None:
        raise UserError(f"{paths[0]}: no such file")
    if not found and (copies := _copies(paths, trained)):
        raise UserError(f"copies of training images in another place are among them, the first {copies[0]}")
    return found


def _of_training_classes(index: Index, split: str, run: Path) -> int:
    """The number of images of a split that are of classes which only the training images had when the run started."""
    recorded = data_record.classes_of(run)
    trained = set(recorded.get("train", ())) - {name for part in recorded if part != "train" for name in recorded[part]}
    if split not in recorded or not trained or index.class_names is None:
        return 0
    chosen = [label for label, name in enumerate(index.class_names) if str(name) in trained]
    labels = index.embedded.labels[:, None] if index.embedded.sets is None else index.embedded.sets
    return int(np.isin(labels, chosen).any(axis=1).sum())


def _training_names(config: ConfigDict, run: Path) -> list[str]:
    """Names of the images that a run was trained on."""
    splits = data_of(config, warn=lambda line: None)
    names = lambda source, rows: [source.name(row) for row in rows]
    try:
        data_record.check(splits, run, ("train",))
    except UserError as error:  # its classes are others now
        recorded = data_record.classes_of(run)
        trained = set(recorded.pop("train", ()))
        if not trained or any(trained.intersection(part) for part in recorded.values()):
            raise UserError("the run's images have changed since it was started") from error
        parts = [source for source in splits if source is not None]
        chosen = lambda source: [label for label, name in enumerate(source.class_names) if str(name) in trained]
        rows = [np.flatnonzero(np.isin(source.labels, chosen(source))) for source in parts]
        return [name for source, some in zip(parts, rows, strict=True) for name in names(source, some.tolist())]
    return names(splits.train, range(len(splits.train)))


def _copies(paths: list[str], trained: list[str]) -> list[str]:
    """Those of some paths whose file has the name and content of a training image."""
    named: dict[str, list[str]] = {}
    for path in trained:
        named.setdefault(os.path.basename(path), []).append(path)
    some = [paths[place] for place in np.linspace(0, len(paths) - 1, min(len(paths), LOOKED_AT)).astype(int)]
    others = lambda path: named.get(os.path.basename(path), ())[:LOOKED_AT]
    return [path for path in some if any(is_copy(path, other) for other in others(path))]


def _without_links(paths: Iterable[str]) -> Iterator[str]:
    """The paths without links. A folder is resolved once: most images share theirs with many others."""
    folders: dict[str, str] = {}
    for path in paths:
        if os.path.islink(path):
            yield os.path.realpath(path)
            continue
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        yield os.path.join(folders[folder], name)


def warn_of_measured_training_images(index: Index, named: str) -> None:
    """Warns if images whose metrics are computed are training images beside others, or may be; arguments as below."""
    count = _counted(index, named, "metrics of such images are not those of new classes")
    if 0 < count < len(index):
        warn(
            f"{named}: {count:,} of {len(index):,} images are training images of the run, so metrics of all are "
            "not those of new classes; the test images alone: embed --split=test"
        )


def warn_of_training_images(index: Index, named: str) -> None:
    """Warns if a confidence is fitted on images that the network was trained on, or if that cannot be checked.

    Args:
      index: the images that it is fitted on.
      named: their name in the message.
    """
    count = _counted(index, named, "with such images answers look surer than they are")
    if count:
        warn(
            f"{named}: {count:,} of {len(index):,} images are training images of the run, where the network errs less "
            "than on new ones; so answers look surer than they are. Fit the confidence on classes that it was not "
            "trained on (held_out)"
        )


def warn_of_audited_training_images(index: Index, named: str) -> None:
    """Warns if the labels of images are audited that the network learned, or may have; arguments as above."""
    matters = "a network finds few mistakes among labels that it has learned"
    count = _counted(index, named, matters)
    if count:
        warn(
            f"{named}: {count:,} of {len(index):,} images are training images of the run, and {matters}; use one that "
            "was trained on other classes"
        )


def _counted(index: Index, named: str, matters: str) -> int:
    """``training_images_in``; 0 with a warning that says why it matters where that cannot be checked."""
    try:
        return training_images_in(index)
    except (UserError, OSError) as error:
        warn(f"{named}: whether it holds training images of the run cannot be checked ({first_line(error)}); {matters}")
        return 0
