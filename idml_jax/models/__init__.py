"""Networks: a trunk, global pooling, and the two heads of an introspective embedding."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models import convnet, convnext, efficientnet, pyramidnet, resnet, vit
from idml_jax.models.heads import ClassifierHead, Heads, init_proxies
from idml_jax.models.layers import GeM, pool_global

__all__ = ["MODELS", "EmbeddingModel", "create_classifier", "create_model", "init_proxies"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet.ResNet18,
    "resnet34": resnet.ResNet34,
    "resnet50": resnet.ResNet50,
    "resnet101": resnet.ResNet101,
    "resnet152": resnet.ResNet152,
    "resnet50_v1": resnet.ResNet50V1,
    "resnet101_v1": resnet.ResNet101V1,
    "resnet152_v1": resnet.ResNet152V1,
    "resnet18_small": partial(resnet.ResNet18, stem="small"),
    "resnet50_small": partial(resnet.ResNet50, stem="small"),
    "resnet10_small": resnet.ResNet10Small,
    "cifar_resnet20": resnet.CifarResNet20,
    "cifar_resnet32": resnet.CifarResNet32,
    "cifar_resnet56": resnet.CifarResNet56,
    "cifar_resnet110": resnet.CifarResNet110,
    "pyramidnet200": pyramidnet.PyramidNet200,
    "pyramidnet110": pyramidnet.PyramidNet110,
    **vit.TRUNKS,
    "convnext_tiny": convnext.ConvNeXtTiny,
    "convnext_small": convnext.ConvNeXtSmall,
    "convnext_base": convnext.ConvNeXtBase,
    "efficientnet_lite0": efficientnet.EfficientNetLite0,
    "convnet4": convnet.ConvNet,
    "convnet_tiny": convnet._ConvNetTiny,
    "resnet_tiny": resnet._ResNetTiny,
    "pyramidnet_tiny": pyramidnet._PyramidNetTiny,
    "convnext_toy": convnext._ConvNeXtToy,
    "efficientnet_toy": efficientnet._EfficientNetToy,
}

# Parts of the names of networks that are for tests alone.
_FOR_TESTS = ("resnet_tiny", "pyramidnet_tiny", "vit_tiny", "_toy")

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Poolings that are the trunk's own, and what a trunk needs for them.
VECTORS = {"token": "a class token", "mean_tokens": "tokens", "projection": "a space shared with texts"}


def is_for_tests(name: str) -> bool:
    """Whether a key of ``MODELS`` is of a network for tests."""
    return any(part in name for part in _FOR_TESTS)


def known_models() -> str:
    """The keys of ``MODELS`` for messages, without those for tests."""
    return ", ".join(sorted(name for name in MODELS if not is_for_tests(name)))


class EmbeddingModel(nn.Module):
    """Network from images to embeddings; returns all outputs, and jit removes unused ones.

    The parameters have two top-level entries, ``trunk`` and ``heads``, which are also the optimizer's groups.

    A trunk takes ``frozen_statistics`` and ``dtype``. It may also have ``vectors``, names of poolings of its own, and
    ``output``, which selects one of them instead of the map; ``remat`` and ``looped``; ``has_statistics``, false if
    without BatchNorm; and ``check_images``.

    Attributes:
      trunk: network from images to feature maps.
      heads: network from pooled features to embeddings.
      pooling: see ``pool_global``; ``gem``, whose power is a parameter of the trunk; other names are of vectors that
        the trunk itself returns, such as ``token``.
    """

    trunk: nn.Module
    heads: nn.Module
    pooling: str = "avg_max"

    def setup(self) -> None:
        if self.pooling == "gem":
            self.pool = GeM()
            # Its power belongs to the trunk: where features are computed, only the parameters of the trunk are given.
            nn.share_scope(self.pool, self.trunk)

    @property
    def independent_rows(self) -> bool:
        """Whether an image's features in training do not depend on the rest of the batch."""
        return self.trunk.frozen_statistics or not getattr(self.trunk, "has_statistics", True)

    @property
    def looped(self) -> "EmbeddingModel":
        """A copy for use inside a compiled loop; see ``layers.Conv``."""
        return self.clone(trunk=self.trunk.clone(looped=True)) if hasattr(self.trunk, "looped") else self

    def check_images(self, height: int, width: int) -> None:
        """Raises ``ValueError`` if the trunk cannot process images of this size."""
        getattr(self.trunk, "check_images", lambda height, width: None)(height, width)

    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> dict[str, Float[Array, "n ..."]]:
        """``features`` [n, f] and the heads' outputs (``semantic``, ``uncertainty``, ``semantic_norm``)."""
        features = self.features(images, train)
        return {"features": features, **self.heads(features)}

    def features(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n f"]:
        """Pooled features of normalised images."""
        maps = self.trunk(images, train=train)
        if self.pooling in VECTORS:
            return maps.astype(jnp.float32)
        pooled = self.pool(maps) if self.pooling == "gem" else pool_global(maps, self.pooling)
        return self.trunk.finish(pooled) if hasattr(self.trunk, "finish") else pooled

    def embed(self, features: Float[Array, "n f"]) -> dict[str, Float[Array, "n ..."]]:
        """Embeddings from pooled features: the heads only."""
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
    remat: bool = False,
) -> EmbeddingModel:
    """Creates a trunk by name with the two heads.

    Args:
      name: key of ``MODELS``.
      embedding_dim: d of the semantic embedding.
      uncertainty_dim: k of the uncertainty embedding.
      uncertainty_head: see ``Heads``.
      uncertainty_hidden: see ``Heads``.
      uncertainty_scale: see ``Heads``.
      pooling: ``avg``, ``max``, ``avg_max`` or ``gem`` (learned power) of the feature map; of a vision transformer also
        ``token`` (the class token, or what SigLIP's attention reads from the patches) and ``mean_tokens`` (mean of
        class token and patches), and of CLIP ``projection`` (the class token in the space shared with texts).
      frozen_statistics: BatchNorm uses its running statistics in training too.
      dtype: ``float32`` or ``bfloat16``, of the trunk; heads are always float32.
      remat: recompute activations inside a block for the gradient instead of keeping them.

    Returns:
      The model; ``model.init(key, images)`` gives its variables.

    Raises:
      ValueError: for an unknown name or dtype, with the known ones, and for an option that the trunk does not have.
    """
    trunk = _create_trunk(name, pooling, frozen_statistics, dtype, remat)
    heads = Heads(embedding_dim, uncertainty_dim, uncertainty_head, uncertainty_hidden, uncertainty_scale)
    return EmbeddingModel(trunk, heads, pooling)


