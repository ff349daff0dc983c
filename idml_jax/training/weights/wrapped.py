"""Finds a network among the tensors of a checkpoint: under a wrapper's prefix, in one of several dictionaries.

Training scripts store a network under ``state_dict``, ``model`` or ``teacher``, with prefixes such as ``module.``,
``backbone.`` (DINO), ``module.encoder_q.`` (MoCo) or ``extractor.model.`` (OML), beside projection heads and queues. No
list of such names is complete, so every place where a network could begin is compared with the tensors that are wanted.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from idml_jax.training.weights import names as names_lib
from idml_jax.training.weights.tensors import CONTAINERS, NO_CLASSIFIERS, Named, is_counter

Shapes = Mapping[str, tuple[int, ...]]
Value = TypeVar("Value")

# Heads of published training code beside a trunk. They do not change its features, so they may be left out.
_BESIDE = re.compile(
    r"(projection_head|projection|projector|proj_head|head_proj|predictor|prediction_head|prototypes|queue|queue_ptr"
    r"|mask_token|fc|head|heads|head_dist|classifier|last_layer|pre_logits|pooler|logit_scale|logit_bias"
    r"|text_model|text_projection|visual_projection|decoder\w*|proxies|criterion|loss)(\.|$)"
)
# Which of several networks that fit is taken: the averaged one before the others, a student last.
_RANKS = (("teacher", 0), ("ema", 1), ("student", 3), ("encoder_k", 4), ("momentum", 4))


@dataclass(frozen=True)
class SubTree:
    """The tensors below one place of a checkpoint, under timm's names.

    Attributes:
      container: place of the dictionary in the file; empty: the file itself.
      prefix: beginning of the tensors' names there.
      values: the tensors, without the prefix.
      beside: names in the same dictionary that do not begin with the prefix, or that belong to no trunk.
      added: tensors of zeros for biases that the file does without.
      matched: number of wanted tensors that it holds.
    """

    container: str
    prefix: str
    values: Named
    beside: tuple[str, ...]
    added: tuple[str, ...] = ()
    matched: int = 0

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return " ".join(filter(None, [self.container, self.prefix and f"{self.prefix}*"])) or "the file itself"

    @property
    def rank(self) -> tuple[int, int, int, int]:
        """Orders sub-trees that fit alike, the one to take first."""
        words = set(re.split(r"[._\s]", self.place.replace("encoder_k", "encoderk")))
        known = {word.replace("_", ""): rank for word, rank in _RANKS}
        rank = min((known[word] for word in words if word in known), default=2)
        order = CONTAINERS.index(self.container) if self.container in CONTAINERS else len(CONTAINERS)
        return rank, order, self.place.count("."), len(self.place)


def is_beside(name: str) -> bool:
    """Whether a tensor belongs to a head or a counter, which may be left out of a trunk."""
    return is_counter(name) or (bool(_BESIDE.match(name)) and not name.startswith(NO_CLASSIFIERS))


def roots(named: Mapping[str, np.ndarray]) -> list[str]:
    """Prefixes below which a network may begin, the shortest first: those of kernels that see an image."""
    channels = lambda count: [n for n, v in named.items() if v.ndim == 4 and v.shape[1] == count]
    kernels = channels(3) or channels(1)
    found = {""}
    for name in kernels:
        parts = name.split(".")
        found |= {".".join(parts[:k]) + "." for k in range(1, len(parts) - 1)}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def sub_trees(containers: Mapping[str, Named]) -> Iterator[SubTree]:
    """Every place of a checkpoint where a network may begin."""
    for container, named in containers.items():
        for prefix in roots(named):
            inside = {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}
            found = names_lib.canonical(inside)
            beside = [n for n in named if not n.startswith(prefix)] + [prefix + n for n in found.left_out]
            yield SubTree(container, prefix, found.values, tuple(beside), found.added)


def count(values: Mapping[str, np.ndarray], wanted: Shapes) -> int:
    """Number of wanted tensors that are there and differ at most in what can be adapted: positions and channels."""
    return sum(name in values and alike(name, values[name].shape, shape) for name, shape in wanted.items())


def alike(name: str, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
    """Whether two shapes are of one tensor, perhaps for another image size or number of colour channels."""
    if there == here:
        return True
    if len(there) != len(here):
        return False
    if name == "pos_embed":
        return there[::2] == here[::2]
    return len(here) == 4 and there[0] == here[0] and there[2:] == here[2:] and {there[1], here[1]} == {1, 3}


def best(containers: Mapping[str, Named], wanted: Shapes) -> tuple[SubTree, list[SubTree]]:
    """The sub-tree that holds most of the wanted tensors, and further ones that hold all of them too.

    Args:
      containers: dictionaries of tensors by their place in the file.
      wanted: shapes of the network's tensors, by their names in timm.
    """
    found: list[SubTree] = []
    for tree in sub_trees(containers):
        # Below a place that fits, there is none that fits better.
        if any(_full(f, wanted) and f.container == tree.container and tree.prefix.startswith(f.prefix) for f in found):
            continue
        matched = count(tree.values, wanted)
        if matched or not found:
            found.append(SubTree(tree.container, tree.prefix, tree.values, tree.beside, tree.added, matched))
    found.sort(key=lambda tree: (-tree.matched, tree.rank))
    return found[0], [tree for tree in found[1:] if _full(tree, wanted)]


def _full(tree: SubTree, wanted: Shapes) -> bool:
    return bool(wanted) and tree.matched == len(wanted)


def beginnings(names: Iterable[str], separator: str = ".") -> str:
    """The most common beginnings of tensors' names with their counts, for messages."""
    counts = Counter(separator.join(name.split(separator)[:2]) for name in names)
    return ", ".join(f"{prefix}{separator}* ({count})" for prefix, count in counts.most_common(4))


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names of tensors for a message: all of them, or the first and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
