"""The metric-learning objective: which matrix a loss reads, and its references."""

import inspect
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from idml_jax import ism, losses
from idml_jax.errors import UserError
from idml_jax.ism import Embedding, Metric
from idml_jax.losses import LOSSES, auxiliary, memory
from idml_jax.models import init_proxies
from idml_jax.runtime import sharding
from idml_jax.training.criterion import Criterion
from idml_jax.training.tasks.embedding_loss import embedding_loss

LEARNED = ("none", "shared", "per_class")


def training_metric(config: ConfigDict) -> Metric:
    """The metric that a run's loss uses: the plain one if ``config.ism.enabled`` is false.

    Raises:
      UserError: for an unknown ``config.ism.variant`` or a ``config.ism.temperature`` that is not above 0.
    """
    settings = config.ism
    # The plain form is selected by config.ism.enabled = False.
    known = [name for name, form in ism.FORMS.items() if form.introspective]
    if settings.variant not in known:
        raise UserError(f"config.ism.variant = {settings.variant!r}; known: {', '.join(known)}")
    if not 0 < settings.temperature < float("inf"):
        raise UserError(f"config.ism.temperature = {settings.temperature} must be above 0 and finite")
    return Metric(settings.variant if settings.enabled else "plain", settings.temperature)


def metric_of(config: ConfigDict) -> Metric:
    """The metric that compares a run's embeddings after training, also if its loss ignored the uncertainty.

    Raises:
      UserError: as ``training_metric``.
    """
    training_metric(config)
    return Metric(config.ism.variant, config.ism.temperature).for_ranking()


