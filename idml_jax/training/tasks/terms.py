"""The terms of a loss: one loss of the library, or the weighted sum of several."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.losses import LOSSES, LossSpec, Pairs
from idml_jax.losses.class_sampling import compared_classes
from idml_jax.runtime.files import first_line
from idml_jax.training.config import default_config
from idml_jax.training.fields import value_of

__all__ = ["Term", "check_loss", "names_of", "proxy_sets", "reads_batch", "reads_proxies", "terms_of", "without_effect"]


# Options that divide, or that scale a similarity.
POSITIVE = ("temperature", "rank_temperature", "scale", "gamma", "kappa", "spread", "alpha", "slope", "largest_square")
# The same of one loss, and distances below which its pairs have a loss.
POSITIVE_OF = {
    "multi_similarity": "beta",
    "triplet_semihard": "margin",
    "contrastive": "negative_margin",
    "lifted_structure": "negative_margin",
    "margin_distance_weighted": "beta",
}


@dataclass(frozen=True)
class Term:
    """One loss of a sum. Hashable.

    Attributes:
      loss: key of ``LOSSES``.
      weight: its factor.
      options: options of the loss as sorted pairs.
    """

    loss: str
    weight: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def spec(self) -> LossSpec:
        """The inputs of the loss."""
        return LOSSES[self.loss]

    @property
    def centres(self) -> int:
        """Number of proxies per class."""
        return int(dict(self.options).get("centres", self.spec.centres)) if self.spec.centres > 1 else 1


def is_number(value: Any) -> bool:
    """Whether a setting is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def names_of(loss: str) -> tuple[str, ...]:
    """The losses of ``config.loss.name``: ``proxy_anchor``, or several joined by ``+``."""
    return tuple(loss.split("+"))


def reads_batch(loss: str) -> bool:
    """Whether a term compares the images of a batch with each other."""
    return any(LOSSES[name].references == "batch" for name in names_of(loss))


def reads_proxies(loss: str) -> bool:
    """Whether a term compares images with proxies."""
    return any(LOSSES[name].references == "proxies" for name in names_of(loss))


def advice(config: ConfigDict) -> str:
    """What is known to go wrong with the introspective metric under the loss, and what helps; empty if nothing is.

    Measured in docs/losses.md.
    """
    if not config.ism.enabled or config.task != "retrieval":
        return ""
    names = names_of(config.loss.name)
    if "triplet_hard" in names:
        return (
            "with the introspective metric triplet_hard lost half of its recall in short runs, and no setting helped; "
            "consider config.ism.enabled=False or config.loss.name=triplet_semihard"
        )
    angular = [name for name in names if name in ("arcface", "subcenter_arcface")]
    if angular and not config.ism.prior:
        return (
            f"with the introspective metric the uncertainty grew without end under {angular[0]} in short runs, and "
            "recall fell by nearly half; config.ism.prior=10 held it"
        )
    return ""


def of_class_share(objective: Any, batch: int) -> str:
    """What part of the classes a batch is compared with, where that is far from ``config.loss.class_share``."""
    share = getattr(objective, "class_share", 1.0)
    if share >= 1:
        return ""
    groups = 1 if objective.mesh is None else objective.mesh.size
    count, rows = objective.num_classes, objective.proxy_rows
    found = compared_classes(batch, count, share, rows=rows, groups=groups) / count
    if found <= 1.5 * share:
        return ""
    parts = f"each of {groups} parts of the table has" if groups > 1 else "there is"
    return (
        f"config.loss.class_share = {share}: a batch is compared with {found:.0%} of the classes, as {parts} room for "
        f"{min(batch, rows // groups):,} classes of the batch"
    )


