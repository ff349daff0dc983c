"""The interface of a task: everything in which retrieval and classification runs differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from idml_jax.data.datasets import Splits
from idml_jax.data.images.transforms import Transform
from idml_jax.data.sources import Source
from idml_jax.models import EmbeddingModel
from idml_jax.training.criterion import Criterion
from idml_jax.training.embedder import Embedder

Arrays = Mapping[str, np.ndarray]
R = TypeVar("R")


@dataclass(frozen=True)
class Evaluation:
    """A network and the images to evaluate it on.

    Attributes:
      config: settings of the run.
      embedder: network, weights, transform and devices.
      splits: images of the run.
      results: what ``once`` has computed so far.
    """

    config: ConfigDict
    embedder: Embedder
    splits: Splits
    results: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, compute: Callable[[], R]) -> R:
        """The result of ``compute``, which is called once per name: measuring and evaluating in full share it."""
        if name not in self.results:
            self.results[name] = compute()
        found: R = self.results[name]
        return found

    @property
    def source(self) -> Source:
        """The images used for evaluation: the queries."""
        source = self.splits.test if self.config.eval.split == "test" else self.splits.validation
        assert source is not None  # config_checks refuses such settings
        return source

    @property
    def gallery(self) -> Source | None:
        """The images that the queries search; ``None`` if they search each other, as held-out classes always do."""
        return self.splits.gallery if self.config.eval.split == "test" else None

    @property
    def held_out(self) -> Source | None:
        """Images of held-out classes; ``None`` if there are none or they are themselves evaluated."""
        return self.splits.validation if self.config.eval.split == "test" else None

    def changed(self, transform: Transform) -> Embedder:
        """The embedder with another transform."""
        return replace(self.embedder, transform=transform)


class Task(Protocol):
    """Builds model and loss, evaluates, and selects what is shown. One instance per task, in ``TASKS``.

    Attributes:
      shared_classes: whether training and test images have the same classes.
      sections: names of the sections of the report's page, in order; see ``reporting.sections.SECTIONS``.
      headline: main metrics of the run: name in the results to displayed name.
      curve: title of the curve of the headline metrics.
    """

    @property
    def shared_classes(self) -> bool: ...
    @property
    def sections(self) -> tuple[str, ...]: ...
    @property
    def headline(self) -> Mapping[str, str]: ...
    @property
    def curve(self) -> str: ...

    def check(self, config: ConfigDict) -> None:
        """Raises ``UserError`` for settings that this task cannot work with."""
        ...

    def check_splits(self, splits: Splits) -> None:
        """Raises ``UserError`` for images that this task cannot work with."""
        ...

    def images_per_class(self, config: ConfigDict) -> int:
        """Default K of P x K batches; 0: plain shuffling."""
        ...

    def model(self, config: ConfigDict, num_classes: int) -> EmbeddingModel:
        """The network. Raises ``UserError`` if the network lacks a requested feature."""
        ...

    def stored_model(self, config: ConfigDict, stored: Callable[[], Arrays], folder: Path) -> EmbeddingModel:
        """The network of a finished run, without its data.

        Args:
          config: settings of the run.
          stored: function that reads the tensors of the checkpoint.
          folder: folder of the checkpoint, for messages.
        """
        ...

    def criterion(self, config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Criterion:
        """The criterion that a step minimises. Raises ``UserError`` for settings that cannot work."""
        ...

    def mixup_alpha(self, config: ConfigDict) -> float:
        """Beta parameter of the step's Mixup; 0: no Mixup."""
        ...

    def followed(self, config: ConfigDict) -> Mapping[str, str]:
        """Metrics whose curve over the epochs is shown: name in the results to displayed name."""
        ...

    def loss_text(self, config: ConfigDict) -> str:
        """The loss and the width of the embedding in a few words, for the report."""
        ...

    def measure(self, evaluation: Evaluation) -> dict[str, float]:
        """Computes the metrics that are measured during training."""
        ...

    def evaluate(self, evaluation: Evaluation) -> tuple[dict[str, float], list[str]]:
        """Computes all metrics, for the end of a run, and warnings, one line each."""
        ...

    def describe(self, metrics: Mapping[str, Any], config: ConfigDict) -> str:
        """The headline metrics in one line."""
        ...
