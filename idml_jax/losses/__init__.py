"""Losses of deep metric learning as pure functions of a matrix and a relation.

Every loss reads one matrix, of distances or of similarities, between ``n`` anchors (rows) and ``m`` references
(columns: the batch itself, proxies, a memory, a gallery), and a ``Pairs`` relation that says which entries are of the
same class, of different classes, or neither. The matrix decides whether a loss is introspective: on
``ism.introspective_distance`` it is, on ``ism.semantic_distance`` the same loss is plain. Padding, several labels per
image, hierarchies and shards are all expressed by ``Pairs``. Three losses of other schools of uncertainty
(``losses.probabilistic``) read the embeddings themselves.

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

from idml_jax.losses.batch_softmax import circle, info_nce, n_pair, sup_con
from idml_jax.losses.levels import over_levels, pairs_from_levels
from idml_jax.losses.margin_softmax import arcface, cosface, normalized_softmax, soft_triple, subcenter_arcface
from idml_jax.losses.pairs import (
    Pairs,
    concatenate_pairs,
    gather,
    mask_rows,
    pairs_from_label_sets,
    pairs_from_labels,
    pairs_from_relation,
)
from idml_jax.losses.pairwise import contrastive, fast_ap, margin_distance_weighted, multi_similarity, triplet_semihard
from idml_jax.losses.probabilistic import elk, hedged_instance, mc_info_nce
from idml_jax.losses.proxy import proxy_anchor, proxy_nca
from idml_jax.losses.ranked import recall_at_k, smooth_ap
from idml_jax.losses.triplets import lifted_structure, triplet_hard

__all__ = [
    "LOSSES",
    "LossParameter",
    "LossSpec",
    "Pairs",
    "arcface",
    "circle",
    "concatenate_pairs",
    "contrastive",
    "cosface",
    "elk",
    "fast_ap",
    "gather",
    "hedged_instance",
    "info_nce",
    "init_parameters",
    "lifted_structure",
    "margin_distance_weighted",
    "mask_rows",
    "mc_info_nce",
    "multi_similarity",
    "n_pair",
    "normalized_softmax",
    "over_levels",
    "pairs_from_label_sets",
    "pairs_from_labels",
    "pairs_from_levels",
    "pairs_from_relation",
    "parameters_of_rows",
    "proxy_anchor",
    "proxy_nca",
    "recall_at_k",
    "smooth_ap",
    "soft_triple",
    "subcenter_arcface",
    "sup_con",
    "triplet_hard",
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
      reads: whether the matrix holds distances or similarities; ``embeddings``: the function takes an ``Embedding``
        instead of a matrix, and ``references=``.
      references: meaning of the columns: learned ``proxies``, or the ``batch`` itself.
      needs_key: whether it samples and takes ``key=``.
      needs_dimension: whether it depends on the width of the embeddings and takes ``dimension=``.
      needs_count: whether it averages over its references and takes ``num_proxies=`` if some columns are padding.
      parameters: the options that can be learned, by name (see ``init_parameters``).
      centres: number of proxies of each class, in adjacent columns; above 1 it is the default of the option
        ``centres``.
      takes_share: whether it is a softmax over classes that can be compared with some of them, and takes
        ``stands_for=`` (see ``losses.class_sampling``).
      takes_memory: whether further columns, of past batches, change a loss on the batch.
    """

    function: Callable[..., Array]
    reads: Literal["distance", "similarity", "embeddings"]
    references: Literal["proxies", "batch"]
    needs_key: bool = False
    needs_dimension: bool = False
    needs_count: bool = False
    parameters: Mapping[str, LossParameter] = MappingProxyType({})
    centres: int = 1
    takes_share: bool = False
    takes_memory: bool = True


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
    "proxy_nca": LossSpec(proxy_nca, "distance", "proxies", takes_share=True),
    "proxy_anchor": LossSpec(proxy_anchor, "similarity", "proxies", needs_count=True),
    "normalized_softmax": LossSpec(normalized_softmax, "similarity", "proxies", takes_share=True),
    "cosface": LossSpec(cosface, "similarity", "proxies", takes_share=True),
    "arcface": LossSpec(arcface, "similarity", "proxies", takes_share=True),
    "subcenter_arcface": LossSpec(subcenter_arcface, "similarity", "proxies", centres=3, takes_share=True),
    "soft_triple": LossSpec(soft_triple, "similarity", "proxies", centres=10, takes_share=True),
    "info_nce": LossSpec(info_nce, "similarity", "batch"),
    "sup_con": LossSpec(sup_con, "similarity", "batch"),
    "circle": LossSpec(circle, "similarity", "batch"),
    # Its negatives are the first positives of the other anchors, which are in the batch.
    "n_pair": LossSpec(n_pair, "similarity", "batch", takes_memory=False),
    "lifted_structure": LossSpec(lifted_structure, "distance", "batch"),
    "triplet_hard": LossSpec(triplet_hard, "distance", "batch"),
    "smooth_ap": LossSpec(smooth_ap, "similarity", "batch"),
    "recall_at_k": LossSpec(recall_at_k, "similarity", "batch"),
    "elk": LossSpec(elk, "embeddings", "batch"),
    "mc_info_nce": LossSpec(mc_info_nce, "embeddings", "batch", needs_key=True),
    "hedged_instance": LossSpec(
        hedged_instance,
        "embeddings",
        "batch",
        needs_key=True,
        parameters=MappingProxyType({"slope": LossParameter(8.0), "offset": LossParameter(8.0)}),
    ),
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
