"""Classification: softmax with the introspective metric (IDML, arXiv 2309.09982, for classification)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from idml_jax.data.datasets import Splits
from idml_jax.errors import UserError
from idml_jax.mixing import METHODS
from idml_jax.models import EmbeddingModel, create_classifier
from idml_jax.training.config import network_options
from idml_jax.training.fields import choice
from idml_jax.training.tasks import classification_summary as summary
from idml_jax.training.tasks.softmax_loss import Softmax
from idml_jax.training.tasks.task import Arrays, Evaluation


@dataclass(frozen=True)
class Classification:
    """The classification task; see ``tasks.task.Task`` for its members."""

    shared_classes: bool = True
    sections: tuple[str, ...] = (
        "training",
        "predictions",
        "knowing",
        "strangers",
        "ambiguity",
        "answers",
        "extremes",
        "map",
        "confusion",
    )
    curve: str = "Accuracy"

    @property
    def headline(self) -> Mapping[str, str]:
        return {"top1": "top-1", "top5": "top-5", "ece": "calibration error"}

    def check(self, config: ConfigDict) -> None:
        choice(config, "classification.mixing", METHODS)
        choice(config, "eval.best_metric", ("top1", "top5"))
        choice(config, "model.init_parts", ("trunk", "all"))
        choice(config, "model.uncertainty_head", ("mlp", "linear", "none"))
        if config.ism.enabled:
            choice(config, "ism.variant", ("relative",))
        if not 0 < config.ism.temperature < math.inf:
            raise UserError(f"config.ism.temperature = {config.ism.temperature} must be above 0 and finite")
        options = config.classification
        if not 0 < options.alpha < math.inf:
            raise UserError(f"config.classification.alpha = {options.alpha} must be above 0 and finite")
        if not 0 <= options.probability <= 1:
            raise UserError(f"config.classification.probability = {options.probability} must be in [0, 1]")
        if not 0 <= options.label_smoothing < 1:
            raise UserError(f"config.classification.label_smoothing = {options.label_smoothing} must be in [0, 1)")
        if config.memory.size:
            raise UserError(f"config.memory.size = {config.memory.size}: classification has no memory; use 0")
        for field, unused in (
            ("class_share", 1.0),
            ("embedding_norm", 0.0),
            ("centre_spread", 0.0),
            ("learned", "none"),
        ):
            if config.loss[field] != unused:
                raise UserError(
                    f"config.loss.{field} = {config.loss[field]!r} is for config.task = 'retrieval'; classification "
                    "has a loss of its own"
                )
        for field in ("ranking", "prior"):
            if config.ism[field]:
                raise UserError(f"config.ism.{field} needs config.task = 'retrieval' and an uncertainty head")
        if config.sharding.proxies == "split":
            raise UserError("config.sharding.proxies = 'split': classification has no proxies; use auto or whole")

    def check_splits(self, splits: Splits) -> None:
        names = list(splits.train.class_names)
        for what, part in (("test", splits.test), ("validation", splits.validation)):
            if part is not None and list(part.class_names) != names:
                odd = sorted(set(part.class_names) ^ set(names))
                first = odd[0] if odd else "none (their order differs)"
                raise UserError(
                    f"config.task = 'classification' needs the same classes in training and {what}; {len(odd)} are in "
                    f"only one of them, the first: {first}"
                )

    def images_per_class(self, config: ConfigDict) -> int:
        return 0

    def model(self, config: ConfigDict, num_classes: int) -> EmbeddingModel:
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

    def stored_model(self, config: ConfigDict, stored: Callable[[], Arrays], folder: Path) -> EmbeddingModel:
        # The number of classes is read from the weights, since the data may be absent.
        bias = stored().get("params/heads/classifier/bias")
        if bias is None:
            raise UserError(f"{folder}: config.task is 'classification', but the weights hold no classifier")
        return self.model(config, len(bias))

    def criterion(self, config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Softmax:
        mix = config.classification
        return Softmax(
            num_classes,
            config.ism.enabled,
            mixing=mix.mixing,
            alpha=mix.alpha,
            probability=mix.probability,
            per_sample=mix.per_sample,
            smoothing=mix.label_smoothing,
        )

    def mixup_alpha(self, config: ConfigDict) -> float:
        return 0.0  # the criterion mixes

    def followed(self, config: ConfigDict) -> Mapping[str, str]:
        return {"top1": "top-1", "top5": "top-5"}

    def loss_text(self, config: ConfigDict) -> str:
        mixing = config.classification.mixing
        return f"softmax{'' if mixing == 'none' else f', {mixing}'}, classifier"

    def measure(self, evaluation: Evaluation) -> dict[str, float]:
        return summary.measure(evaluation)

    def evaluate(self, evaluation: Evaluation) -> tuple[dict[str, float], list[str]]:
        return summary.evaluate(evaluation), []

    def describe(self, metrics: Mapping[str, Any], config: ConfigDict) -> str:
        return summary.describe(metrics)
