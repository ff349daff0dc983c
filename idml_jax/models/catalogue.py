"""Where the weights of a trunk come from: names in timm and transformers, image size, normalisation, pooling.

``CATALOGUE`` has a row for each trunk with published weights. ``for_timm`` and ``for_transformers`` find the trunk of a
published ``config.json``. The mean and deviation of a row are those of its best-known weights; a file that brings its
own (``pretrained_cfg`` of timm, ``preprocessor_config.json`` of transformers) knows better.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Channels = tuple[float, float, float]
IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LITE: tuple[Channels, Channels] = ((127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255))
OPENAI: tuple[Channels, Channels] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


@dataclass(frozen=True)
class Transformers:
    """What ``config.json`` of transformers says about a network; settings of the vision tower, where there are two.

    Attributes:
      model_type: of the model, or of its vision tower (``clip_vision_model``).
      hidden_size: width of a token.
      depth: number of blocks (``num_hidden_layers``).
      patch: side of a patch in pixels (``patch_size``).
      activation: of the network inside a block (``hidden_act``).
      registers: number of register tokens.
    """

    model_type: str
    hidden_size: int
    depth: int
    patch: int
    activation: str = "gelu"
    registers: int = 0


@dataclass(frozen=True)
class Entry:
    """The origin of a trunk's published weights.

    Attributes:
      timm: names of architectures in timm with the same tensors and the same function. ``architecture.tag`` stands for
        the weights with this tag alone, and takes precedence over an architecture without a tag.
      transformers: the same network in transformers; ``None`` if it has none.
      image_size: side of the images that the weights were made for, in pixels.
      mean: of the channels, of pixels between 0 and 1.
      std: standard deviation of the channels.
      pooling: recommended ``model.pooling``.
      layout: family of the tensors' names in timm: ``vit`` (timm's VisionTransformer), ``eva``, ``resnet``, ...
    """

    timm: tuple[str, ...]
    transformers: Transformers | None
    image_size: int
    mean: Channels
    std: Channels
    pooling: str
    layout: str


def _vit(timm: str, width: int, depth: int, patch: int, *more: str) -> Entry:
    names = (f"vit_{timm}_patch{patch}_224", f"vit_{timm}_patch{patch}_384", *more)
    return Entry(names, Transformers("vit", width, depth, patch), 224, *HALVES, "token", "vit")


def _dinov2(timm: str, width: int, depth: int, registers: int = 0) -> Entry:
    kind = "dinov2_with_registers" if registers else "dinov2"
    name = f"vit_{timm}_patch14_{'reg4_' if registers else ''}dinov2"
    there = Transformers(kind, width, depth, 14, registers=registers)
    return Entry((name,), there, 518, *IMAGENET, "token", "vit")


def _dinov3(timm: str, width: int, depth: int) -> Entry:
    names = (f"vit_{timm}_patch16_dinov3", f"vit_{timm}_patch16_dinov3_qkvb")
    return Entry(names, Transformers("dinov3_vit", width, depth, 16, registers=4), 256, *IMAGENET, "token", "eva")


def _clip(timm: str, width: int, depth: int, patch: int, *sizes: int) -> Entry:
    # OpenAI's weights are for the quick GELU, also where timm has them under a name without "quickgelu".
    names = [f"vit_{timm}_patch{patch}_clip_quickgelu_{size}" for size in sizes]
    names = (*names, *(f"vit_{timm}_patch{patch}_clip_{size}.openai" for size in sizes))
    there = Transformers("clip_vision_model", width, depth, patch, "quick_gelu")
    return Entry(names, there, 224, *OPENAI, "token", "vit")


def _openclip(timm: str, width: int, depth: int, patch: int, *sizes: int) -> Entry:
    there = Transformers("clip_vision_model", width, depth, patch, "gelu")
    usual = HALVES if timm == "large" else OPENAI  # of the weights from LAION-2B
    return Entry(tuple(f"vit_{timm}_patch{patch}_clip_{size}" for size in sizes), there, 224, *usual, "token", "vit")


def _siglip(timm: str, width: int, depth: int, patch: int, sizes: tuple[int, ...], native: int) -> Entry:
    names = tuple(f"vit_{timm}_patch{patch}_siglip_{size}" for size in sizes)
    there = Transformers("siglip_vision_model", width, depth, patch, "gelu_pytorch_tanh")
    return Entry(names, there, native, *HALVES, "token", "vit")


def _convolutional(name: str, layout: str, statistics: tuple[Channels, Channels] = IMAGENET, timm: str = "") -> Entry:
    return Entry((timm or name,), None, 224, *statistics, "avg", layout)


CATALOGUE: dict[str, Entry] = {
    **{name: _convolutional(name, "resnet") for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
    **{name: _convolutional(name, "convnext") for name in ("convnext_tiny", "convnext_small", "convnext_base")},
    "efficientnet_lite0": _convolutional("efficientnet_lite0", "efficientnet", LITE, "tf_efficientnet_lite0"),
    "vit_t16": _vit("tiny", 192, 12, 16, "deit_tiny_patch16_224"),
    "vit_s16": _vit("small", 384, 12, 16, "deit_small_patch16_224"),
    "vit_b16": _vit("base", 768, 12, 16, "deit_base_patch16_224", "deit_base_patch16_384"),
    "vit_l16": _vit("large", 1024, 24, 16),
    "vit_b32": _vit("base", 768, 12, 32),
    "vit_s14_dinov2": _dinov2("small", 384, 12),
    "vit_b14_dinov2": _dinov2("base", 768, 12),
    "vit_l14_dinov2": _dinov2("large", 1024, 24),
    "vit_s14_dinov2_reg": _dinov2("small", 384, 12, 4),
    "vit_b14_dinov2_reg": _dinov2("base", 768, 12, 4),
    "vit_l14_dinov2_reg": _dinov2("large", 1024, 24, 4),
    "vit_s16_dinov3": _dinov3("small", 384, 12),
    "vit_b16_dinov3": _dinov3("base", 768, 12),
    "vit_l16_dinov3": _dinov3("large", 1024, 24),
    "clip_vit_b32": _clip("base", 768, 12, 32, 224),
    "clip_vit_b16": _clip("base", 768, 12, 16, 224),
    "clip_vit_l14": _clip("large", 1024, 24, 14, 224, 336),
    "openclip_vit_b32": _openclip("base", 768, 12, 32, 224, 256, 384, 448),
    "openclip_vit_b16": _openclip("base", 768, 12, 16, 224, 384),
    "openclip_vit_l14": _openclip("large", 1024, 24, 14, 224, 336),
    "siglip_vit_b16": _siglip("base", 768, 12, 16, (224, 256, 384, 512), 224),
    "siglip_vit_l16": _siglip("large", 1024, 24, 16, (256, 384, 512), 256),
    # transformers calls the size 384, of which 27 patches of 14 pixels cover 378.
    "siglip_so400m14": _siglip("so400m", 1152, 27, 14, (224, 378, 384), 378),
}

# Architectures of timm whose tensors fit one of our networks by name and shape, and which are another function.
_OTHERS = {
    "resnetaa*": "averages before it strides, which the ResNets here do not",
    "resnetblur*": "blurs before it strides, which the ResNets here do not",
    "efficientnet_lite0": "pads its convolutions alike on all sides, which efficientnet_lite0 here does not; weights "
    "of timm/tf_efficientnet_lite0.in1k fit it",
}

# What a config.json of transformers leaves out because it is that class's default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {"hidden_act": "gelu"},
    "dinov2": {"hidden_act": "gelu"},
    "dinov2_with_registers": {"hidden_act": "gelu", "num_register_tokens": 4},
    "dinov3_vit": {"hidden_act": "gelu", "hidden_size": 384, "num_register_tokens": 0},
    "clip_vision_model": {"hidden_act": "quick_gelu", "patch_size": 32},
    "siglip_vision_model": {"hidden_act": "gelu_pytorch_tanh"},
}
# Blocks per stage and width of the first, of transformers' ConvNextModel.
_CONVNEXT = {
    ((3, 3, 9, 3), 96): "convnext_tiny", ((3, 3, 27, 3), 96): "convnext_small",
    ((3, 3, 27, 3), 128): "convnext_base",
}  # fmt: skip
# Models of two towers, by the type of the tower for images.
_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def another_function(architecture: str) -> str:
    """Why an architecture of timm computes something else than the network its tensors fit; empty if it does not."""
    return next((why for pattern, why in _OTHERS.items() if fnmatchcase(architecture, pattern)), "")


def for_timm(architecture: str, tag: str = "") -> str | None:
    """The trunk of an architecture of timm, as a key of ``CATALOGUE``; ``None`` if it is not among them.

    Args:
      architecture: for example ``vit_small_patch14_dinov2``.
      tag: of the weights (``lvd142m``); it decides where one architecture has weights for two activations.
    """
    for name in (f"{architecture}.{tag}", architecture):
        for key, entry in CATALOGUE.items():
            if name in entry.timm:
                return key
    return None


def for_transformers(config: Mapping[str, Any]) -> str | None:
    """The trunk of a ``config.json`` of transformers, as a key of ``CATALOGUE``; ``None`` if it is not among them."""
    kind = config.get("model_type")
    if kind == "convnext":
        depths, widths = config.get("depths") or (3, 3, 9, 3), config.get("hidden_sizes") or (96,)
        return _CONVNEXT.get((tuple(depths), widths[0]))
    if kind in _TOWERS:
        config, kind = config.get("vision_config") or {}, _TOWERS[str(kind)]
    there = {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "num_register_tokens": 0}
    there = {**there, **_DEFAULTS.get(str(kind), {}), **config}
    wanted = ("hidden_size", "num_hidden_layers", "patch_size", "hidden_act", "num_register_tokens")
    found = (kind, *(there.get(name) for name in wanted))
    for key, entry in CATALOGUE.items():
        own = entry.transformers
        if own and found == (own.model_type, own.hidden_size, own.depth, own.patch, own.activation, own.registers):
            return key
    return None
