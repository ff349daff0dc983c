"""Networks: a trunk, global pooling, and the two heads of an introspective embedding."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models import convnet, resnet
from idml_jax.models.heads import Heads, init_proxies
from idml_jax.models.layers import pool_global

__all__ = ["MODELS", "EmbeddingModel", "create_model", "init_proxies"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
    "resnet18_small": partial(resnet.ResNet18, stem="small"),
    "resnet10_small": resnet.ResNet10Small,
    "convnet4": convnet.ConvNet,
    "resnet_tiny": resnet._ResNetTiny,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class EmbeddingModel(nn.Module):
    """Images to embeddings; returns everything it computes, and jit prunes what nobody reads.

    The parameters have two top-level entries, ``trunk`` and ``heads``, which are also the optimizer's groups.

    Attributes:
      trunk: network from images to feature maps.
      heads: network from pooled features to embeddings.
      pooling: see ``pool_global``.
    """

    trunk: nn.Module
    heads: nn.Module
    pooling: str = "avg_max"

    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> dict[str, Array]:
        """``features`` [n, f] and the heads' outputs (``semantic``, ``uncertainty``, ``semantic_norm``)."""
        features = self.features(images, train)
        return {"features": features, **self.heads(features)}

    def features(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n f"]:
        """Pooled features of normalised images."""
        return pool_global(self.trunk(images, train=train), self.pooling)

    def embed(self, features: Float[Array, "n f"]) -> dict[str, Array]:
        """The heads alone."""
        return {"features": features, **self.heads(features)}


def create_model(
    name: str,
    *,
    embedding_dim: int = 512,
    uncertainty_dim: int = 512,
    uncertainty_head: str = "mlp",
    uncertainty_hidden: int = 128,
    uncertainty_scale: float = 1.0,
    pooling: str = "avg_max",
    frozen_statistics: bool = False,
    dtype: str = "float32",
) -> EmbeddingModel:
    """A trunk by name with the two heads.

    Args:
      name: key of ``MODELS``.
      embedding_dim: d of the semantic embedding.
      uncertainty_dim: k of the uncertainty embedding.
      uncertainty_head: see ``Heads``.
      uncertainty_hidden: see ``Heads``.
      uncertainty_scale: see ``Heads``.
      pooling: ``avg``, ``max`` or ``avg_max``.
      frozen_statistics: BatchNorm uses its running statistics in training too.
      dtype: ``float32`` or ``bfloat16``, of the trunk; heads are always float32.

    Returns:
      The model; ``model.init(key, images)`` gives its variables.

    Raises:
      ValueError: for an unknown name or dtype, with the known ones.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    trunk = MODELS[name](frozen_statistics=frozen_statistics, dtype=DTYPES[dtype])
    heads = Heads(embedding_dim, uncertainty_dim, uncertainty_head, uncertainty_hidden, uncertainty_scale)
    return EmbeddingModel(trunk, heads, pooling)