def without_effect(config: ConfigDict) -> list[str]:
    """Settings for another task, loss or metric than the run's, as ``config.loss.arcface.margin = 0.3``."""
    retrieval, default = config.task == "retrieval", default_config()
    used = names_of(config.loss.name) if retrieval else ()
    unused = (
        [f"classification.{field}" for field in default.classification] if retrieval else ["loss.name", "loss.weights"]
    )
    if not (retrieval and config.mixup.enabled):
        unused.append("mixup.alpha")
    if config.ism.enabled and retrieval:
        unmetric = all(LOSSES[name].reads == "embeddings" for name in used)
        unused += ["ism.temperature"] * (unmetric or config.ism.variant == "released")
        unused += ["ism.variant"] * unmetric
    unused += [f"loss.{name}.{option}" for name in LOSSES if name not in used for option in default.loss[name]]
    return [
        f"config.{field} = {value!r}"
        for field in unused
        if (value := _fixed(value_of(config, field))) != _fixed(value_of(default, field))
    ]


def proxy_sets(terms: tuple[Term, ...]) -> dict[int, int]:
    """The sets of proxies of a sum: losses that need the same number of proxies per class share one set.

    Returns:
      For each number of proxies per class the index of the first of the set among all proxies of a class.
    """
    sets: dict[int, int] = {}
    for term in terms:
        if term.spec.references == "proxies" and term.centres not in sets:
            sets[term.centres] = sum(sets)
    return sets


def options_of(config: ConfigDict, name: str) -> tuple[tuple[str, Any], ...]:
    """The options of a loss as sorted, hashable pairs; settings read from JSON have lists instead of tuples."""
    return tuple(sorted((key, _fixed(value)) for key, value in config.loss[name].items()))


def _fixed(value: Any) -> Any:
    """A setting with a tuple for a list: settings that were read from a file have lists."""
    return tuple(value) if isinstance(value, list) else value


def terms_of(config: ConfigDict) -> tuple[Term, ...]:
    """The terms of ``config.loss`` with their weights and options."""
    names = names_of(config.loss.name)
    weights = tuple(config.loss.weights) or (1.0,) * len(names)
    return tuple(Term(name, weight, options_of(config, name)) for name, weight in zip(names, weights, strict=True))


def check_loss(config: ConfigDict) -> None:
    """Checks ``config.loss`` by itself.

    Raises:
      UserError: naming the field, its value and what would be right.
    """
    loss = config.loss
    names = names_of(loss.name)
    known = ", ".join(sorted(LOSSES))
    if unknown := [name for name in names if name not in LOSSES]:
        joined = f" ({unknown[0]!r} is none), joined by +" if len(names) > 1 else ""
        raise UserError(f"config.loss.name = {loss.name!r}; known: {known}{joined}")
    if len(set(names)) < len(names):
        raise UserError(f"config.loss.name = {loss.name!r} names a loss twice; config.loss.weights weights the terms")
    if loss.weights and len(loss.weights) != len(names):
        raise UserError(
            f"config.loss.weights = {tuple(loss.weights)} must be one number for each of the {len(names)} losses in "
            f"config.loss.name = {loss.name!r}, or empty"
        )
    if any(not is_number(weight) or not 0 < weight < float("inf") for weight in loss.weights):
        raise UserError(f"config.loss.weights = {tuple(loss.weights)} must be numbers above 0 and finite")
    if not 0 < loss.class_share <= 1:
        raise UserError(f"config.loss.class_share = {loss.class_share} must be above 0 and at most 1")
    unable = [name for name in names if LOSSES[name].references == "proxies" and not LOSSES[name].takes_share]
    if loss.class_share < 1 and (unable or not reads_proxies(loss.name)):
        able = ", ".join(name for name, spec in LOSSES.items() if spec.takes_share)
        raise UserError(
            f"config.loss.class_share = {loss.class_share} is for softmax losses over proxies ({able}), not for "
            f"{(unable or names)[0]}"
        )
    terms = terms_of(config)
    _check_options(terms)
    thin = [name for name in names if name in ("elk", "mc_info_nce")]
    if thin and config.model.embedding_dim < 2:
        raise UserError(
            f"config.model.embedding_dim = {config.model.embedding_dim}: {thin[0]} needs at least 2 dimensions, for "
            "its directions"
        )
    if loss.centre_spread and max(term.centres for term in terms) < 2:
        able = ", ".join(name for name, spec in LOSSES.items() if spec.centres > 1)
        raise UserError(
            f"config.loss.centre_spread = {loss.centre_spread} is for losses with several proxies per class: {able}"
        )


