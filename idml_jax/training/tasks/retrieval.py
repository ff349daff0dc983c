"""Retrieval: an embedding learned by a loss on pairs or proxies, with the introspective metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from idml_jax.data.datasets import Splits
from idml_jax.errors import UserError
from idml_jax.models import EmbeddingModel, create_model
from idml_jax.runtime import sharding
from idml_jax.training.config import SPLIT_CLASSES, network_options
from idml_jax.training.fields import choice
from idml_jax.training.tasks import retrieval_summary as summary
from idml_jax.training.tasks.metrics_of_run import training_metric
from idml_jax.training.tasks.objective import Objective
from idml_jax.training.tasks.prism_objective import PrismObjective
from idml_jax.training.tasks.task import Arrays, Evaluation
from idml_jax.training.tasks.terms import reads_batch, reads_proxies, terms_of

# What a run of idml_jax.fit is called in place of a loss.
CLOSED_FORMS = {"whiten": "within-class whitening", "lda": "LDA", "pca": "whitening"}


@dataclass(frozen=True)
class Retrieval:
    """The retrieval task; see ``tasks.task.Task`` for its members."""

    shared_classes: bool = False
    sections: tuple[str, ...] = (
        "training",
        "knowing",
        "strangers",
        "verification",
        "ambiguity",
        "answers",
        "extremes",
        "map",
        "confusion",
    )
    curve: str = "Recall"

    @property
    def headline(self) -> Mapping[str, str]:
        return {"R@1": "R@1", "MAP@R": "MAP@R"}

    def check(self, config: ConfigDict) -> None:
        choice(config, "eval.best_metric", (*(f"R@{k}" for k in config.eval.ks), "RP", "MAP@R"))
        if config.memory.size and config.memory.size < config.batch_size:
            raise UserError(
                f"config.memory.size ({config.memory.size}) must be 0 or at least config.batch_size "
                f"({config.batch_size})"
            )
        if config.sharding.proxies == "split" and not reads_proxies(config.loss.name):
            raise UserError(
                f"config.sharding.proxies = 'split': the loss {config.loss.name} has no proxies; use auto or whole"
            )

    def check_splits(self, splits: Splits) -> None:
        """Accepts any classes."""

    def images_per_class(self, config: ConfigDict) -> int:
        return 4 if reads_batch(config.loss.name) else 0

    def model(self, config: ConfigDict, num_classes: int) -> EmbeddingModel:
        model = config.model
        try:
            return create_model(
                model.name,
                embedding_dim=model.embedding_dim,
                uncertainty_head=model.uncertainty_head,
                **network_options(model),
            )
        except ValueError as error:
            raise UserError(f"{error} (config.model)") from error

    def stored_model(self, config: ConfigDict, stored: Callable[[], Arrays], folder: Path) -> EmbeddingModel:
        return self.model(config, 0)

    def criterion(self, config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Objective:
        split = self._splits_proxies(config, num_classes)
        if split:
            sharding.check_rows(num_classes, mesh)
        terms = terms_of(config)
        alone = len(terms) == 1 and terms[0].weight == 1
        kind: Callable[..., Objective] = Objective
        if config.prism.share:
            steps = config.prism.warmup_epochs * steps_per_epoch
            kind = partial(
                PrismObjective,
                share=config.prism.share,
                window=config.prism.window,
                features=config.prism.features,
                warmup=steps,
            )
        return kind(
            loss=config.loss.name,
            options=terms[0].options if alone else (),
            terms=() if alone else terms,
            metric=training_metric(config),
            num_classes=num_classes,
            dim=config.model.embedding_dim,
            uncertainty_dim=config.model.uncertainty_dim,
            learned=config.loss.learned,
            memory_size=config.memory.size,
            memory_warmup=config.memory.warmup_epochs * steps_per_epoch,
            ranking=config.ism.ranking,
            prior=config.ism.prior,
            prior_by=config.ism.prior_by,
            negatives=config.ism.negatives,
            attenuation=config.ism.attenuation,
            mesh=mesh if split else None,
            rows=mesh,
            class_share=config.loss.class_share,
            centre_spread=config.loss.centre_spread,
            embedding_norm=config.loss.embedding_norm,
        )

    def _splits_proxies(self, config: ConfigDict, num_classes: int) -> bool:
        """Whether the proxies are split over devices."""
        wanted = num_classes >= SPLIT_CLASSES if config.sharding.proxies == "auto" else True
        able = reads_proxies(config.loss.name)
        return able and wanted and config.sharding.proxies != "whole"

    def mixup_alpha(self, config: ConfigDict) -> float:
        return config.mixup.alpha if config.mixup.enabled else 0.0

    def followed(self, config: ConfigDict) -> Mapping[str, str]:
        return {f"R@{k}": f"R@{k}" for k in config.eval.ks}

    def loss_text(self, config: ConfigDict) -> str:
        name = CLOSED_FORMS[config.fit.method] if config.fit.only else config.loss.name
        return f"{name}, {config.model.embedding_dim}-d"

    def measure(self, evaluation: Evaluation) -> dict[str, float]:
        return summary.measure(evaluation)

    def evaluate(self, evaluation: Evaluation) -> tuple[dict[str, float], list[str]]:
        return summary.evaluate(evaluation)

    def describe(self, metrics: Mapping[str, Any], config: ConfigDict) -> str:
        names = (*(f"R@{k}" for k in config.eval.ks), "RP", "MAP@R")
        return "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in names)
