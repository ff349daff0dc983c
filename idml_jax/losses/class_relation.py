"""Relations of classes beside same and different, for losses whose rows and columns are labels: levels, or a matrix."""

import hashlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from idml_jax.losses.pairs import Pairs

__all__ = ["ClassRelation", "levels_of_names"]


class ClassRelation:
    """How each class is related to each other, at one or more levels. Hashable: a static argument.

    Attributes:
      levels: ``[classes, levels]`` int; classes are the same at a level if they have the same number there. ``None``
        for a matrix.
      matrix: ``[classes, classes]`` int8: 1 positive, 0 negative, -1 neither; ``None`` for levels.
      weights: weight of each level.
    """

    def __init__(
        self,
        levels: Int[np.ndarray, "c levels"] | None = None,
        matrix: Int[np.ndarray, "c c"] | None = None,
        weights: Sequence[float] = (1.0,),
    ):
        if (levels is None) == (matrix is None):
            raise ValueError("a relation of classes has levels or a matrix")
        self.levels = None if levels is None else np.asarray(levels, np.int32)
        self.matrix = None if matrix is None else np.asarray(matrix, np.int8)
        self.weights = tuple(map(float, weights))
        count = 1 if self.levels is None else self.levels.shape[1]
        if len(self.weights) != count:
            raise ValueError(f"{count} levels need as many weights; got {len(self.weights)}")
        if self.matrix is not None and self.matrix.shape != (len(self.matrix),) * 2:
            raise ValueError(f"a matrix of classes is square; got the shape {self.matrix.shape}")
        content = b"".join(b"-" if x is None else x.tobytes() for x in (self.levels, self.matrix))
        self.digest = hashlib.sha256(content + repr(self.weights).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassRelation) and self.digest == other.digest

    def pairs(self, valid: Pairs, rows: Int[Array, "n"], columns: Int[Array, "m"]) -> tuple[Pairs, ...]:
        """The relation at each level, for ``losses.over_levels``.

        Args:
          valid: ``[n, m]`` relation by class; entries that are in neither of its two matrices (padding, an image with
            itself) stay in neither.
          rows: ``[n]`` classes.
          columns: ``[m]`` classes.

        Returns:
          One ``Pairs`` of shape ``[n, m]`` per level.

        >>> pairs = losses.pairs_from_labels(jnp.array([0, 1, 2]))
        >>> cousins = ClassRelation(matrix=[[1, -1, 0], [-1, 1, 0], [0, 0, 1]])
        >>> cousins.pairs(pairs, jnp.arange(3), jnp.arange(3))[0].negative.tolist()
        [[False, False, True], [False, False, True], [True, True, False]]
        """
        counted = valid.positive | valid.negative
        if self.matrix is not None:
            found = jnp.asarray(self.matrix)[rows][:, columns]
            return (Pairs(counted & (found == 1), counted & (found == 0)),)
        assert self.levels is not None
        numbers = jnp.asarray(self.levels)
        of_rows, of_columns = numbers[rows], numbers[columns]
        same = [of_rows[:, None, level] == of_columns[None, :, level] for level in range(len(self.weights))]
        return tuple(Pairs(counted & equal, counted & ~equal) for equal in same)


def levels_of_names(names: Sequence[str], separator: str) -> Int[np.ndarray, "c levels"]:
    """The levels of classes whose names are paths, such as ``corvidae/corvus/corvus corax``, from coarse to fine.

    A class of fewer levels than others is alone below its last. Names may repeat under other parents.

    Args:
      names: names of the classes.
      separator: text between the levels.

    Returns:
      ``[classes, levels]``; the last level has a number for each class.

    Raises:
      ValueError: if no name has the separator, or a part of a name is empty.

    >>> levels_of_names(["cat/lion", "cat/lynx", "owl"], "/").tolist()
    [[0, 0], [0, 1], [1, 2]]
    """
    paths = [tuple(name.split(separator)) for name in names]
    for name, path in zip(names, paths, strict=True):
        if not all(part.strip() for part in path):
            raise ValueError(f"the class {name!r} has an empty level")
    count = max(map(len, paths), default=0)
    if count < 2:
        raise ValueError(f"no class has {separator!r} in its name, such as {names[0]!r}" if names else "no classes")
    levels = []
    for level in range(count):
        numbers: dict[tuple[str, ...], int] = {}
        levels.append([numbers.setdefault(path[: level + 1], len(numbers)) for path in paths])
    return np.asarray(levels, np.int32).T