def check_memory(name: str, terms: tuple[Term, ...]) -> None:
    """Checks that a loss has a use for a cross-batch memory.

    Raises:
      UserError: if none of its terms has.
    """
    on_batch = [term.spec for term in terms if term.spec.references == "batch"]
    if not on_batch:
        raise UserError(f"config.memory.size: {name} compares with proxies; a memory is for losses on pairs")
    if not any(spec.takes_memory for spec in on_batch):
        raise UserError(
            f"config.memory.size: {name} reads one positive of each image, which is in the batch; it has no use for a "
            "memory"
        )


def with_memory(terms: list[tuple[int, Term]], store: Any) -> list[tuple[list[tuple[int, Term]], Any]]:
    """Numbered terms on the batch in groups, each with its memory: ``store``, or ``()`` for terms that take none."""
    if not store:
        return [(terms, ())]
    taking = [(number, term) for number, term in terms if term.spec.takes_memory]
    others = [(number, term) for number, term in terms if not term.spec.takes_memory]
    return [(group, kept) for group, kept in ((taking, store), (others, ())) if group]


def _check_options(terms: tuple[Term, ...]) -> None:
    """Checks the options of the losses."""
    for term in terms:
        options = dict(term.options)
        for option, least in (("centres", 1), ("samples", 1), ("bins", 1)):
            if option in options and options[option] < least:
                raise UserError(f"config.loss.{term.loss}.{option} = {options[option]} must be at least {least}")
        for option, value in options.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"config.loss.{term.loss}.{option} = {value} must be a finite number")
        for option in (*POSITIVE, POSITIVE_OF.get(term.loss)):
            if option in options and not options[option] > 0:
                raise UserError(f"config.loss.{term.loss}.{option} = {options[option]} must be above 0 and finite")
        if "cutoff" in options and not 0 < options["cutoff"] < options["nonzero_cutoff"] <= 2:
            raise UserError(
                f"config.loss.{term.loss}.cutoff = {options['cutoff']} and nonzero_cutoff = "
                f"{options['nonzero_cutoff']}: 0 < cutoff < nonzero_cutoff <= 2, as distances on the sphere"
            )
        if options.get("prior", 0.0) < 0:
            raise UserError(f"config.loss.{term.loss}.prior = {options['prior']} must be at least 0")
        if "arcface" in term.loss and not 0 <= options["margin"] <= 180:
            raise UserError(
                f"config.loss.{term.loss}.margin = {options['margin']} must be an angle between 0 and 180 degrees"
            )
        ks = options.get("ks", (1,))
        if not ks or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in ks):
            raise UserError(f"config.loss.{term.loss}.ks = {ks} must be whole numbers of at least 1")
        _check_by_loss(term)


def _check_by_loss(term: Term) -> None:
    """Refuses options that the loss itself refuses, by calling it on shapes."""
    spec, options = term.spec, dict(term.options)

    def call() -> jax.Array:
        shape = 2, 2 * term.centres
        read = Embedding(jnp.zeros((2, 2)), jnp.zeros((2, 2))) if spec.reads == "embeddings" else jnp.zeros(shape)
        related = jnp.zeros(shape, bool)
        more: dict[str, Any] = {"key": jax.random.key(0)} if spec.needs_key else {}
        more |= {"dimension": 2} if spec.needs_dimension else {}
        return spec.function(read, Pairs(related, related), **options, **more)

    try:
        jax.eval_shape(call)  # on no device: several hosts may not be connected yet
    except ValueError as error:
        told = first_line(error)
        name = f"{term.loss}." if told.split()[0] in options else f"{term.loss}: "
        raise UserError(f"config.loss.{name}{told}") from error
