"""The loss of one batch of classification: Mixup or CutMix, trunk, introspective classifier, cross-entropy."""

from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from idml_jax import mixing
from idml_jax.losses.softmax import cross_entropy, mixed_targets
from idml_jax.models import EmbeddingModel
from idml_jax.training.criterion import Criterion
from idml_jax.training.state import TrainState
from idml_jax.training.steps import StepSetup, mean_length, normalize, pooled_features


@dataclass(frozen=True)
class Softmax(Criterion):
    """Softmax cross-entropy on mixed images. Hashable.

    Attributes:
      num_classes: number of classes.
      introspective: whether to train on the weakened logits.
      mixing: ``none``, ``mixup`` or ``cutmix``.
      alpha: parameter of the Beta distribution of the mixing share.
      probability: probability that a batch (or an image) is mixed.
      per_sample: whether to draw the mixing for every image instead of once per batch.
      smoothing: share of a target that is spread over all classes.
    """

    num_classes: int
    introspective: bool
    mixing: str = "none"
    alpha: float = 1.0
    probability: float = 1.0
    per_sample: bool = False
    smoothing: float = 0.0

    @property
    def loss(self) -> str:  # type: ignore[override]
        """Name of the loss, for messages."""
        return "softmax" + ("" if self.mixing == "none" else f" with {self.mixing}")

    def batch_loss(self, *arguments: Any) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
        """The loss of a batch; see ``classification_loss``."""
        return classification_loss(*arguments)


def classification_loss(
    trained: dict[str, Any],
    resting: dict[str, Any],
    state: TrainState,
    batch: dict[str, Array],
    setup: StepSetup,
    train_trunk: bool,
) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
    """The loss, and (running statistics, outputs of the heads, metrics); see ``steps.train_step``.

    The metrics are ``loss``, ``lam`` (mean share of the first images) and, with an uncertainty, ``uncertainty`` (mean
    length of u) and ``weakening`` (mean of ``|z' - z|``).
    """
    params, objective = {**trained, **resting}, cast(Softmax, setup.objective)
    images, labels = batch["image"], batch["label"]
    n, height, width, _ = images.shape
    key = jax.random.fold_in(jax.random.key(setup.seed), state.step)
    plan = mixing.plan(
        objective.mixing,
        key,
        n,
        height,
        width,
        alpha=objective.alpha,
        probability=objective.probability,
        per_sample=objective.per_sample,
    )
    normal = lambda x: normalize(x, setup.mean, setup.std)
    if objective.mixing == "none":
        inputs, prepare = (images,), lambda x: normal(x)[:, None]
    else:
        partner, others = mixing.with_partners(images, plan.partner, setup.near)
        plan = plan._replace(partner=partner)
        inputs = (images, others, plan.outside, plan.box)
        prepare = lambda x, other, outside, box: mixing.mix(normal(x), normal(other), outside, box)[:, None]
    features, batch_stats = pooled_features(setup, params["trunk"], state.batch_stats, inputs, prepare, train_trunk)
    out: Any = setup.model.apply({"params": {"heads": params["heads"]}}, features[:, 0], method=EmbeddingModel.embed)
    targets = mixed_targets(
        labels, jnp.take(labels, plan.partner), plan.lam, objective.num_classes, objective.smoothing
    )
    loss = cross_entropy(out["weakened"] if objective.introspective else out["logits"], targets)
    metrics = {"loss": loss, "lam": jnp.mean(plan.lam)}
    if objective.introspective:
        metrics["uncertainty"] = mean_length(out)
        metrics["weakening"] = jnp.mean(jnp.abs(jax.lax.stop_gradient(out["weakened"] - out["logits"])))
    return loss, (batch_stats, out, metrics)
