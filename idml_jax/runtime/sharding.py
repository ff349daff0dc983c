"""The device mesh and the placement of arrays: batches are split along ``data``, everything else is replicated.

With very many classes the proxies and their optimizer state are also split along ``data``, by class.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from idml_jax.errors import UserError


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, ``data``, over all devices of all hosts (or the given ones)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def host_of(mesh: Mesh) -> tuple[int, int]:
    """Index of this host among the hosts with devices in the mesh, and the number of such hosts."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    return processes.index(jax.process_index()), len(processes)


def check_divisible(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises ``UserError`` unless a batch splits evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{field} ({batch_size}) must be a multiple of the {mesh.size} devices")


# The number of rows of a split table is a multiple of this, 2^8 x 15, so that its shape (and the checkpoint) does not
# depend on the number of devices, and all usual device counts divide it.
ROW_MULTIPLE = 3840


def padded_rows(rows: int) -> int:
    """Number of rows of a table that is split over devices: ``rows`` plus padding."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises ``UserError`` unless a table with ``rows`` classes splits evenly over the devices."""
    if padded_rows(rows) % mesh.size:
        raise UserError(
            f"config.sharding.proxies: {padded_rows(rows)} rows for {rows} classes do not split over {mesh.size} "
            f"devices; use a number of devices that divides {ROW_MULTIPLE}, or config.sharding.proxies=whole"
        )


def constrain(x: jax.Array, mesh: Mesh, *axes: str | None) -> jax.Array:
    """Constrains, inside ``jit``, which axes of an array (and of its gradient) are split; ``None``: not split."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def over_rows(
    function: Callable[[Any, Any, str | None], Any], mesh: Mesh | None, rows: Any, whole: Any, result: str | None = None
) -> Any:
    """A function of a batch, computed on every device for its rows of the batch.

    The compiler then decides nothing about the matrix of all pairs: each device has its rows of it, and only what the
    function itself gathers or sums over the axis is exchanged.

    Args:
      function: ``(rows, whole, axis_name)``; without an axis (``None``) the rows are the whole batch.
      mesh: devices; ``None``, or one device: the function is called with the batch as it is.
      rows: pytree of arrays, split by their first axis.
      whole: pytree of arrays that every device has.
      result: ``"data"`` if the result has a row for each row of the batch; ``None`` if it is the same on every device.

    Returns:
      The function's result, for the whole batch.
    """
    if mesh is None or mesh.size == 1:
        return function(rows, whole, None)
    mapped = jax.shard_map(
        lambda rows, whole: function(rows, whole, "data"),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec() if result is None else PartitionSpec(result),
    )
    return mapped(rows, jax.tree.map(jnp.asarray, whole))


def placement(tree: Any, mesh: Mesh, split: tuple[str, ...] = ()) -> Any:
    """The sharding of every array of a state.

    Args:
      tree: pytree of arrays, or of their shapes.
      mesh: devices.
      split: keys below which tables (arrays with two axes) are split by rows; all other arrays are replicated.

    Returns:
      A tree of ``NamedSharding``.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        rows = len(leaf.shape) == 2 and any(getattr(entry, "key", None) in split for entry in path)
        return NamedSharding(mesh, PartitionSpec("data") if rows else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def place(tree: Any, placement: Any) -> Any:
    """A tree with every array placed as ``placement`` says; those that already are stay."""

    def one(x: Any, wanted: NamedSharding) -> jax.Array:
        there = isinstance(x, jax.Array) and x.sharding.is_equivalent_to(wanted, x.ndim)
        return x if there else _put(x, wanted)

    return jax.tree.map(one, tree, placement)


def _put(x: Any, wanted: NamedSharding) -> jax.Array:
    """An array that every host has all of, placed on the devices of all hosts."""
    if jax.process_count() == 1:
        return jax.device_put(x, wanted)
    value = np.asarray(x)  # device_put across hosts gives arrays that cannot be saved before a step has changed them
    return jax.make_array_from_callback(value.shape, wanted, lambda index: value[index])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    wanted = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: _put(x, wanted), tree) if jax.process_count() > 1 else jax.device_put(tree, wanted)


def of_batch(mesh: Mesh) -> NamedSharding:
    """The placement of a batch: its rows are split along ``data``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this host's part of a batch into global arrays, split along ``data``."""
    place = of_batch(mesh)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}


def to_host(tree: Any) -> Any:
    """Gathers complete arrays as numpy on every host, even if they are spread over hosts."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable or x.is_fully_replicated:  # every host has all of it
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)
