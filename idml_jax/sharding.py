"""The device mesh and where arrays live on it: batches split along ``data``, everything else on every device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from idml_jax.errors import UserError


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One axis, ``data``, over all devices of all hosts."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def check_divisible(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises ``UserError`` unless a batch splits evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise UserError(f"{field} ({batch_size}) must be a multiple of the {mesh.size} devices")


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
