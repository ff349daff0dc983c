"""Losses of deep metric learning as pure functions of a matrix and a relation.

Every loss reads one matrix, of distances or of similarities, between ``n`` anchors (rows) and ``m`` references
(columns: the batch itself, proxies, a memory, a gallery), and a ``Pairs`` relation that says which entries are of the
same class, of different classes, or neither. The matrix decides whether a loss is introspective: on
``ism.introspective_distance`` it is, on ``ism.semantic_distance`` the same loss is plain. Padding, several labels per
image, hierarchies and shards are all expressed by ``Pairs``.

With several devices under ``jit`` with sharded arrays, the batch is global and nothing else is needed. Under ``pmap``
or ``shard_map`` a device holds some of the rows; it compares them with those of all devices and names the axis::

    everyone = losses.gather(embedding, "data")
    pairs = losses.pairs_from_labels(labels, axis_name="data")
    loss = losses.contrastive(ism.introspective_distance(embedding, everyone), pairs, axis_name="data")

which is the loss of the whole batch, the same on every device. ``jax.lax.pmean`` of the gradients of replicated
parameters is then the gradient of that loss, as it is without an axis.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idml_jax.losses.pairs import Pairs, concatenate_pairs, gather, pairs_from_labels, pairs_from_relation
from idml_jax.losses.pairwise import contrastive, fast_ap, margin_distance_weighted, multi_similarity, triplet_semihard
from idml_jax.losses.proxy import proxy_anchor, proxy_nca

__all__ = [
    "LOSSES",
    "LossParameter",
    "LossSpec",
    "Pairs",
    "concatenate_pairs",
    "contrastive",
    "fast_ap",
    "gather",
    "init_parameters",
    "margin_distance_weighted",
    "multi_similarity",
    "pairs_from_labels",
    "pairs_from_relation",
    "parameters_of_rows",
    "proxy_anchor",
    "proxy_nca",
    "triplet_semihard",
]


class LossParameter(NamedTuple):
    """A scalar that a loss can learn, either one for all classes or one per class.

    Attributes:
      initial: initial value, and the value used if it is not learned.
    """

    initial: float


class LossSpec(NamedTuple):
    """The inputs of a loss.

    Attributes:
      function: ``(matrix, pairs, **options) -> scalar``.
      reads: whether the matrix holds distances or similarities.
      references: meaning of the columns: learned ``proxies``, one per class, or the ``batch`` itself.
      needs_key: whether it samples and takes ``key=``.
      needs_dimension: whether it depends on the width of the embeddings and takes ``dimension=``.
      needs_count: whether it averages over its references and takes ``num_proxies=`` if some columns are padding.
      parameters: the options that can be learned, by name (see ``init_parameters``).
    """

    function: Callable[..., Array]
    reads: Literal["distance", "similarity"]
    references: Literal["proxies", "batch"]
    needs_key: bool = False
    needs_dimension: bool = False
    needs_count: bool = False
    parameters: Mapping[str, LossParameter] = MappingProxyType({})


LOSSES: dict[str, LossSpec] = {
    "contrastive": LossSpec(contrastive, "distance", "batch"),
    "triplet_semihard": LossSpec(triplet_semihard, "distance", "batch"),
    "margin_distance_weighted": LossSpec(
        margin_distance_weighted,
        "distance",
        "batch",
        needs_key=True,
        needs_dimension=True,
        parameters=MappingProxyType({"beta": LossParameter(1.2)}),
    ),
    "multi_similarity": LossSpec(multi_similarity, "similarity", "batch"),
    "fast_ap": LossSpec(fast_ap, "distance", "batch"),
    "proxy_nca": LossSpec(proxy_nca, "distance", "proxies"),
    "proxy_anchor": LossSpec(proxy_anchor, "similarity", "proxies", needs_count=True),
}


def init_parameters(spec: LossSpec, num_classes: int | None = None) -> dict[str, Float[Array, "..."]]:
    """The learned scalars of a loss at their initial values, to be trained together with the proxies.

    Args:
      spec: the loss.
      num_classes: number of classes with a separate scalar each; ``None``: one scalar for all classes.

    Returns:
      Arrays of shape ``[]`` or ``[num_classes]`` by name; empty for a loss without learnable scalars.

    >>> init_parameters(LOSSES["margin_distance_weighted"], num_classes=2)["beta"].tolist()
    [1.2, 1.2]
    """
    shape = () if num_classes is None else (num_classes,)
    return {name: jnp.full(shape, parameter.initial, jnp.float32) for name, parameter in spec.parameters.items()}


def parameters_of_rows(
    parameters: Mapping[str, Float[Array, "..."]], labels: Int[Array, "n"]
) -> dict[str, Float[Array, "..."]]:
    """Learned scalars as options of the loss: scalars per class are looked up by each row's class.

    Args:
      parameters: arrays ``[]`` or ``[num_classes]``, from ``init_parameters``.
      labels: ``[n]`` class of each row, below ``num_classes``.

    Returns:
      Arrays ``[]`` or ``[n]``: ``spec.function(matrix, pairs, **parameters_of_rows(parameters, labels))``.

    >>> parameters_of_rows({"beta": jnp.array([1.0, 2.0])}, jnp.array([1, 1, 0]))["beta"].tolist()
    [2.0, 2.0, 1.0]
    """
    return {name: value[labels] if value.ndim else value for name, value in parameters.items()}
