"""Classification inside the jitted steps: the loss of a mixed batch, and predictions."""

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from idml_jax import mixing
from idml_jax.data.datasets import Splits
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.losses.softmax import cross_entropy, mixed_targets
from idml_jax.metrics.classification import batch_sums
from idml_jax.models import EmbeddingModel, create_classifier
from idml_jax.training.config import network_options
from idml_jax.training.state import TrainState
from idml_jax.training.steps import StepSetup, mean_length, normalize, pooled_features


@dataclass(frozen=True)
class Softmax:
    """Cross-entropy of softmax on mixed pictures, in the place of an ``Objective``. Hashable.

    Attributes:
      num_classes: number of classes.
      introspective: the training logits are the weakened ones.
      mixing: ``none``, ``mixup`` or ``cutmix``.
      alpha: parameter of their Beta distribution.
      probability: of being mixed.
      per_sample: mix every picture in its own way.
      smoothing: of the labels.
    """

    num_classes: int
    introspective: bool
    mixing: str = "none"
    alpha: float = 1.0
    probability: float = 1.0
    per_sample: bool = False
    smoothing: float = 0.0

    @property
    def split(self) -> tuple[str, ...]:
        """Nothing is split over devices."""
        return ()

    @property
    def loss(self) -> str:
        """Its name, for messages."""
        return "softmax" + ("" if self.mixing == "none" else f" with {self.mixing}")

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """No parameters beside the network's."""
        return {}

    def init_memory(self) -> tuple[()]:
        """No memory."""
        return ()

    def remember(self, store: tuple[()], embedding: Embedding, labels: Int[Array, "n"]) -> tuple[()]:
        """Nothing."""
        return store


def classification_loss(
    trained: dict[str, Any],
    resting: dict[str, Any],
    state: TrainState,
    batch: dict[str, Array],
    setup: StepSetup,
    train_trunk: bool,
) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
    """The loss, and (running statistics, outputs of the heads, figures); see ``steps.train_step``.

    The figures are ``loss``, ``lam``, the mean share of the first pictures, and, where there is an uncertainty,
    ``uncertainty``, the mean length of u, and ``weakening``, the mean of ``|z' - z|``.
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
        pictures, prepare = (images,), lambda x: normal(x)[:, None]
    else:
        pictures = (images, jnp.take(images, plan.partner, axis=0), plan.outside, plan.box)
        prepare = lambda x, other, outside, box: mixing.mix(normal(x), normal(other), outside, box)[:, None]
    features, batch_stats = pooled_features(setup, params["trunk"], state.batch_stats, pictures, prepare, train_trunk)
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


def _scores(out: dict[str, Array]) -> dict[str, Array]:
    """Per picture, larger meaning less sure."""
    log_probability = jax.nn.log_softmax(out["logits"], axis=1)
    return {
        "u": jnp.linalg.norm(out["uncertainty"], axis=1),
        "max_softmax": 1.0 - jnp.exp(jnp.max(log_probability, axis=1)),
        "entropy": -jnp.sum(jnp.exp(log_probability) * log_probability, axis=1),
    }


def predict_step(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    labels: Int[Array, "n"],
    mask: Bool[Array, "n"],
    *,
    setup: StepSetup,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Plain logits judged.

    Args:
      variables: of the model.
      images: pictures.
      labels: their classes.
      mask: false for padding, which has no effect on the sums.
      setup: of the steps.

    Returns:
      ``metrics.classification.batch_sums``, and per picture, padding included, ``right`` and how unsure the network is:
      ``u`` (length of the uncertainty), ``max_softmax`` (1 less the largest probability), ``entropy`` (nats).
    """
    out: Any = setup.model.apply(variables, normalize(images, setup.mean, setup.std), False)
    right = jax.vmap(lambda row, label: batch_sums(row[None], label[None])["top1"])(out["logits"], labels)
    return batch_sums(out["logits"], labels, mask), {"right": right, **_scores(out)}


def predict_mixed_step(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    others: UInt8[Array, "n h w c"],
    *,
    setup: StepSetup,
    method: str,
) -> dict[str, Array]:
    """How unsure the network is of pictures mixed with others in about equal parts, as ``predict_step``.

    Args:
      variables: of the model.
      images: pictures.
      others: their partners.
      setup: of the steps.
      method: ``mixup`` (equal weights) or ``cutmix`` (a central box of half the area).

    Returns:
      Scores per picture.
    """
    n, height, width, _ = images.shape
    normal = lambda x: normalize(x, setup.mean, setup.std)
    if method == "mixup":
        outside, box = 0.5, (0, 0, 0, 0)
    else:
        rows, columns = round(height * 0.5**0.5), round(width * 0.5**0.5)
        top, left = (height - rows) // 2, (width - columns) // 2
        outside, box = 1.0, (top, left, top + rows, left + columns)
    boxes = jnp.broadcast_to(jnp.asarray(box, jnp.int32)[None], (n, 4))
    mixed = mixing.mix(normal(images), normal(others), jnp.full((n,), outside), boxes)
    out: Any = setup.model.apply(variables, mixed, False)
    return _scores(out)


jit_predict_step = jax.jit(predict_step, static_argnames=("setup",))
jit_predict_mixed_step = jax.jit(predict_mixed_step, static_argnames=("setup", "method"))


def create_network(config: ConfigDict, num_classes: int) -> EmbeddingModel:
    """The classifier of a run.

    Raises:
      UserError: if the network has not what is asked of it.
    """
    model = config.model
    try:
        return create_classifier(
            model.name,
            num_classes=num_classes,
            uncertainty_head=model.uncertainty_head if config.ism.enabled else "none",
            temperature=config.ism.temperature,
            **network_options(model),
        )
    except ValueError as error:
        raise UserError(f"{error} (config.model)") from error


def for_classification(setup: StepSetup, config: ConfigDict, splits: Splits) -> StepSetup:
    """The set-up of a run with a classifier in the place of the embedding and its loss.

    Raises:
      UserError: if training and test images are not of the same classes, or the network has not what is asked of it.
    """
    names = list(splits.train.class_names)
    for what, part in (("test", splits.test), ("validation", splits.validation)):
        if part is not None and list(part.class_names) != names:
            odd = sorted(set(part.class_names) ^ set(names))
            raise UserError(
                f"config.task = 'classification' needs the same classes in training and {what}; {len(odd)} are in one "
                f"of them alone, the first: {odd[0] if odd else 'none (their order differs)'}"
            )
    mix = config.classification
    network = create_network(config, len(names))
    objective: Any = Softmax(
        len(names), config.ism.enabled, mix.mixing, mix.alpha, mix.probability, mix.per_sample, mix.label_smoothing
    )
    return dataclasses.replace(setup, model=network, objective=objective, loss=classification_loss, mixup_alpha=0.0)
