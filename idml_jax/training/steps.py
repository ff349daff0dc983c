"""The jitted training step: a function of state and batch that minimises a criterion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from idml_jax.ism import Embedding
from idml_jax.models import EmbeddingModel
from idml_jax.models.layers import FROZEN_STATS
from idml_jax.training.criterion import BatchLoss, Criterion
from idml_jax.training.learning import WHOLE_TRUNK, TrunkLearning, replaced
from idml_jax.training.optim import GroupOptimizer
from idml_jax.training.state import TrainState


@dataclass(frozen=True)
class StepSetup:
    """The fixed parts of a training step. Hashable: a static argument.

    Attributes:
      model: network.
      objective: criterion to minimise.
      optimizer: update rule.
      mean: mean per channel, of images in [0, 1].
      std: standard deviation per channel.
      mixup_alpha: Beta parameter of Mixup; 0: no Mixup.
      seed: seed of Mixup's randomness.
      accumulate: number of parts in which a batch passes through the trunk, for batches whose activations do not fit
        into memory. The loss is over the whole batch. With frozen statistics (or no BatchNorm) the step equals that
        with one part; live statistics are computed per part, and the running statistics are updated once per part.
      loss: loss function of the batch; ``None``: ``objective.batch_loss``.
      ema: decay of the moving averages of weights and statistics used for evaluation; 0: none.
      features: whether ``image`` of a batch holds pooled features [n, f] of a trunk that does not learn.
      near: 0: partners of Mixup and CutMix from the whole batch; otherwise near ones, see ``mixing.with_partners``.
    """

    model: EmbeddingModel
    objective: Criterion
    optimizer: GroupOptimizer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mixup_alpha: float = 0.0
    seed: int = 0
    accumulate: int = 1
    loss: BatchLoss | None = None
    ema: float = 0.0
    near: int = 0
    features: bool = False


def normalize(
    images: UInt8[Array, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n h w c"]:
    """Normalises uint8 images with the mean and standard deviation per channel."""
    per_channel = lambda values: jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255.0 - per_channel(mean)) / per_channel(std)


def pooled_features(
    setup: StepSetup,
    trunk: Any,
    batch_stats: Any,
    inputs: tuple[Array, ...],
    prepare: Callable[..., Float[Array, "m k h w c"]],
    train_trunk: bool,
) -> tuple[Float[Array, "n k f"], Any]:
    """Pooled features of ``k`` network inputs per image, and the running statistics after them.

    With ``setup.accumulate`` above 1 the batch passes through the trunk in that many sequential parts. Every part is
    recomputed for the gradient (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup",
    2021), so that only the activations of one part are in memory. A part has every ``accumulate``-th image, so it is
    spread over all devices like the batch.

    Args:
      setup: fixed parts of the step.
      trunk: parameters of the trunk.
      batch_stats: running statistics.
      inputs: arguments of ``prepare``, arrays ``[n, ...]``.
      prepare: function from some rows of ``inputs`` to the ``k`` normalised network inputs of each image.
      train_trunk: whether the trunk gets a gradient.

    Returns:
      ``[n, k, f]`` features and the new statistics.
    """

    if setup.features:
        return inputs[0][:, None], batch_stats
    count, learning = setup.accumulate, setup.optimizer.trunk
    model = setup.model if count == 1 else setup.model.looped

    def part(trunk: Any, batch_stats: Any, inputs: tuple[Array, ...]) -> tuple[Any, Array]:
        images = prepare(*inputs)
        m, k = images.shape[:2]
        variables = {"params": {"trunk": trunk}, "batch_stats": batch_stats}
        if frozen := learning.frozen(batch_stats.get("trunk", {})):
            variables[FROZEN_STATS] = {"trunk": frozen}
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
        batch_stats, features = part(trunk, batch_stats, inputs)
        return features, batch_stats
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
    again = jax.checkpoint(part, prevent_cse=False)
    batch_stats, features = jax.lax.scan(
        lambda stats, some: again(trunk, stats, some), batch_stats, jax.tree.map(split, inputs)
    )
    features = jnp.moveaxis(features, 0, 1)
    return features.reshape(-1, *features.shape[2:]), batch_stats


def embedding_of(out: dict[str, Array]) -> Embedding:
    """The outputs of the heads as an ``Embedding``."""
    return Embedding(out["semantic"], out["uncertainty"])


def mean_length(out: dict[str, Array]) -> Float[Array, ""]:
    """Mean length of the uncertainty embeddings."""
    return jnp.mean(jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(out["uncertainty"])), axis=-1)))


def averaged(ema: Any, values: dict[str, Any], step: Array, decay: float, learning: TrunkLearning = WHOLE_TRUNK) -> Any:
    """Moving averages after one more step; in the first steps the decay is at most (1 + step) / (10 + step).

    What does not learn is its own average, without the rounding of a sum.
    """
    share = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    values = {kind: {k: values[kind][k] for k in groups} for kind, groups in ema.items()}
    moved: Any = jax.tree.map(lambda old, new: share * old + (1.0 - share) * new, ema, values)
    if learning.everything:
        return moved
    return {
        kind: {k: replaced(tree, learning.frozen(values[kind][k])) if k == "trunk" else tree for k, tree in of.items()}
        for kind, of in moved.items()
    }


def train_step(
    state: TrainState, batch: dict[str, Array], *, setup: StepSetup, train_trunk: bool = True
) -> tuple[TrainState, dict[str, Array]]:
    """One training step over the global batch. Pure; jit it with ``setup`` and ``train_trunk`` static.

    Args:
      state: state before the step.
      batch: ``image`` [n, h, w, c] uint8 (or features, see ``StepSetup``) and ``label`` [n].
      setup: fixed parts of the step.
      train_trunk: false during warm-up: only heads and the loss's parameters move, and no gradient is computed for
        the trunk. Otherwise the parts of it learn that ``setup.optimizer.trunk`` says.

    Returns:
      The state after the step and scalar metrics: ``loss`` and its parts, mean length of the uncertainty embedding
      (``uncertainty``, ``uncertainty_mixed``), ``gradient_norm`` before clipping and ``learning_rate``.
    """
    learning, batch_loss = setup.optimizer.trunk, setup.loss or setup.objective.batch_loss
    train_trunk = train_trunk and learning.anything
    trained = {k: v for k, v in state.params.items() if train_trunk or k != "trunk"}
    resting = {k: v for k, v in state.params.items() if k not in trained}
    if train_trunk and not learning.everything:
        trained["trunk"] = learning.learning(trained["trunk"])

    def loss(trained: dict[str, Any]) -> tuple[Array, Any]:
        # Only what learns is differentiated, so the backward pass ends at the first block that learns.
        if train_trunk:
            trunk = setup.optimizer.rested(trained["trunk"])
            whole = trunk if learning.everything else replaced(state.params["trunk"], trunk)
            trained = {**trained, "trunk": whole}
        return batch_loss(trained, resting, state, batch, setup, train_trunk)

    grads, (batch_stats, out, metrics) = jax.grad(loss, has_aux=True)(trained)
    params, opt_state = setup.optimizer.update(grads, state.opt_state, state.params, state.step)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = setup.optimizer.schedule(state.step)
    memory = setup.objective.remember(state.memory, embedding_of(out), batch["label"])
    if setup.ema:
        values = {"params": params, "batch_stats": batch_stats}
        opt_state["ema"] = averaged(opt_state["ema"], values, state.step, setup.ema, learning)
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, memory=memory
    )
    return state, metrics


jit_train_step = jax.jit(train_step, static_argnames=("setup", "train_trunk"), donate_argnames=("state",))
# Not donated, for JAX's checks: a step that gave NaN is recomputed from the state, which must still exist.
jit_checked_train_step = jax.jit(train_step, static_argnames=("setup", "train_trunk"))
