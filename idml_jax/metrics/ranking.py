"""Tiles, and the two ways to rank what a query should find: counting and top-k.

Counting: the rank of a positive is 1 + the number of gallery rows that come before it, so no list of neighbours is
needed: one tile of squared distances at a time, compared with the distance of every positive. Within one set the
tile (I, J) also serves the queries in J, so half of the product is enough.

Ties. A comparison means something only if equal rows give equal numbers. All squared distances therefore come from
`_squared_distances` on tiles of one shape per call, in which each element is summed in the same order, whatever its
place; a positive's own distance is read from the very tile in which it is later compared with the others.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

_LANES = 32


def count_before(rows, columns, positives, *, symmetric: bool, mesh: Mesh):
    ...


def _squared_distances(a, a_norms, b, b_norms):
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return (a_norms[:, None] + b_norms[None, :]) - 2 * product
