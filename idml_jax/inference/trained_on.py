"""Finds the images of an index that the run behind it was trained on."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from idml_jax.data.copies import is_copy
from idml_jax.errors import UserError, warn
from idml_jax.inference.index import Index
from idml_jax.inference.own import existing_place
from idml_jax.runtime.files import first_line
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import data_of

LOOKED_AT = 50  # images of an index that are compared with training images of their name, and so many of those


def training_images_in(index: Index) -> int:
    """The number of images of an index that are training images of the run that embedded it.

    They are the split ``train`` of that run, or its training images by their paths. 0 where the index does not say
    which files of which run its images are, and where the run's own images are no files.

    Raises:
      UserError: if the run, its images or those of the index are not at their places any more, or if some of these are
        copies of training images in another place.
    """
    origin, run = str(index.about.get("images", "")), index.about.get("workdir")
    if origin.startswith("split:"):
        return len(index) if origin == "split:train" else 0
    paths = [name for name in index.files.tolist() if os.path.isabs(name)] if index.named else []
    if not (paths and run):
        return 0
    config = workdir_lib.read(Path(run))
    if not config.data.root:
        return 0
    train = data_of(config, warn=lambda line: None).train
    trained = [train.name(record) for record in range(len(train))]
    known = set(_without_links(trained))
    found = sum(path in known for path in _without_links(paths))
    if not found and existing_place(paths[0]) is None and existing_place(paths[-1]) is None:
        raise UserError(f"{paths[0]}: no such file")
    if not found and (copies := _copies(paths, trained)):
        raise UserError(f"copies of training images in another place are among them, the first {copies[0]}")
    return found


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


def _counted(index: Index, named: str, matters: str) -> int:
    """``training_images_in``; 0 with a warning that says why it matters where that cannot be checked."""
    try:
        return training_images_in(index)
    except (UserError, OSError) as error:
        warn(f"{named}: whether it holds training images of the run cannot be checked ({first_line(error)}); {matters}")
        return 0
