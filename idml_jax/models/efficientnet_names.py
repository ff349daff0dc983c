"""Names of an EfficientNet-Lite0's tensors in ``efficientnet_lite_pytorch``, brought to timm's."""

from collections.abc import Mapping

import numpy as np

from idml_jax.models.efficientnet import LITE0

_OUTSIDE = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip
# Parts of the first block, which does not expand, and of the others.
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an EfficientNet-Lite0 under timm's names; those of other networks come back as they are.

    Args:
      tensors: by name, with PyTorch's order of axes. ``efficientnet_lite_pytorch`` counts the blocks through.
    """
    places = [f"{stage}.{index}" for stage, size in enumerate(LITE0) for index in range(size.depth)]
    last = f"_blocks.{len(places) - 1}._project_conv.weight"
    # A larger EfficientNet, or one with squeeze-and-excitation, has other blocks.
    if last not in tensors or f"_blocks.{len(places)}._project_conv.weight" in tensors:
        return dict(tensors)
    return {_renamed(name, places): value for name, value in tensors.items()}


def _renamed(name: str, places: list[str]) -> str:
    head, *rest = name.split(".")
    if head != "_blocks":
        return ".".join([_OUTSIDE.get(head, head), *rest])
    block, part, *leaf = rest
    place = places[int(block)]
    parts = _INVERTED if int(block) else _SEPARABLE
    return ".".join(["blocks", place, parts.get(part, part), *leaf])
