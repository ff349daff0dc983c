"""Learning rate schedules and one optimizer with a rate per group of parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from idml_jax.errors import UserError
from idml_jax.training.learning import WHOLE_TRUNK, TrunkLearning, replaced

SCHEDULES = ("step", "cosine", "constant")
OPTIMIZERS = ("adamw", "sgd")

Params = Any


@dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step.

    Attributes:
      name: ``step`` (times ``factor`` every ``every`` steps), ``cosine`` (to 0 at ``total``) or ``constant``.
      base: initial learning rate.
      total: number of steps of the run.
      every: number of steps between two drops of ``step``.
      factor: factor of each drop.
      falls: steps at which ``step`` drops, instead of every ``every`` steps.
    """

    name: str
    base: float
    total: int
    every: int = 1
    factor: float = 1.0
    falls: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(f"unknown schedule {self.name!r} (config.optim.schedule); known: {', '.join(SCHEDULES)}")
        if self.name == "step" and self.every < 1:
            raise UserError("config.optim.step_epochs must be at least 1")

    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]:
        if self.name == "step" and self.falls:
            fallen: Any = sum((step >= fall).astype(jnp.float32) for fall in self.falls)
            return self.base * self.factor**fallen
        if self.name == "step":
            return self.base * self.factor ** (step // self.every).astype(jnp.float32)
        if self.name == "cosine":
            progress = jnp.clip(step / max(self.total, 1), 0.0, 1.0)
            return self.base * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return jnp.asarray(self.base, jnp.float32)


@dataclass(frozen=True)
class GroupOptimizer:
    """One update rule for all groups of parameters (the top-level entries), each with its own factor on the rate.

    Every group has a separate optimizer state and is updated only if it has gradients. A frozen group, such as the
    trunk during warm-up, keeps its moments, its step count and its exact values.

    Attributes:
      name: ``adamw`` (decoupled weight decay, as PyTorch's) or ``sgd`` (Nesterov momentum, weight decay in the
        gradient).
      schedule: learning rate by global step.
      factors: factor on the learning rate by group; 1 for groups that are not named.
      weight_decay: decay of every parameter that is updated.
      momentum: momentum of ``sgd``.
      clip_value: gradients are clipped elementwise to [-clip_value, clip_value]; 0: no clipping.
      frozen_norm: scales and biases of normalisation layers in the trunk are neither updated nor decayed.
      trunk: which parts of the trunk learn, and at which rates. A part that does not learn has no optimizer state.
    """

    name: str
    schedule: Schedule
    factors: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip_value: float = 0.0
    frozen_norm: bool = False
    trunk: TrunkLearning = WHOLE_TRUNK
    rule: optax.GradientTransformation = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(f"unknown optimizer {self.name!r} (config.optim.name); known: {', '.join(OPTIMIZERS)}")
        clip = [optax.clip(self.clip_value)] if self.clip_value else []
        decay = [optax.add_decayed_weights(self.weight_decay)] if self.weight_decay else []
        if self.name == "adamw":
            rule = optax.chain(*clip, optax.scale_by_adam(), *decay)
        else:
            rule = optax.chain(*clip, *decay, optax.trace(self.momentum, nesterov=True))
        object.__setattr__(self, "rule", rule)

    def rested(self, trunk: Params) -> Params:
        """The trunk's parameters; those that ``frozen_norm`` freezes are constants, whose gradient is not computed."""
        if not self.frozen_norm:
            return trunk
        rest = lambda path, p: jax.lax.stop_gradient(p) if is_norm_parameter(path) else p
        return jax.tree_util.tree_map_with_path(rest, trunk)

    def init(self, params: Mapping[str, Params]) -> dict[str, optax.OptState]:
        """Initial optimizer state of every group."""
        if "trunk" in params and not self.trunk.everything:
            params = {**params, "trunk": self.trunk.learning(params["trunk"])}
        return {
            group: self.rule.init(values) for group, values in params.items() if group != "trunk" or self.trunk.anything
        }

    def update(
        self,
        grads: Mapping[str, Params],
        opt_state: Mapping[str, optax.OptState],
        params: Mapping[str, Params],
        step: Int[Array, ""],
    ) -> tuple[dict[str, Params], dict[str, optax.OptState]]:
        """Updates the groups in ``grads``.

        Args:
          grads: gradients by group; other groups are left unchanged. Of the trunk, those of the parts that learn.
          opt_state: optimizer state of all groups.
          params: parameters of all groups.
          step: global step, for the schedule.

        Returns:
          New parameters and new state.
        """
        params, opt_state = dict(params), dict(opt_state)
        rate = self.schedule(step)
        factors = dict(self.factors)
        for group, grad in grads.items():
            learning = self.trunk.learning(params[group]) if group == "trunk" else params[group]
            updates, opt_state[group] = self.rule.update(grad, opt_state[group], learning)
            moved = self._moved(group, learning, updates, rate * factors.get(group, 1.0))
            whole = group != "trunk" or self.trunk.everything
            params[group] = moved if whole else replaced(params[group], moved)
        return params, opt_state

    def _moved(self, group: str, params: Params, updates: Params, rate: Float[Array, ""]) -> Params:
        """Parameters of a group after an update; in the trunk every depth has its factor on the rate."""
        if group != "trunk":
            return jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)

        def move(path: tuple[Any, ...], p: Array, u: Array) -> Array:
            if self.frozen_norm and is_norm_parameter(path):
                return p
            own = rate if self.trunk.decay == 1 else rate * self.trunk.factor(path_of(path))
            return p - (own * u).astype(p.dtype)

        return jax.tree_util.tree_map_with_path(move, params, updates)


def path_of(path: tuple[Any, ...]) -> str:
    """A path of keys as ``a/b/c``."""
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


_NORM = re.compile(r"(\w+_)?bn\d*(_\w+)?")


def is_norm_parameter(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is the scale or shift of a BatchNorm, judged by the names that this package's trunks use.

    >>> [is_norm_parameter(tuple(path.split("/"))) for path in ("layer1_0/downsample_bn/scale", "subnet/conv/kernel")]
    [True, False]
    """
    *parts, leaf = path_of(path).split("/")
    return leaf in ("scale", "bias") and any(_NORM.fullmatch(part) for part in parts)
