"""Names of tensors in other libraries, brought to timm's: the one place that knows all translations."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Canonical(NamedTuple):
    """Tensors under timm's names.

    Attributes:
      values: the tensors.
      left_out: names, as in the file, of what is not part of a trunk.
      added: names of tensors of zeros that stand for biases that the file does without.
    """

    values: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


def canonical(tensors: Mapping[str, np.ndarray]) -> Canonical:
    """Tensors of a file under timm's names; those of an unknown network come back as they are."""
    return Canonical(dict(tensors))
