"""From embeddings and labels to one loss: which matrix a loss reads, and against what."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from idml_jax import ism, losses
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.losses import LOSSES, memory
from idml_jax.losses import auxiliary as difficulty
from idml_jax.models import init_proxies
from idml_jax.runtime import sharding
from idml_jax.training.criterion import Criterion
from idml_jax.training.tasks.embedding_loss import embedding_loss

ISM_VARIANTS = ("relative", "absolute", "released")
LEARNED = ("none", "shared", "per_class")


@dataclass(frozen=True)
class Objective(Criterion):
    """A loss, plain or introspective, with the parameters it learns. Hashable: a static argument of the train step.

    Attributes:
      loss: key of ``LOSSES``.
      options: the loss's own settings as sorted pairs.
      introspective: read the matrix from ISM; plain otherwise.
      variant: ``relative``, ``absolute`` or ``released`` (proxy_anchor only).
      temperature: tau of ISM.
      num_classes: training classes, one proxy each.
      dim: d, width of the semantic embedding.
      uncertainty_dim: k, width of the uncertainty embedding.
      learned: whether the loss's learnable numbers (the margin loss's beta) are learned: ``none``, ``shared`` by all
        classes or ``per_class``.
      memory_size: embeddings in the cross-batch memory; 0: none.
      memory_warmup: steps before the memory is used.
      ranking: weight of the loss by which the uncertainty learns to order images by how hard they are.
      prior: weight of the pull of the length of the uncertainty embedding towards 1.
      mesh: devices over which the proxies, and the matrix along them, are split; ``None``: every device has them all.
    """

    loss: str
    options: tuple[tuple[str, Any], ...]
    introspective: bool
    variant: str
    temperature: float
    num_classes: int
    dim: int
    uncertainty_dim: int
    learned: str = "none"
    memory_size: int = 0
    memory_warmup: int = 0
    ranking: float = 0.0
    prior: float = 0.0
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"unknown loss {self.loss!r} (config.loss.name); known: {', '.join(sorted(LOSSES))}")
        if self.variant not in ISM_VARIANTS:
            raise UserError(f"config.ism.variant = {self.variant!r}; known: {', '.join(ISM_VARIANTS)}")
        if self.variant == "released" and self.introspective and self.loss != "proxy_anchor":
            raise UserError(f"config.ism.variant = 'released' exists for proxy_anchor only, not for {self.loss}")
        if not self.temperature > 0:
            raise UserError(f"config.ism.temperature = {self.temperature} must be above 0")
        if self.learned not in LEARNED:
            raise UserError(f"config.loss.learned = {self.learned!r}; known: {', '.join(LEARNED)}")
        if self.learned != "none" and not self.spec.parameters:
            able = ", ".join(name for name, spec in LOSSES.items() if spec.parameters)
            raise UserError(f"config.loss.learned: {self.loss} has nothing to learn; these do: {able}")
        if self.memory_size and self.spec.references != "batch":
            raise UserError(f"config.memory.size: {self.loss} compares with proxies; a memory is for losses on pairs")

    @property
    def spec(self) -> losses.LossSpec:
        """How the loss is fed."""
        return LOSSES[self.loss]

    @property
    def split(self) -> tuple[str, ...]:
        """Groups of parameters that are split over devices by rows."""
        return () if self.mesh is None else ("proxies",)

    @property
    def proxy_rows(self) -> int:
        """Rows of the table of proxies; where it is split the last ones may be padding, zeros that stay zeros."""
        return self.num_classes if self.mesh is None else sharding.padded_rows(self.num_classes)

    def batch_loss(self, *arguments: Any) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
        """The loss of a batch with Mixup; see ``embedding_loss``."""
        return embedding_loss(*arguments)

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """The loss's own groups of parameters: ``proxies`` [rows, dim] and ``loss``, its learned numbers, if any."""
        params: dict[str, Any] = {}
        if self.spec.references == "proxies":
            params["proxies"] = init_proxies(key, self.num_classes, self.dim, self.proxy_rows)
        if self.learned != "none":
            start = losses.init_parameters(self.spec, self.num_classes if self.learned == "per_class" else None)
            # A setting of that name is where it starts.
            params["loss"] = {k: jnp.full_like(v, dict(self.options).get(k, v)) for k, v in start.items()}
        return params

    def init_memory(self) -> memory.Memory | tuple[()]:
        """An empty cross-batch memory, ``()`` where there is none."""
        if not self.memory_size:
            return ()
        return memory.create(self.memory_size, self.dim, self.uncertainty_dim if self.introspective else None)

    def remember(
        self, store: memory.Memory | tuple[()], embedding: Embedding, labels: Int[Array, "n"]
    ) -> memory.Memory | tuple[()]:
        """The memory with a batch in it, to be called after its loss."""
        return memory.enqueue(cast(memory.Memory, store), embedding, labels) if self.memory_size else store

    def matrix(self, embedding: Embedding, references: Embedding | None) -> Float[Array, "n m"]:
        """Distances or similarities of the batch to the references (``None``: itself), introspective or plain."""
        if self.introspective and self.variant == "released":
            assert references is not None  # that form is of proxies
            return ism.released_similarity(embedding, references.semantic)
        if not self.introspective:
            embedding = Embedding(embedding.semantic, None)
            references = None if references is None else Embedding(references.semantic, None)
        settings: dict[str, Any] = {"temperature": self.temperature, "relative": self.variant == "relative"}
        if self.spec.reads == "similarity":
            return ism.introspective_similarity(embedding, references, **settings)
        return ism.introspective_distance(embedding, references, **settings)

    def __call__(
        self,
        params: dict[str, Any],
        embedding: Embedding,
        labels: Int[Array, "n"],
        *,
        key: PRNGKeyArray | None = None,
        store: memory.Memory | tuple[()] = (),
        step: Int[Array, ""] | int = 0,
    ) -> Float[Array, ""]:
        """The loss of a batch.

        Args:
          params: holds what ``init`` gives.
          embedding: ``n`` embeddings.
          labels: ``[n]`` in ``[0, num_classes)``.
          key: for losses that draw at random.
          store: the cross-batch memory.
          step: of training, for the memory's warm-up.

        Returns:
          The loss, a scalar.
        """
        if self.spec.references == "proxies":
            proxies, embedding, pairs = self._against_proxies(params, embedding, labels)
            # Proxies are certain, and compared by direction like the embeddings, except in the released code.
            raw = self.introspective and self.variant == "released"
            references = Embedding(proxies if raw else ism.l2_normalize(proxies), None)
        elif self.memory_size:
            kept = cast(memory.Memory, store)
            references = memory.with_batch(kept, embedding)
            pairs = memory.pairs_with_batch(kept, labels, active=step >= self.memory_warmup)
        else:
            references, pairs = None, losses.pairs_from_labels(labels)
        options = dict(self.options)
        options.update(losses.parameters_of_rows(params.get("loss", {}), labels))
        if self.spec.needs_dimension:
            options["dimension"] = self.dim
        if self.spec.needs_key:
            options["key"] = key
        if self.spec.needs_count:
            options["num_proxies"] = self.num_classes
        loss = self.spec.function(self._split(self.matrix(embedding, references)), pairs, **options)
        if self.prior:
            assert embedding.uncertainty is not None  # see config.validate
            loss += self.prior * difficulty.length_prior(embedding.uncertainty)
        return loss

    def _split(self, matrix: Any) -> Any:
        """Of matrices of images and proxies every device has the columns of its proxies."""
        mesh = self.mesh
        return matrix if mesh is None else jax.tree.map(lambda x: sharding.constrain(x, mesh, None, "data"), matrix)

    def _against_proxies(
        self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"]
    ) -> tuple[Float[Array, "m d"], Embedding, losses.Pairs]:
        """Proxies, images and their relation; a device has some of the proxies and all of the images."""
        proxies, mesh = params["proxies"], self.mesh
        if mesh is not None:
            proxies = sharding.constrain(proxies, mesh, "data")
            embedding = jax.tree.map(lambda x: sharding.constrain(x, mesh), embedding)
        classes = jnp.arange(self.proxy_rows)
        real = None if self.proxy_rows == self.num_classes else classes < self.num_classes
        return proxies, embedding, self._split(losses.pairs_from_labels(labels, classes, reference_mask=real))

    def confusion(self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"]) -> Float[Array, "n"]:
        """How near each image is to a wrong answer, by the plain similarity; see ``difficulty.confusion``."""
        references, pairs = None, None
        if self.spec.references == "proxies":
            references, embedding, pairs = self._against_proxies(params, embedding, labels)
        similarity = self._split(ism.cosine_similarity(embedding.semantic, references))
        return difficulty.confusion(similarity, losses.pairs_from_labels(labels) if pairs is None else pairs)
