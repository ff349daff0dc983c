"""The metric-learning objective: which matrix a loss reads, and its references."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from idml_jax import ism, losses
from idml_jax.errors import UserError
from idml_jax.ism import Embedding, Metric
from idml_jax.losses import LOSSES, auxiliary, class_sampling, memory
from idml_jax.losses.class_relation import ClassRelation
from idml_jax.models import init_proxies
from idml_jax.runtime import sharding
from idml_jax.training.criterion import Criterion
from idml_jax.training.tasks.embedding_loss import embedding_loss
from idml_jax.training.tasks.matrices import Compared, classes_of_proxies, log_term, matrix_of, related
from idml_jax.training.tasks.terms import Term, check_memory, proxy_sets, with_memory

LEARNED = ("none", "shared", "per_class")
CLASS_DRAW = 2**31 - 1  # folded into the key of drawn classes: neither the number of a term nor of a row


@dataclass(frozen=True)
class Objective(Criterion):
    """A loss, plain or introspective, with its learned parameters. Hashable: a static argument of the train step.

    Attributes:
      loss: key of ``LOSSES``; for a sum, the keys joined by ``+``.
      options: options of the loss as sorted pairs; of a sum, see ``terms``.
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
      prior_by: ``constant``, or ``confusion``: towards a length that grows with the image's confusion in the batch.
      negatives: ``learn``, or ``stop``: pairs of different classes do not teach the uncertainty, see ``matrix_of``.
      attenuation: weight of what an uncertain positive costs, see ``log_term``.
      mesh: devices over which the proxies, and the matrix along them, are split; ``None``: replicated.
      rows: devices over which a batch is split; each computes its rows of the matrix of a loss on pairs, and embeddings
        are all that they exchange. ``None``: the compiler places the matrix.
      terms: losses with weights and options, all on the matrices of one metric; empty: ``loss`` alone.
      class_share: share of the classes that a batch is compared with in a step; 1: all.
      centre_spread: weight of the loss that merges proxies of a class.
      embedding_norm: weight of the mean squared length of the semantic embeddings before normalising.
      relation: which classes are positives and negatives of each other; ``None``: every class of itself alone.
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
    prior_by: str = "constant"
    negatives: str = "learn"
    attenuation: float = 0.0
    mesh: Mesh | None = None
    rows: Mesh | None = None
    terms: tuple[Term, ...] = ()
    class_share: float = 1.0
    centre_spread: float = 0.0
    embedding_norm: float = 0.0
    relation: ClassRelation | None = None

    def __post_init__(self) -> None:
        for term in self.parts:
            if term.loss not in LOSSES:
                raise UserError(f"unknown loss {term.loss!r} (config.loss.name); known: {', '.join(sorted(LOSSES))}")
        if self.metric.raw_proxies and self.loss != "proxy_anchor":
            form = self.metric.form
            raise UserError(f"config.ism.variant = {form!r} exists for proxy_anchor only, not for {self.loss}")
        if self.learned not in LEARNED:
            raise UserError(f"config.loss.learned = {self.learned!r}; known: {', '.join(LEARNED)}")
        if self.learned != "none" and not any(term.spec.parameters for term in self.parts):
            able = ", ".join(name for name, spec in LOSSES.items() if spec.parameters)
            raise UserError(f"config.loss.learned: {self.loss} has nothing to learn; these do: {able}")
        if self.memory_size:
            check_memory(self.loss, self.parts)

    @property
    def parts(self) -> tuple[Term, ...]:
        """The losses that are summed."""
        return self.terms or (Term(self.loss, 1.0, self.options),)

    def _has(self, references: str) -> bool:
        """Whether a term compares with these references."""
        return any(term.spec.references == references for term in self.parts)

    @property
    def centres(self) -> int:
        """Number of proxies per class, of all terms."""
        return sum(proxy_sets(self.parts))

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
        """The parameter groups of the loss: ``proxies`` [rows, centres * dim] and ``loss``, its learned scalars.

        A row holds all proxies of a class, so a table that is split by rows keeps them together.
        """
        params: dict[str, Any] = {}
        if self._has("proxies"):
            params["proxies"] = init_proxies(key, self.num_classes, self.centres * self.dim, self.proxy_rows)
        if self.learned != "none":
            params["loss"] = {}
            for term in self.parts:
                start = losses.init_parameters(term.spec, self.num_classes if self.learned == "per_class" else None)
                # An option of that name is the initial value.
                initial = {k: jnp.full_like(v, dict(term.options).get(k, v)) for k, v in start.items()}
                params["loss"].update(initial)
        return params

    def init_memory(self) -> memory.Memory | tuple[()]:
        """An empty cross-batch memory; ``()`` if the loss has none."""
        if not self.memory_size:
            return ()
        return memory.create(self.memory_size, self.dim, self.uncertainty_dim if self.introspective else None)

    def remember(
        self,
        store: memory.Memory | tuple[()],
        embedding: Embedding,
        labels: Int[Array, "n"],
        mask: Bool[Array, "n"] | None = None,
    ) -> memory.Memory | tuple[()]:
        """The memory after storing a batch, without images whose mask is false; called after the batch's loss."""
        return memory.enqueue(cast(memory.Memory, store), embedding, labels, mask) if self.memory_size else store

    def __call__(
        self,
        params: dict[str, Any],
        embedding: Embedding,
        labels: Int[Array, "n"],
        *,
        key: PRNGKeyArray | None = None,
        store: memory.Memory | tuple[()] = (),
        step: Int[Array, ""] | int = 0,
        mask: Bool[Array, "n"] | None = None,
    ) -> Float[Array, ""]:
        """The loss of a batch.

        Args:
          params: contains the groups that ``init`` returns.
          embedding: ``n`` embeddings.
          labels: ``[n]`` in ``[0, num_classes)``.
          key: PRNG key for losses that sample.
          store: cross-batch memory.
          step: training step, for the memory's warm-up.
          mask: ``[n]``, false for images to leave out of all comparisons.

        Returns:
          The loss, a scalar.
        """
        learned, values, numbered = params.get("loss", {}), {}, list(enumerate(self.parts))
        for count in proxy_sets(self.parts):
            on_proxies = [(i, t) for i, t in numbered if t.spec.references == "proxies" and t.centres == count]
            compared = self._with_proxies(params, embedding, labels, key, mask, count)
            values.update(self._values(on_proxies, compared, learned, labels, key))
        if on_pairs := [(i, term) for i, term in numbered if term.spec.references == "batch"]:

            def of_rows(
                rows: tuple[Embedding, Array, Any], whole: tuple[Any, ...], axis_name: str | None
            ) -> dict[int, Array]:
                (own, of_own, masked), (learned, key, store, step) = rows, whole
                found: dict[int, Array] = {}
                for terms, kept in with_memory(on_pairs, store):
                    compared = self._with_batch(own, of_own, masked, kept, step, axis_name)
                    found.update(self._values(terms, compared, learned, of_own, key, axis_name))
                return found

            # A loss of the user's may not know the axis.
            able = all("axis_name" in inspect.signature(term.spec.function).parameters for _, term in on_pairs)
            rows, whole = (self._seen(embedding), labels, mask), (learned, key, store, step)
            values.update(sharding.over_rows(of_rows, self.rows if able else None, rows, whole))
        first, *others = (values[i] if term.weight == 1 else term.weight * values[i] for i, term in numbered)
        loss = sum(others, start=first)
        if self.centre_spread:
            sets = [self._proxies_of(params["proxies"], count) for count in proxy_sets(self.parts) if count > 1]
            loss += self.centre_spread * sum(auxiliary.centre_spread(x, self._real()) for x in sets)
        if self.attenuation:
            loss += self.attenuation * sum(cost for i, cost in values.items() if i < 0)
        if self.prior:
            assert embedding.uncertainty is not None  # see config.validate
            by = None if self.prior_by == "constant" else self.confusion(params, embedding, labels, mask)
            loss += self.prior * auxiliary.length_prior(embedding.uncertainty, by, mask)
        return loss

    def _values(
        self,
        terms: list[tuple[int, Term]],
        found: Compared,
        learned: dict[str, Float[Array, "..."]],
        labels: Int[Array, "n"],
        key: PRNGKeyArray | None,
        axis_name: str | None = None,
    ) -> dict[int, Float[Array, ""]]:
        """The losses of terms with the same references, by their numbers."""
        matrices: dict[str, Any] = {}
        values = {}
        for index, term in terms:
            spec = term.spec
            own_key = key if index == 0 or key is None else jax.random.fold_in(key, index)
            options = self._options_of(term, found, learned, labels, own_key)
            if axis_name is not None:
                options["axis_name"] = axis_name
            if spec.reads == "embeddings":
                read: Any = self._seen(found.embedding)
            else:
                if spec.reads not in matrices:
                    matrix = matrix_of(self.metric, spec.reads, found, self.negatives)
                    matrices[spec.reads] = self._split(matrix) if spec.references == "proxies" else matrix
                read = matrices[spec.reads]
            if self.relation is None:
                values[index] = spec.function(read, found.pairs, **options)
            else:
                values[index] = losses.over_levels(spec.function, read, found.levels, self.relation.weights, **options)
        if self.attenuation:  # below 0: no term
            values[-1 - terms[0][0]] = log_term(self.metric, found, axis_name)
        return values

    def _options_of(
        self,
        term: Term,
        found: Compared,
        learned: dict[str, Float[Array, "..."]],
        labels: Int[Array, "n"],
        key: PRNGKeyArray | None,
    ) -> dict[str, Any]:
        """The keyword arguments of a term's function."""
        spec, options = term.spec, dict(term.options)
        own = {name: learned[name] for name in spec.parameters if name in learned}
        options.update(losses.parameters_of_rows(own, labels))
        if spec.needs_dimension:
            options["dimension"] = self.dim
        if spec.needs_key:
            options["key"] = key
        if spec.needs_count:
            options["num_proxies"] = self.num_classes
        if found.stands_for is not None:
            options["stands_for"] = found.stands_for
        if spec.reads == "embeddings":
            options["references"] = None if found.references is None else self._seen(found.references)
            options |= {"anchors_first": True} if spec.needs_key else {}  # the batch, and behind it the memory
        return options

    def _seen(self, embedding: Embedding) -> Embedding:
        """An embedding as a loss on embeddings sees it: certain if the metric is plain."""
        return embedding if self.introspective else Embedding(embedding.semantic)

    def _split(self, matrix: Any) -> Any:
        """Splits image-proxy matrices so that every device has the columns of its proxies."""
        mesh = self.mesh
        return matrix if mesh is None else jax.tree.map(lambda x: sharding.constrain(x, mesh, None, "data"), matrix)

    def _real(self) -> Bool[Array, "rows"] | None:
        """Which rows of the table are classes; ``None``: all."""
        return None if self.proxy_rows == self.num_classes else jnp.arange(self.proxy_rows) < self.num_classes

    def _proxies_of(self, rows: Float[Array, "m kd"], count: int | None) -> Float[Array, "m k d"]:
        """The proxies in each row of the table: all, or those of the losses that need so many per class."""
        sets = proxy_sets(self.parts)
        first, count = (0, self.centres) if count is None else (sets[count], count)
        if len(sets) > 1:
            rows = rows[:, first * self.dim : (first + count) * self.dim]
        return rows.reshape(rows.shape[0], count, self.dim)

    def _with_batch(
        self,
        embedding: Embedding,
        labels: Int[Array, "n"],
        mask: Bool[Array, "n"] | None,
        store: memory.Memory | tuple[()],
        step: Any,
        axis_name: str | None,
    ) -> Compared:
        """Images with the whole batch (which they are, or are rows of) and, if there is one, with the memory."""
        if not store:
            references = None if axis_name is None else losses.gather(embedding, axis_name)
            found = losses.pairs_from_label_sets(labels, mask=mask, axis_name=axis_name)
            levels = self._levels(found, labels, lambda: losses.gather(labels, axis_name))
            return Compared(embedding, references, found, levels=levels)
        pairs = memory.pairs_with_batch(store, labels, mask, active=step >= self.memory_warmup, axis_name=axis_name)
        levels = self._levels(pairs, labels, lambda: jnp.concatenate([losses.gather(labels, axis_name), store.labels]))
        return Compared(embedding, memory.with_batch(store, embedding, axis_name), pairs, levels=levels)

    def _levels(
        self, pairs: losses.Pairs, rows: Int[Array, "n"], columns: Callable[[], Int[Array, "m"]]
    ) -> tuple[losses.Pairs, ...]:
        """The relation of the classes at each of its levels; nothing if they are the same or different alone."""
        return () if self.relation is None else self.relation.pairs(pairs, rows, columns())

    def _with_proxies(
        self,
        params: dict[str, Any],
        embedding: Embedding,
        labels: Int[Array, "n"],
        key: PRNGKeyArray | None,
        mask: Bool[Array, "n"] | None,
        count: int,
    ) -> Compared:
        """The images with a set of proxies; each device has some of the proxies and all images."""
        sample = None
        if self.class_share < 1:
            if key is None:
                raise ValueError("a share of the classes is drawn at random: the objective needs a key")
            sample = class_sampling.sample_classes(
                jax.random.fold_in(key, CLASS_DRAW),
                labels,
                self.num_classes,
                self.class_share,
                rows=self.proxy_rows,
                groups=1 if self.mesh is None else self.mesh.size,
            )
        proxies, embedding, pairs = self._against_proxies(params, embedding, labels, sample, count)
        # Proxies are certain and, except in the released form, compared by direction like the embeddings.
        references = Embedding(proxies if self.metric.raw_proxies else ism.l2_normalize(proxies), None)
        pairs = losses.mask_rows(pairs, mask)
        classes = lambda: classes_of_proxies(self.proxy_rows, self.num_classes, count)
        levels = self._levels(pairs, labels, classes)
        levels = tuple(losses.Pairs(*map(self._split, level)) for level in levels)
        return Compared(embedding, references, pairs, None if sample is None else sample.stands_for, levels)

    def _against_proxies(
        self,
        params: dict[str, Any],
        embedding: Embedding,
        labels: Int[Array, "n"],
        sample: class_sampling.ClassSample | None = None,
        count: int | None = None,
    ) -> tuple[Float[Array, "m d"], Embedding, losses.Pairs]:
        """Proxies (of the drawn classes, or of all; a set, or all), images and their relation."""
        table, mesh, centres = params["proxies"], self.mesh, count or self.centres
        if mesh is not None:
            table = sharding.constrain(table, mesh, "data")
            embedding = jax.tree.map(lambda x: sharding.constrain(x, mesh), embedding)
        classes, real = jnp.arange(self.proxy_rows), self._real()
        if sample is not None:
            table, classes, real = class_sampling.take_classes(table, sample), sample.classes, sample.real
        if self.centres > 1:
            table = self._proxies_of(table, count).reshape(-1, self.dim)
        if centres > 1:
            classes = jnp.repeat(classes, centres)
            real = None if real is None else jnp.repeat(real, centres)
        if mesh is not None and (self.centres > 1 or sample is not None):
            table = sharding.constrain(table, mesh, "data")
        return table, embedding, self._split(losses.pairs_from_label_sets(labels, classes, reference_mask=real))

    def confusion(
        self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"], mask: Any = None
    ) -> Float[Array, "n"]:
        """How close each image is to a wrong answer, see ``auxiliary.confusion``; NaN for those that are masked."""
        if self._has("proxies"):
            proxies, embedding, pairs = self._against_proxies(params, embedding, labels)
            similarity = self._split(ism.cosine_similarity(embedding.semantic, proxies))
            columns = lambda: classes_of_proxies(self.proxy_rows, self.num_classes, self.centres)
            pairs = losses.mask_rows(pairs, mask)
            return auxiliary.confusion(similarity, related(pairs, self._levels(pairs, labels, columns)))

        def of_rows(rows: tuple[Array, Array, Any], _: tuple[()], axis_name: str | None) -> Array:
            semantic, own, kept = rows
            everyone = None if axis_name is None else losses.gather(semantic, axis_name)
            similarity = ism.cosine_similarity(semantic, everyone)
            pairs = losses.pairs_from_label_sets(own, mask=kept, axis_name=axis_name)
            levels = self._levels(pairs, own, lambda: losses.gather(own, axis_name))
            return auxiliary.confusion(similarity, related(pairs, levels))

        return cast(Array, sharding.over_rows(of_rows, self.rows, (embedding.semantic, labels, mask), (), "data"))