@dataclass(frozen=True)
class Objective(Criterion):
    """A loss, plain or introspective, with its learned parameters. Hashable: a static argument of the train step.

    Attributes:
      loss: key of ``LOSSES``.
      options: options of the loss as sorted pairs.
      metric: metric that computes the matrix; the released form is for proxy_anchor only.
      num_classes: number of training classes, with one proxy each.
      dim: d, width of the semantic embedding.
      uncertainty_dim: k, width of the uncertainty embedding.
      learned: whether the loss's learnable numbers (the margin loss's beta) are learned: ``none``, ``shared`` by all
        classes or ``per_class``.
      memory_size: number of embeddings in the cross-batch memory; 0: none.
      memory_warmup: number of steps before the memory is used.
      ranking: weight of the loss that orders images by difficulty through the length of the uncertainty embedding.
      prior: weight of the loss that pulls the length of the uncertainty embedding towards 1.
      mesh: devices over which the proxies, and the matrix along them, are split; ``None``: replicated.
      rows: devices over which a batch is split; each computes its rows of the matrix of a loss on pairs, and embeddings
        are all that they exchange. ``None``: the compiler places the matrix.
    """

    loss: str
    options: tuple[tuple[str, Any], ...]
    metric: Metric
    num_classes: int
    dim: int
    uncertainty_dim: int
    learned: str = "none"
    memory_size: int = 0
    memory_warmup: int = 0
    ranking: float = 0.0
    prior: float = 0.0
    mesh: Mesh | None = None
    rows: Mesh | None = None

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"unknown loss {self.loss!r} (config.loss.name); known: {', '.join(sorted(LOSSES))}")
        if self.metric.raw_proxies and self.loss != "proxy_anchor":
            form = self.metric.form
            raise UserError(f"config.ism.variant = {form!r} exists for proxy_anchor only, not for {self.loss}")
        if self.learned not in LEARNED:
            raise UserError(f"config.loss.learned = {self.learned!r}; known: {', '.join(LEARNED)}")
        if self.learned != "none" and not self.spec.parameters:
            able = ", ".join(name for name, spec in LOSSES.items() if spec.parameters)
            raise UserError(f"config.loss.learned: {self.loss} has nothing to learn; these do: {able}")
        if self.memory_size and self.spec.references != "batch":
            raise UserError(f"config.memory.size: {self.loss} compares with proxies; a memory is for losses on pairs")

    @property
    def spec(self) -> losses.LossSpec:
        """The inputs of the loss."""
        return LOSSES[self.loss]

    @property
    def introspective(self) -> bool:
        """Whether the loss reads the uncertainty."""
        return self.metric.introspective

    @property
    def split(self) -> tuple[str, ...]:
        """Groups of parameters that are split over devices by rows."""
        return () if self.mesh is None else ("proxies",)

    @property
    def proxy_rows(self) -> int:
        """Number of rows of the proxy table; if it is split, the last rows may be padding, which stays zero."""
        return self.num_classes if self.mesh is None else sharding.padded_rows(self.num_classes)

    def batch_loss(self, *arguments: Any) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
        """The loss of a batch with Mixup; see ``embedding_loss``."""
        return embedding_loss(*arguments)

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """The parameter groups of the loss: ``proxies`` [rows, dim] and ``loss``, its learned scalars, if any."""
        params: dict[str, Any] = {}
        if self.spec.references == "proxies":
            params["proxies"] = init_proxies(key, self.num_classes, self.dim, self.proxy_rows)
        if self.learned != "none":
            start = losses.init_parameters(self.spec, self.num_classes if self.learned == "per_class" else None)
            # An option of that name is the initial value.
            params["loss"] = {k: jnp.full_like(v, dict(self.options).get(k, v)) for k, v in start.items()}
        return params

    def init_memory(self) -> memory.Memory | tuple[()]:
        """An empty cross-batch memory; ``()`` if the loss has none."""
        if not self.memory_size:
            return ()
        return memory.create(self.memory_size, self.dim, self.uncertainty_dim if self.introspective else None)

    def remember(
        self, store: memory.Memory | tuple[()], embedding: Embedding, labels: Int[Array, "n"]
    ) -> memory.Memory | tuple[()]:
        """The memory after storing a batch; called after the batch's loss."""
        return memory.enqueue(cast(memory.Memory, store), embedding, labels) if self.memory_size else store

    def matrix(self, embedding: Embedding, references: Embedding | None) -> Float[Array, "n m"]:
        """Distances or similarities of the batch to the references (``None``: itself), introspective or plain."""
        return (self.metric.similarity if self.spec.reads == "similarity" else self.metric)(embedding, references)

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
          params: contains the groups that ``init`` returns.
          embedding: ``n`` embeddings.
          labels: ``[n]`` in ``[0, num_classes)``.
          key: PRNG key for losses that sample.
          store: cross-batch memory.
          step: training step, for the memory's warm-up.

        Returns:
          The loss, a scalar.
        """
        if self.spec.references == "proxies":
            loss = self._loss_on_proxies(params, embedding, labels, key)
        else:
            known = embedding if self.introspective else Embedding(embedding.semantic)
            able = "axis_name" in inspect.signature(self.spec.function).parameters  # a loss of the user's may lack it
            whole = (params.get("loss", {}), key, store, step)
            loss = sharding.over_rows(self._loss_on_pairs, self.rows if able else None, (known, labels), whole)
        if self.prior:
            assert embedding.uncertainty is not None  # see config.validate
            loss += self.prior * auxiliary.length_prior(embedding.uncertainty)
        return loss

    def _loss_on_proxies(
        self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"], key: PRNGKeyArray | None
    ) -> Float[Array, ""]:
        """The loss of a batch compared with proxies."""
        proxies, embedding, pairs = self._against_proxies(params, embedding, labels)
        # Proxies are certain and, except in the released form, compared by direction like the embeddings.
        references = Embedding(proxies if self.metric.raw_proxies else ism.l2_normalize(proxies), None)
        matrix = self._split(self.matrix(embedding, references))
        return self.spec.function(matrix, pairs, **self._settings(params.get("loss", {}), labels, key))

    def _loss_on_pairs(
        self, rows: tuple[Embedding, Int[Array, "n"]], whole: tuple[Any, ...], axis_name: str | None
    ) -> Float[Array, ""]:
        """The loss of rows of a batch compared with the whole batch and the memory; see ``sharding.over_rows``."""
        (embedding, labels), (learned, key, store, step) = rows, whole
        if self.memory_size:
            references: Embedding | None = memory.with_batch(store, embedding, axis_name)
            pairs = memory.pairs_with_batch(store, labels, active=step >= self.memory_warmup, axis_name=axis_name)
        else:
            references = None if axis_name is None else losses.gather(embedding, axis_name)
            pairs = losses.pairs_from_labels(labels, axis_name=axis_name)
        settings = self._settings(learned, labels, key)
        if axis_name is not None:
            settings["axis_name"] = axis_name
        return self.spec.function(self.matrix(embedding, references), pairs, **settings)

    def _settings(self, learned: dict[str, Array], labels: Int[Array, "n"], key: PRNGKeyArray | None) -> dict[str, Any]:
        """Keyword arguments of the loss function."""
        settings = dict(self.options)
        settings.update(losses.parameters_of_rows(learned, labels))
        if self.spec.needs_dimension:
            settings["dimension"] = self.dim
        if self.spec.needs_key:
            settings["key"] = key
        if self.spec.needs_count:
            settings["num_proxies"] = self.num_classes
        return settings

    def _split(self, matrix: Any) -> Any:
        """Splits image-proxy matrices so that every device has the columns of its proxies."""
        mesh = self.mesh
        return matrix if mesh is None else jax.tree.map(lambda x: sharding.constrain(x, mesh, None, "data"), matrix)

    def _against_proxies(
        self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"]
    ) -> tuple[Float[Array, "m d"], Embedding, losses.Pairs]:
        """Proxies, images and their relation; each device has some of the proxies and all images."""
        proxies, mesh = params["proxies"], self.mesh
        if mesh is not None:
            proxies = sharding.constrain(proxies, mesh, "data")
            embedding = jax.tree.map(lambda x: sharding.constrain(x, mesh), embedding)
        classes = jnp.arange(self.proxy_rows)
        real = None if self.proxy_rows == self.num_classes else classes < self.num_classes
        return proxies, embedding, self._split(losses.pairs_from_labels(labels, classes, reference_mask=real))

    def confusion(self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"]) -> Float[Array, "n"]:
        """How close each image is to a wrong answer, by the plain similarity; see ``auxiliary.confusion``."""
        if self.spec.references == "proxies":
            proxies, embedding, pairs = self._against_proxies(params, embedding, labels)
            return auxiliary.confusion(self._split(ism.cosine_similarity(embedding.semantic, proxies)), pairs)

        def of_rows(rows: tuple[Array, Array], _: tuple[()], axis_name: str | None) -> Array:
            semantic, own = rows
            everyone = None if axis_name is None else losses.gather(semantic, axis_name)
            similarity = ism.cosine_similarity(semantic, everyone)
            return auxiliary.confusion(similarity, losses.pairs_from_labels(own, axis_name=axis_name))

        return cast(Array, sharding.over_rows(of_rows, self.rows, (embedding.semantic, labels), (), "data"))
