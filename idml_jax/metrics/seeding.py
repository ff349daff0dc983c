"""Initial centres of k-means: plain and greedy k-means++ (Arthur and Vassilvitskii, SODA 2007) by matrix products."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from idml_jax.metrics import tiles

ROUNDING = 1e-6  # squared distances below this part of the squared norm are nothing but rounding
_BLOCK_ENTRIES = 2**25  # of distances at a time on the greedy way


class Search(Protocol):
    """The rows to cluster, on the host, and the search for their nearest centres on the devices."""

    rows: Float[np.ndarray, "n d"]
    norms: Float[np.ndarray, "n"]  # squared
    mesh: Mesh

    def nearest(
        self, which: Int[np.ndarray, "w"], centres: Float[np.ndarray, "c d"]
    ) -> tuple[Float[np.ndarray, "w"], Int[np.ndarray, "w"], Float[np.ndarray, "w"]]:
        """For each row in `which`: least squared distance to a centre, that centre's index, the next least distance."""
        ...


def draw(search: Search, k: int, rng: np.random.Generator, candidates: int) -> Int[np.ndarray, "k"]:
    """Draws the indices of k initial rows; of several candidates per seed, keeps the one with the least inertia."""
    return plain(search, k, rng) if candidates == 1 else greedy(search, k, rng, candidates)


def plain(search: Search, k: int, rng: np.random.Generator) -> Int[np.ndarray, "k"]:
    """k-means++: each next seed drawn with the squared distance to the nearest seed so far as its weight.

    Candidates are drawn in batches from outdated weights, and each is kept with probability true weight / old weight.
    This rejection sampling gives exactly the distribution of sequential draws, but uses matrix products.
    """
    rows, norms = search.rows, search.norms
    everything = np.arange(len(rows))
    seeds = [int(rng.integers(len(rows)))]
    weights = search.nearest(everything, rows[seeds])[0].astype(np.float64)
    weights[weights <= ROUNDING * norms] = 0  # the seed and its duplicates, but for rounding
    while len(seeds) < k:
        total = np.cumsum(weights)
        if not total[-1] > 0:
            seeds += _any_others(rng, len(rows), seeds, k)
            break
        wanted = min(k - len(seeds), len(seeds), 1024)
        drawn = np.searchsorted(total, rng.random(2 * wanted) * total[-1], side="right")
        chance = rng.random(len(drawn)) * weights[drawn]
        true = weights[drawn].copy()
        mutual = norms[drawn][:, None] + norms[drawn][None, :] - 2 * (rows[drawn] @ rows[drawn].T)
        kept: list[int] = []
        for i, candidate in enumerate(drawn):
            if chance[i] < true[i] and len(kept) < wanted:
                kept.append(int(candidate))
                true = np.minimum(true, np.where(mutual[i] <= ROUNDING * norms[drawn], 0, mutual[i]))
        if kept:
            weights = np.minimum(weights, search.nearest(everything, rows[kept])[0])
            weights[weights <= ROUNDING * norms] = 0
            seeds += kept
    return np.array(seeds)


def greedy(search: Search, k: int, rng: np.random.Generator, candidates: int) -> Int[np.ndarray, "k"]:
    """k-means++ with several candidates for each seed (section 5 of the paper; what scikit-learn does).

    Candidates for many seeds are drawn from outdated weights, compared with all rows by one matrix product, and then
    processed seed by seed with the current weights: a candidate is kept with probability current weight / old weight,
    as in `plain`, so the kept ones follow the true weights. A seed without remaining candidates is drawn again.
    """
    size = len(search.rows)
    rows, norms = jax.device_put((search.rows, search.norms), search.mesh.devices.flat[0])
    height = max(1, min(64, k, _BLOCK_ENTRIES // (candidates * size)))
    height = 1 << (height.bit_length() - 1)
    seeds = [int(rng.integers(size))]
    first = np.full((1, 1), seeds[0])
    weights = _choose(rows, norms, np.full(size, np.inf, np.float32), first, np.zeros((1, 1), np.float32), 1)[0]
    while len(seeds) < k:
        old = np.asarray(weights)
        total = np.cumsum(old, dtype=np.float64)
        if not total[-1] > 0:
            seeds += _any_others(rng, size, seeds, k)
            break
        drawn = np.searchsorted(total, rng.random((height, candidates)) * total[-1], side="right")
        drawn = np.minimum(drawn, size - 1)
        chance = (rng.random(drawn.shape) * old[drawn]).astype(np.float32)
        weights, chosen = _choose(rows, norms, weights, drawn, chance, k - len(seeds))
        seeds += [seed for seed in np.asarray(chosen).tolist() if seed >= 0]
    return np.array(seeds)


@jax.jit
def _choose(
    rows: Float[Array, "n d"],
    norms: Float[Array, "n"],
    weights: Float[Array, "n"],
    drawn: Int[Array, "b c"],
    chance: Float[Array, "b c"],
    wanted: Int[Array, ""],
) -> tuple[Float[Array, "n"], Int[Array, "b"]]:
    """Chooses up to b more seeds, at most `wanted`: the new weights, and the seeds, -1 where none was found."""
    at = drawn.reshape(-1)
    squares = tiles.squared_distances(rows[at], norms[at], rows, norms)
    squares = jnp.where(squares <= ROUNDING * norms[None], 0.0, squares).reshape(*drawn.shape, -1)

    def step(
        carry: tuple[Float[Array, "n"], Int[Array, ""]],
        candidates: tuple[Float[Array, "c n"], Int[Array, "c"], Float[Array, "c"]],
    ) -> tuple[tuple[Float[Array, "n"], Int[Array, ""]], Int[Array, ""]]:
        weights, left = carry
        squares, drawn, chance = candidates
        alive = chance < weights[drawn]
        inertia = jnp.where(alive, jnp.sum(jnp.minimum(weights[None], squares), axis=1), jnp.inf)
        best = jnp.argmin(inertia)
        found = (left > 0) & jnp.any(alive)
        weights = jnp.where(found, jnp.minimum(weights, squares[best]), weights)
        return (weights, left - found), jnp.where(found, drawn[best], -1)

    (weights, _), chosen = jax.lax.scan(step, (weights, wanted), (squares, drawn, chance))
    return weights, chosen


def _any_others(rng: np.random.Generator, size: int, seeds: list[int], k: int) -> list[int]:
    """Fills up to k where there are fewer distinct rows than clusters."""
    left = np.setdiff1d(np.arange(size), seeds)
    return rng.choice(left, k - len(seeds), replace=False).tolist()
