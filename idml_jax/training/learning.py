"""How much of the trunk learns, and at which rates: the settings ``optim.trunk`` and ``optim.layer_decay``."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.models import EmbeddingModel
from idml_jax.models.depth import UNKNOWN, Depths, depths_of
from idml_jax.models.layers import FROZEN_STATS
from idml_jax.models.naming import flatten, unflatten

Tree = Any  # nested dictionaries of arrays


@dataclass(frozen=True)
class TrunkLearning:
    """Which parts of a trunk learn, and the factor on the rate of each. Hashable. By default all learn at one rate.

    Attributes:
      depths: depth of every part.
      first: depth from which on parts learn; 0: all, above the number of blocks: none.
      decay: the rate of depth l has the factor ``decay ** (depths.blocks - l)``.
    """

    depths: Depths = UNKNOWN
    first: int = 0
    decay: float = 1.0

    @property
    def everything(self) -> bool:
        """Whether all of the trunk learns."""
        return self.first == 0

    @property
    def anything(self) -> bool:
        """Whether any of the trunk learns."""
        return self.first <= self.depths.blocks

    @property
    def start(self) -> str:
        """The part at which learning starts; empty if nothing learns."""
        return next((part for part, depth in self.depths.parts if depth == self.first), "")

    def factor(self, path: str) -> float:
        """Factor on the learning rate of a parameter of the trunk, by its path ``layer1_0/conv1/kernel``."""
        return float(self.decay ** (self.depths.blocks - self.depths.of(path)))

    def learning(self, tree: Tree) -> Tree:
        """The entries of a tree of the trunk (parameters or statistics) that learn."""
        return tree if self.everything else self._where(tree, lambda depth: depth >= self.first)

    def frozen(self, tree: Tree) -> Tree:
        """The entries of a tree of the trunk that do not learn."""
        return {} if self.everything else self._where(tree, lambda depth: depth < self.first)

    def _where(self, tree: Tree, wanted: Callable[[int], bool]) -> Tree:
        return unflatten({path: leaf for path, leaf in flatten(tree).items() if wanted(self.depths.of(path))})


WHOLE_TRUNK = TrunkLearning()


def replaced(tree: Tree, part: Mapping[str, Any]) -> Tree:
    """A tree with the leaves of a part of it substituted."""
    return unflatten({**flatten(tree), **flatten(part)})


def blocks_from_end(text: str) -> int | None:
    """N of ``last:N``; 0 for ``none``, ``None`` for ``all``.

    Raises:
      UserError: for another text.
    """
    if text in ("all", "none"):
        return None if text == "all" else 0
    found = re.fullmatch(r"last:([0-9]{1,9})", text)
    if not found:
        raise UserError(f"config.optim.trunk = {text!r}; known: all, none, last:N (the last N blocks)")
    return int(found[1])


def check(optim: ConfigDict) -> None:
    """Checks ``optim.trunk`` and ``optim.layer_decay``.

    Raises:
      UserError: for values that no trunk can have.
    """
    count = blocks_from_end(optim.trunk)
    if not 0 < optim.layer_decay <= 1:
        raise UserError(f"config.optim.layer_decay = {optim.layer_decay} must be above 0 and at most 1 (1: none)")
    if count == 0 and optim.layer_decay != 1:
        raise UserError(
            f"config.optim.layer_decay = {optim.layer_decay} has no effect with config.optim.trunk = {optim.trunk!r}, "
            "where nothing of the trunk learns; use 1.0"
        )


def check_cached(config: ConfigDict) -> None:
    """Checks that nothing is set with ``optim.cached_features`` that stored features cannot give.

    Raises:
      UserError: naming the setting.
    """
    if not config.optim.cached_features:
        return
    field = "config.optim.cached_features"
    if blocks_from_end(config.optim.trunk) != 0:
        raise UserError(f"{field} needs a trunk that does not learn: config.optim.trunk=none")
    mixing = {"retrieval": "mixup.enabled", "classification": "classification.mixing"}[config.task]
    if config.mixup.enabled if config.task == "retrieval" else config.classification.mixing != "none":
        wanted = "False" if config.task == "retrieval" else "none"
        raise UserError(f"{field}: mixed images have no stored features; use config.{mixing}={wanted}")
    if config.optim.accumulate != 1:
        raise UserError(f"{field}: config.optim.accumulate = {config.optim.accumulate} has no effect; use 1")


def learning_of(config: ConfigDict, model: EmbeddingModel, image_shape: tuple[int, int, int]) -> TrunkLearning:
    """How the trunk of a run learns.

    Raises:
      UserError: if the trunk has fewer blocks than are named, does not tell its blocks, or cannot be frozen.
    """
    learning = _learning_of(config, model, image_shape)
    if not learning.everything:
        _check_statistics(config, model.trunk, image_shape, learning)
    return learning


def _learning_of(config: ConfigDict, model: EmbeddingModel, image_shape: tuple[int, int, int]) -> TrunkLearning:
    optim = config.optim
    count, decay = blocks_from_end(optim.trunk), float(optim.layer_decay)
    if count == 0:
        return TrunkLearning(first=1)
    if count is None and decay == 1:
        return WHOLE_TRUNK
    try:
        depths = depths_of(model, image_shape)
    except ValueError as error:
        field = "layer_decay" if count is None else "trunk"
        raise UserError(f"config.optim.{field} = {optim[field]!r}: {error} (config.model.name)") from error
    if count is None:
        return TrunkLearning(depths, decay=decay)
    if count > depths.blocks:
        raise UserError(
            f"config.optim.trunk = {optim.trunk!r}: {config.model.name} has {depths.blocks} blocks; use at most "
            f"last:{depths.blocks}, or all"
        )
    return TrunkLearning(depths, depths.blocks - count + 1, decay)


def _check_statistics(
    config: ConfigDict, trunk: nn.Module, image_shape: tuple[int, int, int], learning: TrunkLearning
) -> None:
    """Refuses a trunk with layers that update their running statistics although they are frozen."""
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    plain = trunk.clone(remat=False) if hasattr(trunk, "remat") else trunk
    updated: list[str] = []

    def trace(variables: dict[str, Tree], images: jax.Array) -> None:
        frozen = learning.frozen(variables.get("batch_stats", {}))
        given = {**variables, FROZEN_STATS: frozen}
        after = plain.apply(given, images, True, mutable=["batch_stats"])[1].get("batch_stats", {})
        new = flatten(after)
        updated.extend(path for path, old in flatten(frozen).items() if new[path] is not old)

    jax.eval_shape(trace, jax.eval_shape(plain.init, jax.random.key(0), images), images)
    if updated:
        raise UserError(
            f"config.optim.trunk = {config.optim.trunk!r}: {config.model.name} updates {updated[0]} although it is "
            "frozen; idml_jax.models.layers.BatchNorm does not"
        )
