"""The loss of a training step, as the step and the training state use it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Int, PRNGKeyArray

from idml_jax.ism import Embedding
from idml_jax.losses.memory import Memory

# From trained and frozen parameters, state, batch, step set-up and whether the trunk learns, to the loss and
# (running statistics, outputs of the heads, metrics).
BatchLoss = Callable[..., tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]]


class Criterion:
    """A loss with its parameters and its memory. Subclasses are frozen dataclasses: a static argument of the step.

    A loss without parameters and memory needs to define only ``loss`` and ``batch_loss``.

    Attributes:
      loss: name of the loss, for messages.
      split: groups of parameters that are split over devices by rows.
    """

    loss: str

    @property
    def split(self) -> tuple[str, ...]:
        return ()

    def batch_loss(self, *arguments: Any) -> tuple[Array, tuple[Any, dict[str, Array], dict[str, Array]]]:
        """The loss of a batch; see ``BatchLoss``."""
        raise NotImplementedError

    def init(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Initial parameter groups of the loss."""
        return {}

    def init_memory(self) -> Memory | tuple[()]:
        """An empty cross-batch memory; ``()`` if the loss has none."""
        return ()

    def remember(self, store: Memory | tuple[()], embedding: Embedding, labels: Int[Array, "n"]) -> Memory | tuple[()]:
        """The memory after storing a batch; called after the batch's loss."""
        return store

    def chosen(self, store: Any, embedding: Embedding, labels: Int[Array, "n"]) -> Bool[Array, "n"] | None:
        """Which images of a batch the loss reads; ``None``: all."""
        return None
