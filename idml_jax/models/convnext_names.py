"""Names of a ConvNeXt's tensors in transformers and in the authors' files, brought to timm's."""

import re
from collections.abc import Mapping

import numpy as np

_TRANSFORMERS = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
)
_AUTHORS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
)


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A ConvNeXt's tensors under timm's names; those of other networks, and timm's own, come back as they are.

    Args:
      tensors: by name, with PyTorch's order of axes: of transformers' ``ConvNextModel`` or
        ``ConvNextForImageClassification``, or of the authors' files.
    """
    named = dict(tensors)
    if any(name.startswith("convnext.encoder.stages.") for name in named):
        named = {name.removeprefix("convnext."): value for name, value in named.items()}
    if any(re.match(r"encoder\.stages\.\d+\.layers\.\d+\.dwconv\.", name) for name in named):
        rules = _TRANSFORMERS
    elif any(re.match(r"stages\.\d+\.\d+\.dwconv\.", name) for name in named):
        rules = _AUTHORS
    else:
        return dict(tensors)
    return {_renamed(name, rules): value for name, value in named.items()}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        name = re.sub(old, new, name)
    return name
