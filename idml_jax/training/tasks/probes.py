"""Random choices for probing the uncertainty: which test images to change, and what to mix them with."""

import numpy as np
from jaxtyping import Int

STRENGTHS = (0.25, 0.5, 0.75)


def drawn_images(size: int, images: int, seed: int) -> Int[np.ndarray, "m"]:
    """Draws ``images`` of ``size`` records at random, in ascending order; all if there are not more."""
    return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(size)[:images])


def partners_of_other_classes(
    labels: Int[np.ndarray, "n"], chosen: Int[np.ndarray, "m"], seed: int
) -> Int[np.ndarray, "m"]:
    """Draws a random image of another class for every chosen image.

    Args:
      labels: ``[n]`` with at least two classes.
      chosen: ``[m]`` records.
      seed: seed of the choice.

    Returns:
      ``[m]`` records.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    partner = rng.integers(0, len(labels), len(chosen))
    while (same := np.flatnonzero(labels[partner] == labels[chosen])).size:
        partner[same] = rng.integers(0, len(labels), same.size)
    return partner
