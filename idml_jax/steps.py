"""The two jitted steps, training and embedding, as functions of state and batch."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from idml_jax import mixing
from idml_jax.ism import Embedding
from idml_jax.models import EmbeddingModel
from idml_jax.objective import Objective
from idml_jax.optim import GroupOptimizer
from idml_jax.state import TrainState


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
    """

    model: EmbeddingModel
    objective: Objective
    optimizer: GroupOptimizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mixup_alpha: float = 0.0
    seed: int = 0


def normalize(
    images: UInt8[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """uint8 pictures to zero mean and unit deviation per channel."""
    per_channel = lambda values: jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255.0 - per_channel(mean)) / per_channel(std)


def _forward(
    setup: StepSetup, params: dict[str, Any], batch_stats: Any, images: Array, train_trunk: bool
) -> tuple[dict[str, Array], Any]:
    variables = {"params": {k: params[k] for k in ("trunk", "heads")}, "batch_stats": batch_stats}
    features, updated = setup.model.apply(
        variables, images, True, method=EmbeddingModel.features, mutable=["batch_stats"]
    )
    if not train_trunk:
        features = jax.lax.stop_gradient(features)
    out = setup.model.apply(variables, features, method=EmbeddingModel.embed)
    return out, updated.get("batch_stats", batch_stats)


def _loss(
    trained: dict[str, Any],
    resting: dict[str, Any],
    state: TrainState,
    batch: dict[str, Array],
    setup: StepSetup,
    train_trunk: bool,
) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
    params = {**trained, **resting}
    labels = batch["label"]
    images = normalize(batch["image"], setup.mean, setup.std)
    mixup_key, *draws = jax.random.split(jax.random.fold_in(jax.random.key(setup.seed), state.step), 4)

    def criterion(out: dict[str, Array], labels: Array, key: Array) -> Array:
        embedding = Embedding(out["semantic"], out["uncertainty"])
        return setup.objective(params, embedding, labels, key=key, store=state.memory, step=state.step)

    if not setup.mixup_alpha:
        out, batch_stats = _forward(setup, params, state.batch_stats, images, train_trunk)
        loss = criterion(out, labels, draws[0])
        return loss, (batch_stats, out, {"loss": loss, "uncertainty": _mean_length(out)})

    mixed = mixing.mixup(mixup_key, images, setup.mixup_alpha)
    if setup.model.trunk.frozen_statistics:
        # Rows do not see each other in the trunk, so one pass over both is the same as two.
        both, batch_stats = _forward(
            setup, params, state.batch_stats, jnp.concatenate([images, mixed.images]), train_trunk
        )
        n = images.shape[0]
        out = jax.tree.map(lambda x: x[:n], both)
        out_mixed = jax.tree.map(lambda x: x[n:], both)
    else:
        out, batch_stats = _forward(setup, params, state.batch_stats, images, train_trunk)
        out_mixed, batch_stats = _forward(setup, params, batch_stats, mixed.images, train_trunk)
    original = criterion(out, labels, draws[0])
    loss_mixed = mixed.lam * criterion(out_mixed, labels, draws[1])
    loss_mixed += (1.0 - mixed.lam) * criterion(out_mixed, jnp.take(labels, mixed.partner), draws[2])
    metrics = {
        "loss": original + loss_mixed,
        "loss_original": original,
        "loss_mixed": loss_mixed,
        "uncertainty": _mean_length(out),
        "uncertainty_mixed": _mean_length(out_mixed),
    }
    return original + loss_mixed, (batch_stats, out, metrics)


def _mean_length(out: dict[str, Array]) -> Float[Array, ""]:
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
    grads, (batch_stats, out, metrics) = jax.grad(_loss, has_aux=True)(
        trained, resting, state, batch, setup, train_trunk
    )
    params, opt_state = setup.optimizer.update(grads, state.opt_state, state.params, state.step)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = setup.optimizer.schedule(state.step)
    memory = setup.objective.remember(state.memory, Embedding(out["semantic"], out["uncertainty"]), batch["label"])
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, memory=memory
    )
    return state, metrics


def embed_step(variables: Any, images: UInt8[Array, "n h w c"], *, setup: StepSetup) -> dict[str, Array]:
    """Embeddings of uint8 pictures: ``semantic`` [n, d], ``uncertainty`` [n, k], ``semantic_norm`` [n]."""
    out = setup.model.apply(variables, normalize(images, setup.mean, setup.std), False)
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
    out = setup.model.apply(variables, mixing.blend(normal(images), normal(others), lam), False)
    return {key: out[key] for key in ("semantic", "uncertainty", "semantic_norm")}


jit_train_step = jax.jit(train_step, static_argnames=("setup", "train_trunk"), donate_argnames=("state",))
jit_embed_step = jax.jit(embed_step, static_argnames=("setup",))
jit_embed_mixed_step = jax.jit(embed_mixed_step, static_argnames=("setup",))
