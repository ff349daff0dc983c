"""The training state between two steps."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

from idml_jax.losses.memory import Memory
from idml_jax.models import EmbeddingModel
from idml_jax.runtime import sharding
from idml_jax.training.criterion import Criterion
from idml_jax.training.optim import GroupOptimizer


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint holds. Randomness is a function of (seed, step), so no key is kept.

    Attributes:
      step: number of steps done.
      params: parameters by group: ``trunk``, ``heads``, and, where the loss has them, ``proxies`` and ``loss`` (learned
        scalars).
      batch_stats: running statistics of the trunk.
      opt_state: optimizer state by group; ``ema``: moving averages of the model's variables, if enabled.
      memory: cross-batch memory; ``()`` without one.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    batch_stats: Any
    opt_state: dict[str, Any]
    memory: Memory | tuple[()] = ()

    @property
    def latest(self) -> dict[str, Any]:
        """The model's variables, as ``model.apply`` takes them, after the last step."""
        return {"params": {k: self.params[k] for k in ("trunk", "heads")}, "batch_stats": self.batch_stats}

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables for evaluation: the moving averages if enabled, otherwise the latest."""
        return self.opt_state.get("ema", self.latest)

    def averaging(self) -> "TrainState":
        """The state with moving averages that start from the latest variables."""
        return self.replace(opt_state={**self.opt_state, "ema": jax.tree.map(jnp.copy, self.latest)})


def create_state(
    key: Array,
    model: EmbeddingModel,
    objective: Criterion,
    optimizer: GroupOptimizer,
    image_shape: tuple[int, ...],
    ema: bool = False,
) -> TrainState:
    """Creates a fresh state.

    Args:
      key: PRNG key of the initial weights.
      model: network.
      objective: loss, which may have parameters and a memory.
      optimizer: update rule, which has a state.
      image_shape: ``(h, w, c)`` of an image.
      ema: whether to keep moving averages.

    Returns:
      The state at step 0.
    """
    model_key, loss_key = jax.random.split(key)
    variables = model.init(model_key, jnp.zeros((1, *image_shape), jnp.float32))
    params = {**variables["params"], **objective.init(loss_key)}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        memory=objective.init_memory(),
    )
    return state.averaging() if ema else state


_STATIC = (1, 2, 3, 4, 5)
_jit_create_state = jax.jit(create_state, static_argnums=_STATIC)


def shapes_on(mesh: Mesh, split: tuple[str, ...], *arguments: Any) -> TrainState:
    """Shapes, types and placement of the state that ``create_state`` returns for these arguments.

    Args:
      mesh: devices.
      split: keys of the tables that are split over them, as ``Objective.split``.
      *arguments: those of ``create_state``.
    """
    shapes = _jit_create_state.eval_shape(*arguments)
    return jax.tree.map(lambda x, where: x.update(sharding=where), shapes, sharding.placement(shapes, mesh, split))


def create_state_on(
    mesh: Mesh,
    key: Array,
    model: EmbeddingModel,
    objective: Criterion,
    optimizer: GroupOptimizer,
    image_shape: tuple[int, ...],
    ema: bool = False,
) -> TrainState:
    """``create_state`` on a mesh; no device ever holds a complete table that the objective splits."""
    arguments = key, model, objective, optimizer, image_shape, ema
    if not objective.split:
        return sharding.replicate(_jit_create_state(*arguments), mesh)
    place = jax.tree.map(lambda x: x.sharding, shapes_on(mesh, objective.split, *arguments))
    return jax.jit(create_state, static_argnums=_STATIC, out_shardings=place)(*arguments)
