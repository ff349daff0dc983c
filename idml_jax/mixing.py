"""Mixup and CutMix inside the jitted step: retrieval mixes a batch at once, classification draws a plan and applies it.

A plan holds the partner, the share and the box of every row, so that images are mixed only where they are used.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

__all__ = [
    "METHODS",
    "PARTNERS",
    "Mixed",
    "Plan",
    "blend",
    "mix",
    "mixup",
    "near_rows",
    "plan",
    "plan_cutmix",
    "plan_mixup",
    "with_partners",
]

PARTNERS = ("any", "near")


class Mixed(NamedTuple):
    """A mixed batch and what it was mixed from.

    Attributes:
      images: ``[n, h, w, c]``, ``lam * images + (1 - lam) * images[partner]``.
      partner: ``[n]`` index of each image's partner.
      lam: share of the first image, scalar.
    """

    images: Float[Array, "n h w c"]
    partner: Int[Array, "n"]
    lam: Float[Array, ""]


def blend(
    images: Float[Array, "n h w c"], others: Float[Array, "n h w c"], lam: Float[Array, ""] | float
) -> Float[Array, "n h w c"]:
    """``lam * images + (1 - lam) * others``."""
    return lam * images + (1.0 - lam) * others


def mixup(key: PRNGKeyArray, images: Float[Array, "n h w c"], alpha: float = 1.0) -> Mixed:
    """Mixup (Zhang et al., ICLR 2018) with one ``lam ~ Beta(alpha, alpha)`` and one permutation per batch.

    The metric-learning loss of the mixed batch is ``lam L(x', y) + (1 - lam) L(x', y[partner])``, added to ``L(x, y)``.

    Args:
      key: PRNG key.
      images: ``[n, h, w, c]``, normalised or not (mixing is linear).
      alpha: parameter of the Beta distribution, > 0.

    Returns:
      The mixed batch.
    """
    lam_key, partner_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha)
    partner = jax.random.permutation(partner_key, images.shape[0])
    return Mixed(blend(images, jnp.take(images, partner, axis=0), lam), partner, lam)


def near_rows(x: Shaped[Array, "n ..."], per_class: int = 1) -> Shaped[Array, "n ..."]:
    """The rows of the partners that are near: a fixed permutation that moves a row by at most ``per_class ** 2``.

    Row i takes row i + 1, and the last row the first. Where every ``per_class`` = K consecutive rows share a class, the
    k-th image of a class (from 0) takes the k-th of the class k + 1 further on: partners have another class, and the K
    images of a class have partners of K classes (of all others, if there are fewer). The samplers order images and
    classes at random, so an image meets every other (of another class) with the same probability, as with a random
    permutation, but never itself.

    Split over devices along its first axis, a device needs ``K (K + 1) / 2 * K`` rows of others, however large the
    batch, and the result does not depend on the number of devices.

    Args:
      x: ``[n, ...]``, n a multiple of ``per_class``.
      per_class: K, number of consecutive rows that share a class; 1 for a batch in random order.

    Returns:
      ``[n, ...]``.
    """
    classes = x.shape[0] // per_class
    ahead = [1 + k % max(classes - 1, 1) for k in range(per_class)]
    moved = [jnp.roll(x, -per_class * count, axis=0) for count in ahead]
    column = (jnp.arange(x.shape[0]) % per_class).reshape(-1, *[1] * (x.ndim - 1))
    return functools.reduce(lambda y, k: jnp.where(column == k, moved[k], y), range(1, per_class), moved[0])


def with_partners(
    images: Shaped[Array, "n ..."], drawn: Int[Array, "n"], near: int = 0
) -> tuple[Int[Array, "n"], Shaped[Array, "n ..."]]:
    """Index of each row's partner, and the partners' images.

    Args:
      images: ``[n, ...]``.
      drawn: partners from the whole batch. Split over devices, each device then needs the images of all.
      near: 0 for the drawn partners; otherwise ``per_class`` of ``near_rows``, whose partners are taken instead.
    """
    if not near:
        return drawn, jnp.take(images, drawn, axis=0)
    return near_rows(jnp.arange(images.shape[0]), near), near_rows(images, near)


class Plan(NamedTuple):
    """How ``n`` rows are mixed.

    Attributes:
      partner: ``[n]`` index of each image's partner.
      lam: ``[n]`` exact share of the first image's pixels, or of their values.
      outside: ``[n]`` share of the first image outside the box: lam for Mixup, 1 for CutMix.
      box: ``[n, 4]`` top, left, bottom, right (the latter two exclusive) of the area taken from the partner.
    """

    partner: Int[Array, "n"]
    lam: Float[Array, "n"]
    outside: Float[Array, "n"]
    box: Int[Array, "n 4"]


def plan_mixup(
    key: PRNGKeyArray, n: int, *, alpha: float = 1.0, probability: float = 1.0, per_sample: bool = False
) -> Plan:
    """Mixup (Zhang et al., ICLR 2018): ``lam ~ Beta(alpha, alpha)``, partners by a random permutation.

    Args:
      key: PRNG key.
      n: number of rows.
      alpha: parameter of the Beta distribution, > 0.
      probability: probability that a row is mixed.
      per_sample: draw lam and whether to mix for every row instead of once for the batch.

    Returns:
      The plan.
    """
    partner, lam = _draws(key, n, alpha, probability, per_sample)[:2]
    return Plan(partner, lam, lam, jnp.zeros((n, 4), jnp.int32))


def plan_cutmix(
    key: PRNGKeyArray,
    n: int,
    height: int,
    width: int,
    *,
    alpha: float = 1.0,
    probability: float = 1.0,
    per_sample: bool = False,
) -> Plan:
    """CutMix (Yun et al., ICCV 2019): a box of the partner's pixels at the same place.

    The box has about the share ``1 - lam`` of the area, ``lam ~ Beta(alpha, alpha)``, and its centre lies anywhere in
    the image; it is clipped, and the plan's lam is the share of the first image that remains after clipping.

    Args:
      key: PRNG key.
      n: number of rows.
      height: height of the images in pixels.
      width: width of the images in pixels.
      alpha: parameter of the Beta distribution, > 0.
      probability: probability that a row is mixed.
      per_sample: draw box and whether to mix for every row instead of once for the batch.

    Returns:
      The plan.
    """
    partner, lam, place_key = _draws(key, n, alpha, probability, per_sample)
    row_key, column_key = jax.random.split(place_key)
    root, shape = jnp.sqrt(1.0 - lam), (n,) if per_sample else (1,)

    def span(key: PRNGKeyArray, size: int) -> tuple[Array, Array]:
        half = jnp.floor(size * root).astype(jnp.int32) // 2
        centre = jnp.broadcast_to(jax.random.randint(key, shape, 0, size), (n,))
        return jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)

    (top, bottom), (left, right) = span(row_key, height), span(column_key, width)
    lam = 1.0 - ((bottom - top) * (right - left)).astype(jnp.float32) / (height * width)
    return Plan(partner, lam, jnp.ones((n,)), jnp.stack([top, left, bottom, right], axis=1))


def _draws(key: PRNGKeyArray, n: int, alpha: float, probability: float, per_sample: bool) -> tuple[Array, Array, Array]:
    """Partners, lam (1 where nothing is mixed) and a key for more."""
    lam_key, partner_key, whether_key, more = jax.random.split(key, 4)
    shape = (n,) if per_sample else (1,)
    # Beta(1, 1) is uniform, which is much cheaper to draw.
    lam = jax.random.uniform(lam_key, shape) if alpha == 1.0 else jax.random.beta(lam_key, alpha, alpha, shape)
    lam = jnp.where(jax.random.uniform(whether_key, shape) < probability, lam, 1.0)
    return jax.random.permutation(partner_key, n), jnp.broadcast_to(lam, (n,)), more


METHODS = ("none", "mixup", "cutmix")


def plan(
    method: str,
    key: PRNGKeyArray,
    n: int,
    height: int,
    width: int,
    *,
    alpha: float = 1.0,
    probability: float = 1.0,
    per_sample: bool = False,
) -> Plan:
    """The plan of a method in ``METHODS``; ``none`` mixes no row. Arguments as for ``plan_cutmix``."""
    if method == "none":
        return plan_mixup(key, n, probability=0.0)
    if method == "mixup":
        return plan_mixup(key, n, alpha=alpha, probability=probability, per_sample=per_sample)
    return plan_cutmix(key, n, height, width, alpha=alpha, probability=probability, per_sample=per_sample)


def mix(
    images: Float[Array, "n h w c"],
    others: Float[Array, "n h w c"],
    outside: Float[Array, "n"],
    box: Int[Array, "n 4"],
) -> Float[Array, "n h w c"]:
    """Mixes images as a plan says.

    Args:
      images: the first images.
      others: their partners, in the same order.
      outside: ``outside`` of the plan.
      box: ``box`` of the plan.

    Returns:
      ``[n, h, w, c]``.
    """
    within = lambda size, low, high: (jnp.arange(size)[None] >= low[:, None]) & (jnp.arange(size)[None] < high[:, None])
    top, left, bottom, right = box.T
    inside = within(images.shape[1], top, bottom)[:, :, None] & within(images.shape[2], left, right)[:, None, :]
    share = jnp.where(inside, 0.0, outside[:, None, None])[..., None]
    return share * images + (1.0 - share) * others
