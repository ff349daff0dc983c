"""The content of weights as numpy arrays, and what is known about them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Named = dict[str, np.ndarray]

# Keys under which training scripts store the tensors, in the order they are tried.
CONTAINERS = ("model_state_dict", "state_dict", "teacher", "model")
# Prefixes of wrappers: DataParallel; a network that is an attribute (published IDML and ProxyAnchor code); DINO.
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
CLASSIFIERS = ("fc.", "head.", "classifier.")
# Of the trunk, although named like a classifier: the last LayerNorm of a ConvNeXt.
NO_CLASSIFIERS = ("head.norm.",)


@dataclass(frozen=True)
class Native:
    """The settings that weights were made with, as far as their files tell; 0 or empty where they do not.

    Attributes:
      network: key of ``MODELS``; empty if this package has no such network.
      called: the network's name in the file, for messages.
      image_size: side of the images in pixels.
      resize: shorter side before the central crop of a test image, in pixels.
      mean: of the channels, of pixels between 0 and 1.
      std: standard deviation of the channels.
      pooling: value of ``model.pooling``.
      told_by: the file that says so.
    """

    network: str = ""
    called: str = ""
    image_size: int = 0
    resize: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    pooling: str = ""
    told_by: str = ""


class Tensors(NamedTuple):
    """The content of weights, with the file's names.

    Attributes:
      values: tensors, without classifiers and counters.
      left_out: names of the tensors left out.
      torch: whether names and axes are PyTorch's; otherwise they are this package's.
      network: key of ``MODELS`` named by the file's metadata, its settings or the run's; empty if unknown.
      containers: every dictionary of tensors in the file, complete, by its place in it (empty: the file itself).
      native: the settings that the weights were made with, if a file says so.
      name: what the user called them, with the revision if there is one, for messages.
    """

    values: Named
    left_out: tuple[str, ...]
    torch: bool
    network: str = ""
    containers: Mapping[str, Named] = {}
    native: Native = Native()
    name: str = ""


def without_prefixes(named: Named) -> Named:
    """The tensors without the prefixes of wrappers that all names share."""
    while True:
        prefix = next((p for p in PREFIXES if named and all(name.startswith(p) for name in named)), None)
        if prefix is None:
            return named
        named = {name.removeprefix(prefix): value for name, value in named.items()}


def is_classifier(name: str) -> bool:
    """Whether a tensor belongs to a classifier, by its name in timm or torchvision."""
    return name.startswith(CLASSIFIERS) and not name.startswith(NO_CLASSIFIERS)


def is_counter(name: str) -> bool:
    """Whether a tensor is BatchNorm's number of batches, which nothing here needs."""
    return name.endswith("num_batches_tracked")
