"""Finds the images of an index that the run behind it was trained on."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from idml_jax.errors import UserError, warn
from idml_jax.inference.index import Index
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import data_of


def training_images_in(index: Index) -> int:
    """The number of images of an index that are training images of the run that embedded it.

    They are the split ``train`` of that run, or its training images by their paths. 0 where nothing tells: the run or
    its images are elsewhere now, or are no files.
    """
    origin, run = str(index.about.get("images", "")), index.about.get("workdir")
    if origin.startswith("split:"):
        return len(index) if origin == "split:train" else 0
    paths = [name for name in index.files.tolist() if os.path.isabs(name)] if index.named else []
    if not (paths and run):
        return 0
    try:
        config = workdir_lib.read(Path(run))
        if not config.data.root:
            return 0
        train = data_of(config, warn=lambda line: None).train
    except (UserError, OSError):
        return 0
    known = set(_without_links(train.name(record) for record in range(len(train))))
    return sum(path in known for path in _without_links(paths))


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


def warn_of_training_images(index: Index, named: str) -> None:
    """Warns if a confidence is fitted on images that the network was trained on.

    Args:
      index: the images that it is fitted on.
      named: their name in the message.
    """
    count = training_images_in(index)
    if count:
        warn(
            f"{named}: {count:,} of {len(index):,} images are training images of the run, where the network errs less "
            "than on new ones; so answers look surer than they are. Fit the confidence on classes that it was not "
            "trained on (held_out)"
        )
