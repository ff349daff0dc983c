"""An objective that leaves out images whose label is probably wrong; see ``losses.prism``."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from idml_jax.ism import Embedding
from idml_jax.losses import memory, prism
from idml_jax.training.tasks.objective import Objective


class Store(NamedTuple):
    """What is remembered between steps: for the choice of images, and the loss's cross-batch memory (or ``()``)."""

    prism: prism.Prism
    of_loss: memory.Memory | tuple[()]


@dataclass(frozen=True)
class PrismObjective(Objective):
    """An ``Objective`` of the images that PRISM keeps.

    Attributes:
      share: expected share of wrong labels.
      window: number of batches whose thresholds are averaged.
      features: number of past features that labels are judged by.
      warmup: number of steps in which all images are kept.
    """

    share: float = 0.2
    window: int = 10
    features: int = 4096
    warmup: int = 0

    def init_memory(self) -> Any:
        return Store(prism.create(self.features, self.dim, self.window), super().init_memory())

    def chosen(self, store: Any, embedding: Embedding, labels: Int[Array, "n"]) -> Bool[Array, "n"]:
        return self._selected(store, embedding, labels)[0]

    def remember(
        self, store: Any, embedding: Embedding, labels: Int[Array, "n"], mask: Bool[Array, "n"] | None = None
    ) -> Any:
        kept, threshold = self._selected(store, embedding, labels)
        kept = kept if mask is None else kept & mask
        return Store(
            prism.update(store.prism, embedding.semantic, labels, kept, threshold),
            super().remember(store.of_loss, embedding, labels, kept),
        )

    def __call__(
        self,
        params: dict[str, Any],
        embedding: Embedding,
        labels: Int[Array, "n"],
        *,
        key: PRNGKeyArray | None = None,
        store: Any = (),
        step: Int[Array, ""] | int = 0,
        mask: Bool[Array, "n"] | None = None,
    ) -> Float[Array, ""]:
        of_loss = store.of_loss if isinstance(store, Store) else store
        return super().__call__(params, embedding, labels, key=key, store=of_loss, step=step, mask=mask)

    def _selected(self, store: Store, embedding: Embedding, labels: Int[Array, "n"]) -> Any:
        return prism.select(
            store.prism,
            embedding.semantic,
            labels,
            share=self.share,
            num_classes=self.num_classes,
            warmup=self.warmup,
        )
