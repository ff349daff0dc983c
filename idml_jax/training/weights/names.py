"""Names of tensors in other libraries, brought to timm's: the one place that knows all translations."""

from collections.abc import Mapping

import numpy as np

from idml_jax.models import convnext_names, efficientnet_names, transformers_names
from idml_jax.models.transformers_names import Canonical

__all__ = ["Canonical", "canonical"]


def canonical(tensors: Mapping[str, np.ndarray]) -> Canonical:
    """Tensors of a file under timm's names; those of an unknown network come back as they are."""
    return transformers_names.canonical(efficientnet_names.canonical(convnext_names.canonical(tensors)))
