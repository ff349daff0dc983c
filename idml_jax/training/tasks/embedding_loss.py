"""The loss of one batch of metric learning: Mixup, trunk, heads, and the objective on the whole batch."""

from collections.abc import Callable
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from idml_jax import mixing
from idml_jax.ism import Embedding
from idml_jax.losses import auxiliary
from idml_jax.losses.memory import Memory
from idml_jax.models import EmbeddingModel
from idml_jax.training.state import TrainState
from idml_jax.training.steps import StepSetup, embedding_of, mean_length, normalize, pooled_features


class OnEmbeddings(Protocol):
    """The members of an objective that ``embedding_loss`` uses; see ``tasks.objective.Objective``."""

    @property
    def ranking(self) -> float: ...
    @property
    def embedding_norm(self) -> float: ...

    def __call__(
        self,
        params: dict[str, Any],
        embedding: Embedding,
        labels: Int[Array, "n"],
        *,
        key: PRNGKeyArray | None = None,
        store: Memory | tuple[()] = (),
        step: Int[Array, ""] | int = 0,
        **mask: Any,
    ) -> Float[Array, ""]: ...

    def chosen(self, store: Any, embedding: Embedding, labels: Int[Array, "n"]) -> Bool[Array, "n"] | None: ...

    def confusion(
        self, params: dict[str, Any], embedding: Embedding, labels: Int[Array, "n"], **mask: Any
    ) -> Float[Array, "n"]: ...


def embedding_loss(
    trained: dict[str, Any],
    resting: dict[str, Any],
    state: TrainState,
    batch: dict[str, Array],
    setup: StepSetup,
    train_trunk: bool,
) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
    """The loss of metric learning, and (running statistics, outputs of the heads for the originals, metrics)."""
    params, objective = {**trained, **resting}, cast(OnEmbeddings, setup.objective)
    images, labels = batch["image"], batch["label"]
    mixup_key, *draws = jax.random.split(jax.random.fold_in(jax.random.key(setup.seed), state.step), 4)
    normal = lambda x: normalize(x, setup.mean, setup.std)

    def pooled(batch_stats: Any, inputs: tuple[Array, ...], prepare: Callable[..., Array]) -> tuple[Array, Any]:
        return pooled_features(setup, params["trunk"], batch_stats, inputs, prepare, train_trunk)

    def embed(features: Array) -> Any:
        return setup.model.apply({"params": {"heads": params["heads"]}}, features, method=EmbeddingModel.embed)

    def criterion(out: dict[str, Array], labels: Array, key: Array, kept: Array | None) -> Array:
        mask = {} if kept is None else {"mask": kept}  # an objective of the user's may not know it
        loss = objective(params, embedding_of(out), labels, key=key, store=state.memory, step=state.step, **mask)
        if objective.embedding_norm:
            loss += objective.embedding_norm * auxiliary.mean_of(jnp.square(out["semantic_norm"]), kept)
        return loss

    def confusion(out: dict[str, Array], labels: Array, kept: Array | None) -> Array:
        mask = {} if kept is None else {"mask": kept}
        return objective.confusion(params, embedding_of(out), labels, **mask)

    def order(features: Array, confusions: Array) -> Array:
        # Only the uncertainty head learns the order; the trunk gets no gradient from it.
        return auxiliary.ranking_loss(embed(jax.lax.stop_gradient(features))["uncertainty"], confusions)

    if not setup.mixup_alpha:
        features, batch_stats = pooled(state.batch_stats, (images,), lambda x: normal(x)[:, None])
        out = embed(features[:, 0])
        kept = objective.chosen(state.memory, embedding_of(out), labels)
        loss = criterion(out, labels, draws[0], kept)
        metrics = {"loss": loss, "uncertainty": mean_length(out), **_share(kept)}
        if objective.ranking:
            metrics["loss_ranking"] = order(features[:, 0], confusion(out, labels, kept))
            loss += objective.ranking * metrics["loss_ranking"]
        return loss, (batch_stats, out, metrics | {"loss": loss})

    # Only partners and shares are drawn here; the images are mixed where they are used.
    mixed = mixing.mixup(mixup_key, jnp.zeros((images.shape[0], 1, 1, 1)), setup.mixup_alpha)
    blend = lambda x, other: mixing.blend(normal(x), normal(other), mixed.lam)
    partner, others = mixing.with_partners(images, mixed.partner, setup.near)
    both = (images, others)
    if setup.model.independent_rows:
        # Rows are independent in the trunk, so one pass over both equals two passes.
        features, batch_stats = pooled(
            state.batch_stats, both, lambda x, other: jnp.stack([normal(x), blend(x, other)], axis=1)
        )
        features, features_mixed = features[:, 0], features[:, 1]
    else:
        features, batch_stats = pooled(state.batch_stats, both[:1], lambda x: normal(x)[:, None])
        features_mixed, batch_stats = pooled(batch_stats, both, lambda x, other: blend(x, other)[:, None])
        features, features_mixed = features[:, 0], features_mixed[:, 0]
    out, out_mixed = embed(features), embed(features_mixed)
    kept = objective.chosen(state.memory, embedding_of(out), labels)
    original = criterion(out, labels, draws[0], kept)
    other = jnp.take(labels, partner, axis=0)
    loss_mixed = mixed.lam * criterion(out_mixed, labels, draws[1], kept)
    other_kept = None if kept is None else jnp.take(kept, partner)
    loss_mixed += (1.0 - mixed.lam) * criterion(out_mixed, other, draws[2], other_kept)
    metrics = {
        "loss_original": original,
        "loss_mixed": loss_mixed,
        "uncertainty": mean_length(out),
        "uncertainty_mixed": mean_length(out_mixed),
        **_share(kept),
    }
    loss = original + loss_mixed
    if objective.ranking:
        # A mixed image counts as right if the class of its larger part is nearest.
        larger = jnp.where(mixed.lam >= 0.5, labels, other)
        larger_kept = None if kept is None else jnp.where(mixed.lam >= 0.5, kept, jnp.take(kept, partner))
        confusions = [confusion(out, labels, kept), confusion(out_mixed, larger, larger_kept)]
        metrics["loss_ranking"] = order(jnp.concatenate([features, features_mixed]), jnp.concatenate(confusions))
        loss += objective.ranking * metrics["loss_ranking"]
    return loss, (batch_stats, out, metrics | {"loss": loss})


def _share(kept: Bool[Array, "n"] | None) -> dict[str, Array]:
    """The share of the batch that is kept, if images are left out."""
    return {} if kept is None else {"kept": jnp.mean(kept.astype(jnp.float32))}
