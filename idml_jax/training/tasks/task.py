"""What a task is: everything that a run of retrieval does otherwise than a run of classification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Evaluation:
    """A network and the images that it is to be measured on.

    Attributes:
      config: settings of the run.
      embedder: network, weights, transform and devices.
      splits: images of the run.
    """

    config: ConfigDict
    embedder: Embedder
    splits: Splits

    @property
    def source(self) -> Source:
        """The images that evaluation goes by: the queries."""
        source = self.splits.test if self.config.eval.split == "test" else self.splits.validation
        assert source is not None  # config_checks refuses such settings
        return source

    @property
    def gallery(self) -> Source | None:
        """What those images search; ``None`` where they search each other, as held-out classes always do."""
        return self.splits.gallery if self.config.eval.split == "test" else None

    @property
    def held_out(self) -> Source | None:
        """Images of held-out classes; ``None`` without any, or where they are what is evaluated."""
        return self.splits.validation if self.config.eval.split == "test" else None

    def changed(self, transform: Transform) -> Embedder:
        """The embedder with another transform."""
        return replace(self.embedder, transform=transform)


class Task(Protocol):
    """Builds model and loss, measures, and says what of it is shown. One instance per task, in ``TASKS``.

    Attributes:
      shared_classes: training and test images are of the same classes.
      sections: names of the sections of the report's page, in order; see ``reporting.sections.SECTIONS``.
      headline: metrics that stand for the run: name in the results, and what to call it.
      curve: what the curve of the headline metrics is called.
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
        """K of P x K batches where the settings leave it open; 0: plain shuffling."""
        ...

    def model(self, config: ConfigDict, num_classes: int) -> EmbeddingModel:
        """The network. Raises ``UserError`` if the network lacks a requested feature."""
        ...

    def stored_model(self, config: ConfigDict, stored: Callable[[], Arrays], folder: Path) -> EmbeddingModel:
        """The network of a finished run, without its data.

        Args:
          config: settings of the run.
          stored: reads the tensors of the checkpoint.
          folder: of the checkpoint, for messages.
        """
        ...

    def criterion(self, config: ConfigDict, num_classes: int, steps_per_epoch: int, mesh: Mesh) -> Criterion:
        """What a step minimises. Raises ``UserError`` for settings that cannot work."""
        ...

    def mixup_alpha(self, config: ConfigDict) -> float:
        """Beta parameter of the step's Mixup; 0: none."""
        ...

    def followed(self, config: ConfigDict) -> Mapping[str, str]:
        """Metrics whose curve over the epochs is shown: name in the results, and what to call it."""
        ...

    def loss_text(self, config: ConfigDict) -> str:
        """The loss and the width of the embedding in a few words, for the report."""
        ...

    def measure(self, evaluation: Evaluation) -> dict[str, float]:
        """Metrics of every epoch."""
        ...

    def evaluate(self, evaluation: Evaluation) -> tuple[dict[str, float], list[str]]:
        """All metrics, for the end of a run, and warnings, one line each."""
        ...

    def describe(self, metrics: Mapping[str, Any], config: ConfigDict) -> str:
        """The headline metrics in one line."""
        ...
