"""The device mesh and where arrays live on it: batches split along ``data``, everything else on every device.

For very many classes the proxies, and what the optimizer holds of them, are split along ``data`` too, by classes.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from idml_jax.errors import UserError


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One axis, ``data``, over all devices of all hosts."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def host_of(mesh: Mesh) -> tuple[int, int]:
    """This host's number among those whose devices are in the mesh, and how many there are."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    return processes.index(jax.process_index()), len(processes)


def check_divisible(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises ``UserError`` unless a batch splits evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{field} ({batch_size}) must be a multiple of the {mesh.size} devices")


# Rows of a split table are a multiple of this, 2^8 x 15, so that its shape, and with it a checkpoint, does not depend
# on the number of devices, and all usual numbers of them share it evenly.
ROW_MULTIPLE = 3840


def padded_rows(rows: int) -> int:
    """Rows of a table that is split over devices: at least ``rows``, the others are padding."""
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises ``UserError`` unless a table of so many classes splits evenly over the devices."""
    if padded_rows(rows) % mesh.size:
        raise UserError(
            f"config.sharding.proxies: {padded_rows(rows)} rows for {rows} classes do not split over {mesh.size} "
            f"devices; use a number of devices that divides {ROW_MULTIPLE}, or config.sharding.proxies=whole"
        )


def constrain(x: jax.Array, mesh: Mesh, *axes: str | None) -> jax.Array:
    """Inside ``jit``: says which axes of an array (and of its gradient) are split, ``None`` for one that is not."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def placement(tree: Any, mesh: Mesh, split: tuple[str, ...] = ()) -> Any:
    """Where every array of a state lives.

    Args:
      tree: of arrays, or of their shapes.
      mesh: devices.
      split: keys below which tables (arrays with two axes) are split by rows; all else is on every device.

    Returns:
      A tree of ``NamedSharding``.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        rows = len(leaf.shape) == 2 and any(getattr(entry, "key", None) in split for entry in path)
        return NamedSharding(mesh, PartitionSpec("data") if rows else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch to a global array, split along ``data``."""
    place = NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}


def to_host(tree: Any) -> Any:
    """Whole arrays as numpy on every host, also where they are spread over hosts."""

    def fetch(x: jax.Array) -> np.ndarray:
        if x.is_fully_addressable:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)