def create_classifier(
    name: str,
    *,
    num_classes: int,
    uncertainty_dim: int = 512,
    uncertainty_head: str = "linear",
    uncertainty_hidden: int = 128,
    uncertainty_scale: float = 1.0,
    temperature: float = 5.0,
    pooling: str = "avg",
    frozen_statistics: bool = False,
    dtype: str = "float32",
    remat: bool = False,
) -> EmbeddingModel:
    """Creates a trunk by name with an introspective classifier; see ``ClassifierHead``.

    Args:
      name: key of ``MODELS``.
      num_classes: number of classes.
      uncertainty_dim: k of the uncertainty embedding (the paper: 512 on ImageNet, 128 on CIFAR).
      uncertainty_head: see ``ClassifierHead``.
      uncertainty_hidden: see ``ClassifierHead``.
      uncertainty_scale: see ``ClassifierHead``.
      temperature: tau of the introspective metric.
      pooling: see ``create_model``.
      frozen_statistics: see ``create_model``.
      dtype: see ``create_model``.
      remat: see ``create_model``.

    Returns:
      The model, whose trunk has the parameters of ``create_model``'s.

    Raises:
      ValueError: as ``create_model``.
    """
    trunk = _create_trunk(name, pooling, frozen_statistics, dtype, remat)
    heads = ClassifierHead(
        num_classes, uncertainty_dim, uncertainty_head, uncertainty_hidden, uncertainty_scale, temperature
    )
    return EmbeddingModel(trunk, heads, pooling)


def _create_trunk(name: str, pooling: str, frozen_statistics: bool, dtype: str, remat: bool) -> nn.Module:
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {known_models()}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    trunk = MODELS[name](frozen_statistics=frozen_statistics, dtype=DTYPES[dtype])
    if pooling in VECTORS:
        if pooling not in getattr(trunk, "vectors", ()):
            raise ValueError(f"pooling {pooling!r} needs {VECTORS[pooling]}, which {name} does not have")
        trunk = trunk.clone(output=pooling)
    if pooling == "gem" and getattr(trunk, "signed_maps", False):
        raise ValueError(
            f"pooling 'gem' takes powers of the feature maps, and those of {name} may be negative; "
            "use avg, max or avg_max"
        )
    if remat:
        if not hasattr(trunk, "remat"):
            raise ValueError(f"remat: {name} has no blocks to compute again")
        trunk = trunk.clone(remat=True)
    return trunk
