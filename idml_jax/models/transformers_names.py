"""Tensors of vision transformers under other libraries' names, brought to timm's names and layout.

``canonical`` takes the tensors of a file as they are. It knows the names of transformers (``ViTModel``,
``Dinov2Model``, ``Dinov2WithRegistersModel``, ``DINOv3ViTModel``, ``CLIPVisionModel``, ``SiglipVisionModel`` and the
models that contain them) and of Meta's DINOv2; timm's own names pass. The names alone tell the families apart, so no
settings are needed.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Tensors = Mapping[str, np.ndarray]


class Canonical(NamedTuple):
    """Tensors under timm's names.

    Attributes:
      values: the tensors of the trunk; a projection to the space shared with texts is ``head.weight``.
      left_out: names, as in the file, of what is not part of the trunk: text tower, pooler, mask token.
      added: names of tensors of zeros that stand for biases that the file does without.
    """

    values: dict[str, np.ndarray]
    left_out: tuple[str, ...]
    added: tuple[str, ...]


# What a network is called inside of a larger one.
_PREFIXES = ("vision_model.", "vit.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.", "model.")
_NO_TRUNK = re.compile(
    r"text_model\.|text_projection|logit_(scale|bias)|pooler\.|classifier\."
    r"|mask_token$|embeddings\.(mask_token|position_ids)$"
)
_RENAMED = (
    (r"embeddings\.(cls_token|class_embedding)$", "cls_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.", "patch_embed.proj."),
    (r"(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention\.)?(query|q_proj|key|k_proj|value|v_proj)\.", r".attn.\2."),
    (r"\.self_attn\.(q_proj|k_proj|v_proj)\.", r".attn.\1."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.(output\.dense|mlp\.down_proj)\.", r"\1.mlp.fc2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(layernorm|post_layernorm)\.", "norm."),
    (r"^visual_projection\.", "head."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.attention\.in_proj_", "attn_pool.in."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_PARTS = {"query": "q", "q_proj": "q", "key": "k", "k_proj": "k", "value": "v", "v_proj": "v"}
_QKV = re.compile(r"^(.*\.attn)\.(query|q_proj|key|k_proj|value|v_proj)\.(weight|bias)$")


def canonical(tensors: Tensors) -> Canonical:
    """Tensors of a file under timm's names; those of another family of networks come back as they are.

    Args:
      tensors: by name, with PyTorch's order of axes.

    Returns:
      See ``Canonical``.
    """
    if _of_transformers(tensors):
        named, left_out = _renamed(tensors)
        values = _joined(named)
        if "pos_embed" not in values:  # DINOv3, with its rotary positions
            values = _as_eva(values)
    else:
        left_out = [name for name in tensors if name == "mask_token"] if "blocks.0.norm1.weight" in tensors else []
        values = {
            name.replace("register_tokens", "reg_token"): tensors[name] for name in tensors if name not in left_out
        }
    if "register_tokens" in tensors or any(name.endswith("embeddings.register_tokens") for name in tensors):
        values = _without_position_of_class(values)
    added = _zero_biases(values)
    return Canonical({**values, **added}, tuple(left_out), tuple(added))


def _of_transformers(tensors: Tensors) -> bool:
    return any("embeddings.patch_embedding" in name for name in tensors)


def _renamed(tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors under timm's names, but queries, keys and values still apart; and the names of those left out."""
    values, left_out = {}, []
    for name, value in tensors.items():
        short = name
        while prefix := next((p for p in _PREFIXES if short.startswith(p)), None):
            short = short.removeprefix(prefix)
        if _NO_TRUNK.match(short):
            left_out.append(name)
            continue
        for pattern, new in _RENAMED:
            short = re.sub(pattern, new, short)
        if short in ("cls_token", "pos_embed"):
            value = value.reshape(1, -1, value.shape[-1])
        values[short] = value
    return values, left_out


def _joined(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With ``attn.qkv`` for queries, keys and values, ``attn_pool.q`` and ``.kv`` for the pooling's."""
    values: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, value in named.items():
        if found := _QKV.match(name):
            parts.setdefault(f"{found[1]}.qkv.{found[3]}", {})[_PARTS[found[2]]] = value
        elif name.startswith("attn_pool.in."):
            leaf, width = name.removeprefix("attn_pool.in."), value.shape[0] // 3
            values[f"attn_pool.q.{leaf}"], values[f"attn_pool.kv.{leaf}"] = value[:width], value[width:]
        else:
            values[name] = value
    for name, of in parts.items():
        zero = np.zeros_like(next(iter(of.values())))
        values[name] = np.concatenate([of.get(part, zero) for part in "qkv"])
    return values


def _as_eva(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With timm's names for DINOv3: biases of queries and values, which has none of keys, and ``gamma_1``."""
    out: dict[str, np.ndarray] = {}
    for name, value in values.items():
        if name.endswith(".attn.qkv.bias"):
            begin, (query, key, worth) = name.removesuffix("qkv.bias"), np.split(value, 3)
            out[f"{begin}q_bias"], out[f"{begin}v_bias"] = query, worth
            if key.any():  # an unknown network: loading it will say that this is too much
                out[f"{begin}k_bias"] = key
        else:
            out[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = value
    return out


def _without_position_of_class(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the class token's position added to it once and for all, as timm keeps DINOv2 with registers."""
    if not {"cls_token", "pos_embed"} <= set(values):
        return values
    positions = values["pos_embed"]
    return {**values, "cls_token": values["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


def _zero_biases(values: Tensors) -> dict[str, np.ndarray]:
    """Biases of DINOv3's queries and values, which timm leaves out of the files where all of them are zero."""
    added = {}
    for name, value in values.items():
        begin = name.removesuffix("attn.qkv.weight")
        if begin == name or f"{begin}gamma_1" not in values or f"{begin}attn.qkv.bias" in values:
            continue
        for bias in ("q_bias", "v_bias"):
            if f"{begin}attn.{bias}" not in values:
                added[f"{begin}attn.{bias}"] = np.zeros(value.shape[0] // 3, value.dtype)
    return added
