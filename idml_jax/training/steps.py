"""The two jitted steps, training and embedding, as functions of state and batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from idml_jax import mixing
from idml_jax.ism import Embedding
from idml_jax.losses import auxiliary as difficulty
from idml_jax.models import EmbeddingModel
from idml_jax.training.optim import GroupOptimizer
from idml_jax.training.state import TrainState
from idml_jax.training.tasks.objective import Objective


@dataclass(frozen=True)
class StepSetup:
    """All that is fixed about a step. Hashable: a static argument.

    Attributes:
      model: network.
      objective: loss.
      optimizer: update rule.
      mean: per channel, of pictures in [0, 1].
      std: per channel.
      mixup_alpha: Beta parameter of Mixup; 0: no Mixup.
      seed: of Mixup's randomness.
      accumulate: parts in which the trunk sees a batch, for batches whose activations do not fit into memory. The loss
        is over the whole batch. With frozen statistics (or no BatchNorm) the step is the same as with one part; live
        ones are those of every part by itself, and the running statistics move once per part.
      loss: of the batch, called as ``embedding_loss``, which stands for ``None``.
      ema: decay of the moving averages of weights and statistics by which a run is evaluated; 0: none.
    """

    model: EmbeddingModel
    objective: Objective
    optimizer: GroupOptimizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mixup_alpha: float = 0.0
    seed: int = 0
    accumulate: int = 1
    loss: Callable[..., Any] | None = None
    ema: float = 0.0


def normalize(
    images: UInt8[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """uint8 pictures to zero mean and unit deviation per channel."""
    per_channel = lambda values: jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255.0 - per_channel(mean)) / per_channel(std)


def pooled_features(
    setup: StepSetup,
    trunk: Any,
    batch_stats: Any,
    pictures: tuple[Array, ...],
    prepare: Callable[..., Float[Array, "m k h w c"]],
    train_trunk: bool,
) -> tuple[Float[Array, "n k f"], Any]:
    """Pooled features of ``k`` inputs made of every picture, and the running statistics after them.

    With ``setup.accumulate`` above 1 the trunk sees the batch in so many parts, one after the other, and for the
    gradient every part is computed again (Gao et al., "Scaling deep contrastive learning batch size under memory
    limited setup", 2021), so that the activations of one part are all that is held. A part has every
    ``accumulate``-th picture, so it lies on all devices as the batch does.

    Args:
      setup: of the step.
      trunk: parameters.
      batch_stats: running statistics.
      pictures: what ``prepare`` takes, arrays ``[n, ...]``.
      prepare: makes normalised inputs of some of the pictures.
      train_trunk: whether a gradient is wanted.

    Returns:
      ``[n, k, f]`` features and the new statistics.
    """

    count = setup.accumulate
    model = setup.model if count == 1 else setup.model.looped

    def part(trunk: Any, batch_stats: Any, pictures: tuple[Array, ...]) -> tuple[Any, Array]:
        images = prepare(*pictures)
        m, k = images.shape[:2]
        variables = {"params": {"trunk": trunk}, "batch_stats": batch_stats}
        features, updated = model.apply(
            variables,
            images.reshape(m * k, *images.shape[2:]),
            True,
            method=EmbeddingModel.features,
            mutable=["batch_stats"],
        )
        if not train_trunk:
            features = jax.lax.stop_gradient(features)
        return updated.get("batch_stats", batch_stats), features.reshape(m, k, -1)

    if count == 1:
        batch_stats, features = part(trunk, batch_stats, pictures)
        return features, batch_stats
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    again = jax.checkpoint(part, prevent_cse=False)
    batch_stats, features = jax.lax.scan(
        lambda stats, some: again(trunk, stats, some), batch_stats, jax.tree.map(split, pictures)
    )
    features = jnp.moveaxis(features, 0, 1)
    return features.reshape(-1, *features.shape[2:]), batch_stats


def embedding_loss(
    trained: dict[str, Any],
    resting: dict[str, Any],
    state: TrainState,
    batch: dict[str, Array],
    setup: StepSetup,
    train_trunk: bool,
) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
    """The loss of metric learning, and (running statistics, outputs of the heads for the originals, figures)."""
    params = {**trained, **resting}
    images, labels = batch["image"], batch["label"]
    mixup_key, *draws = jax.random.split(jax.random.fold_in(jax.random.key(setup.seed), state.step), 4)
    normal = lambda x: normalize(x, setup.mean, setup.std)

    def pooled(batch_stats: Any, pictures: tuple[Array, ...], prepare: Callable[..., Array]) -> tuple[Array, Any]:
        return pooled_features(setup, params["trunk"], batch_stats, pictures, prepare, train_trunk)

    def embed(features: Array) -> Any:
        return setup.model.apply({"params": {"heads": params["heads"]}}, features, method=EmbeddingModel.embed)

    def criterion(out: dict[str, Array], labels: Array, key: Array) -> Array:
        return setup.objective(params, embedding_of(out), labels, key=key, store=state.memory, step=state.step)

    def confusion(out: dict[str, Array], labels: Array) -> Array:
        return setup.objective.confusion(params, embedding_of(out), labels)

    def order(features: Array, confusions: Array) -> Array:
        # The trunk belongs to the metric; only the uncertainty head learns the order.
        return difficulty.ranking_loss(embed(jax.lax.stop_gradient(features))["uncertainty"], confusions)

    if not setup.mixup_alpha:
        features, batch_stats = pooled(state.batch_stats, (images,), lambda x: normal(x)[:, None])
        out = embed(features[:, 0])
        loss = criterion(out, labels, draws[0])
        metrics = {"loss": loss, "uncertainty": mean_length(out)}
        if setup.objective.ranking:
            metrics["loss_ranking"] = order(features[:, 0], confusion(out, labels))
            loss += setup.objective.ranking * metrics["loss_ranking"]
        return loss, (batch_stats, out, metrics | {"loss": loss})

    # Who is mixed with whom and how; the pictures themselves are mixed where they are used.
    mixed = mixing.mixup(mixup_key, jnp.zeros((images.shape[0], 1, 1, 1)), setup.mixup_alpha)
    blend = lambda x, other: mixing.blend(normal(x), normal(other), mixed.lam)
    both = (images, jnp.take(images, mixed.partner, axis=0))
    if setup.model.independent_rows:
        # Rows do not see each other in the trunk, so one pass over both is the same as two.
        features, batch_stats = pooled(
            state.batch_stats, both, lambda x, other: jnp.stack([normal(x), blend(x, other)], axis=1)
        )
        features, features_mixed = features[:, 0], features[:, 1]
    else:
        features, batch_stats = pooled(state.batch_stats, both[:1], lambda x: normal(x)[:, None])
        features_mixed, batch_stats = pooled(batch_stats, both, lambda x, other: blend(x, other)[:, None])
        features, features_mixed = features[:, 0], features_mixed[:, 0]
    out, out_mixed = embed(features), embed(features_mixed)
    original = criterion(out, labels, draws[0])
    other = jnp.take(labels, mixed.partner)
    loss_mixed = mixed.lam * criterion(out_mixed, labels, draws[1])
    loss_mixed += (1.0 - mixed.lam) * criterion(out_mixed, other, draws[2])
    metrics = {
        "loss_original": original,
        "loss_mixed": loss_mixed,
        "uncertainty": mean_length(out),
        "uncertainty_mixed": mean_length(out_mixed),
    }
    loss = original + loss_mixed
    if setup.objective.ranking:
        # A mixed picture is right where its larger part is found.
        larger = jnp.where(mixed.lam >= 0.5, labels, other)
        confusions = [confusion(out, labels), confusion(out_mixed, larger)]
        metrics["loss_ranking"] = order(jnp.concatenate([features, features_mixed]), jnp.concatenate(confusions))
        loss += setup.objective.ranking * metrics["loss_ranking"]
    return loss, (batch_stats, out, metrics | {"loss": loss})


def averaged(ema: Any, values: dict[str, Any], step: Array, decay: float) -> Any:
    """Moving averages after one more step; those of the first steps have a smaller decay, (1 + step) / (10 + step)."""
    share = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    values = {kind: {k: values[kind][k] for k in groups} for kind, groups in ema.items()}
    return jax.tree.map(lambda old, new: share * old + (1.0 - share) * new, ema, values)


def embedding_of(out: dict[str, Array]) -> Embedding:
    """What the heads give, as the metric takes it."""
    return Embedding(out["semantic"], out["uncertainty"])


def mean_length(out: dict[str, Array]) -> Float[Array, ""]:
    """Mean length of the uncertainty embeddings."""
    return jnp.mean(jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(out["uncertainty"])), axis=-1)))


def train_step(
    state: TrainState, batch: dict[str, Array], *, setup: StepSetup, train_trunk: bool = True
) -> tuple[TrainState, dict[str, Array]]:
    """One training step over the global batch. Pure; jit it with ``setup`` and ``train_trunk`` static.

    Args:
      state: before the step.
      batch: ``image`` [n, h, w, c] uint8 and ``label`` [n].
      setup: what is fixed.
      train_trunk: false during warm-up: only heads and the loss's parameters move, and no gradient is computed for
        the trunk.

    Returns:
      The state after the step and scalar metrics: ``loss`` and its parts, mean length of the uncertainty embedding
      (``uncertainty``, ``uncertainty_mixed``), ``gradient_norm`` before clipping and ``learning_rate``.
    """
    trained = {k: v for k, v in state.params.items() if train_trunk or k != "trunk"}
    resting = {k: v for k, v in state.params.items() if k not in trained}
    grads, (batch_stats, out, metrics) = jax.grad(setup.loss or embedding_loss, has_aux=True)(
        trained, resting, state, batch, setup, train_trunk
    )
    params, opt_state = setup.optimizer.update(grads, state.opt_state, state.params, state.step)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = setup.optimizer.schedule(state.step)
    memory = setup.objective.remember(state.memory, embedding_of(out), batch["label"])
    if setup.ema:
        values = {"params": params, "batch_stats": batch_stats}
        opt_state["ema"] = averaged(opt_state["ema"], values, state.step, setup.ema)
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, memory=memory
    )
    return state, metrics


def embed_step(variables: Any, images: UInt8[Array, "n h w c"], *, setup: StepSetup) -> dict[str, Array]:
    """Embeddings of uint8 pictures: ``semantic`` [n, d], ``uncertainty`` [n, k], ``semantic_norm`` [n]."""
    out: Any = setup.model.apply(variables, normalize(images, setup.mean, setup.std), False)
    return {key: out[key] for key in ("semantic", "uncertainty", "semantic_norm")}


def embed_mixed_step(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    others: UInt8[Array, "n h w c"],
    lam: float = 0.5,
    *,
    setup: StepSetup,
) -> dict[str, Array]:
    """Embeddings of pictures blended with others, as ``embed_step``."""
    normal = lambda x: normalize(x, setup.mean, setup.std)
    out: Any = setup.model.apply(variables, mixing.blend(normal(images), normal(others), lam), False)
    return {key: out[key] for key in ("semantic", "uncertainty", "semantic_norm")}


jit_train_step = jax.jit(train_step, static_argnames=("setup", "train_trunk"), donate_argnames=("state",))
# For jax's checks: a step that gave NaN is computed once more from the state, which must still be there.
jit_checked_train_step = jax.jit(train_step, static_argnames=("setup", "train_trunk"))
jit_embed_step = jax.jit(embed_step, static_argnames=("setup",))
jit_embed_mixed_step = jax.jit(embed_mixed_step, static_argnames=("setup",))
