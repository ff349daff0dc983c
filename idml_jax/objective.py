"""From embeddings and labels to one loss: which matrix a loss reads, and against what."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idml_jax import ism
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.losses import LOSSES, pairs_from_labels
from idml_jax.models import init_proxies

ISM_VARIANTS = ("relative", "absolute", "released")


@dataclass(frozen=True)
class Objective:
    """A loss, plain or introspective, with the parameters it learns. Hashable: a static argument of the train step.

    Attributes:
      loss: key of ``LOSSES``.
      options: the loss's own settings as sorted pairs.
      introspective: read the matrix from ISM; plain otherwise.
      variant: ``relative``, ``absolute`` or ``released`` (proxy_anchor only).
      temperature: tau of ISM.
      num_classes: training classes, one proxy each.
      dim: width of the semantic embedding.
    """

    loss: str
    options: tuple[tuple[str, Any], ...]
    introspective: bool
    variant: str
    temperature: float
    num_classes: int
    dim: int

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"unknown loss {self.loss!r} (config.loss.name); known: {', '.join(sorted(LOSSES))}")
        if self.variant not in ISM_VARIANTS:
            raise UserError(f"config.ism.variant = {self.variant!r}; known: {', '.join(ISM_VARIANTS)}")
        if self.variant == "released" and self.introspective and self.loss != "proxy_anchor":
            raise UserError(f"config.ism.variant = 'released' exists for proxy_anchor only, not for {self.loss}")
        if not self.temperature > 0:
            raise UserError(f"config.ism.temperature = {self.temperature} must be above 0")

    def init(self, key: Array) -> dict[str, Array]:
        """The loss's own parameters: ``proxies`` [classes, dim] where the loss has them."""
        if LOSSES[self.loss].references == "proxies":
            return {"proxies": init_proxies(key, self.num_classes, self.dim)}
        return {}

    def matrix(self, embedding: Embedding, references: Embedding | None, reads: str) -> Float[Array, "n m"]:
        """Distances or similarities of the batch to the references, introspective or plain."""
        if self.introspective and self.variant == "released":
            return ism.released_similarity(embedding, references.semantic)
        if references is not None:
            # Proxies are compared by direction, like the embeddings; and they are certain.
            references = Embedding(ism.l2_normalize(references.semantic), None)
        if not self.introspective:
            embedding = Embedding(embedding.semantic, None)
        settings = {"temperature": self.temperature, "relative": self.variant == "relative"}
        if reads == "similarity":
            return ism.introspective_similarity(embedding, references, **settings)
        return ism.introspective_distance(embedding, references, **settings)

    def __call__(
        self, params: dict[str, Array], embedding: Embedding, labels: Int[Array, "n"]
    ) -> Float[Array, ""]:
        """The loss of a batch.

        Args:
          params: as ``init`` gives.
          embedding: ``n`` embeddings.
          labels: ``[n]`` in ``[0, num_classes)``.

        Returns:
          The loss, a scalar.
        """
        spec = LOSSES[self.loss]
        if spec.references == "proxies":
            references = Embedding(params["proxies"])
            pairs = pairs_from_labels(labels, jnp.arange(self.num_classes))
        else:
            references, pairs = None, pairs_from_labels(labels)
        return spec.function(self.matrix(embedding, references, spec.reads), pairs, **dict(self.options))
