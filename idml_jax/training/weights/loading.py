"""Puts the tensors of weights into a model's variables, strictly: every tensor, and no others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idml_jax.errors import UserError
from idml_jax.models import MODELS, naming, vit
from idml_jax.training.weights import identify, wrapped
from idml_jax.training.weights.reading import read
from idml_jax.training.weights.tensors import Named, Tensors, is_counter

PARTS = {
    "trunk": ("params/trunk/", "batch_stats/"),
    "semantic": ("params/trunk/", "batch_stats/", "params/heads/semantic/"),
    "all": ("params/trunk/", "batch_stats/", "params/heads/"),
}
INPUT_LAYERS = ("match", "sum")
# Parameters of a trunk that weights need not have, and that may be left out: the power of GeM pooling.
OWN_LEAVES = ("/pool_p",)
OWN_NAMES = ("params/trunk/pool_p", naming.torch_name("params/trunk/pool_p"))
# The projection of CLIP, which only its own pooling uses.
PROJECTION = ("params/trunk/head/kernel", naming.torch_name("params/trunk/head/kernel"))


class _Source(NamedTuple):
    """The tensors to load from, chosen among those of the weights.

    Attributes:
      values: tensors by their names in timm, or by this package's paths.
      beside: names of tensors next to them that may be left out.
      told: remarks on the choice.
    """

    values: Named
    beside: tuple[str, ...]
    told: tuple[str, ...] = ()


def load(
    source: str | Path | Tensors,
    like: Mapping[str, Any],
    parts: str = "trunk",
    network: str = "",
    input_layer: str = "match",
) -> tuple[dict[str, Any], str]:
    """Loads variables for a model from a file.

    Args:
      source: as for ``read``, or its result.
      like: the model's variables (``params`` and ``batch_stats``), arrays or their shapes.
      parts: ``trunk``, ``semantic`` (with the semantic head) or ``all`` (with both heads).
      network: key of ``MODELS`` of the model; a file that names another network is refused, since different networks
        may have the same shapes (ResNets v1 and v1.5).
      input_layer: ``match``: the kernels that see the image must have the model's channels; ``sum``: those of colour
        images are summed over the channels for a model of grey ones, and a model of colour images gets a third of a
        grey kernel in every channel.

    Returns:
      The variables of these parts as nested dictionaries of numpy arrays, for ``merge``; and a line that describes
      what was loaded.

    Raises:
      UserError: naming missing, additional, wrongly shaped or non-finite tensors.
      ValueError: for an unknown part or way with the input layer.
    """
    for value, known, what in ((parts, PARTS, "parts"), (input_layer, INPUT_LAYERS, "input_layer")):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    tensors = source if isinstance(source, Tensors) else read(source)
    where = str(source) if not isinstance(source, Tensors) else tensors.name or "the given tensors"
    if network and tensors.network in MODELS and tensors.network != network:
        raise UserError(
            f"{where} holds weights of {tensors.network}, and the network is {network}; "
            f"config.model.name={tensors.network} is the network that fits"
        )
    ours = naming.flatten(like)
    wanted = {path for path in ours if path.startswith(PARTS[parts])}
    name_of = {path: naming.torch_name(path) if tensors.torch else path for path in ours}
    found = _chosen(tensors, {name_of[p]: _shape(p, ours[p], tensors.torch) for p in wanted})
    heads = {path for path in ours if path.startswith("params/heads/")}
    # Heads that are not requested may be present or absent, in any form.
    ignored = {n for n in found.values if identify.is_head(n, tensors.torch)} - {
        name_of[path] for path in wanted & heads
    }
    if parts == "all":
        ignored = set()
    ignored |= {n for n in found.values if n in (*OWN_NAMES, *PROJECTION)} - {name_of[path] for path in wanted}
    problems, loaded, fresh = [], {}, []
    for path in sorted(wanted):
        name = name_of[path]
        if name not in found.values:
            if path.endswith(OWN_LEAVES):
                fresh.append(name)
            else:
                problems.append(f"{name} is missing there")
            continue
        expected = _shape(path, ours[path], tensors.torch)
        value = _adapted(path, found.values[name], expected, input_layer, network)
        if value.shape != expected:
            problems.append(f"{name} is {value.shape} there, {expected} here")
        elif not np.isfinite(value).all():
            problems.append(f"{name} is not finite")
        else:
            loaded[path] = naming.from_torch(path, value) if tensors.torch else value
    used = {name_of[path] for path in wanted} | ignored
    rest = set(found.values) - used
    beside = {n for n in rest if tensors.torch and wrapped.is_beside(n)}
    problems += [f"{name} is only there" for name in sorted(rest - beside)]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        hint = _hint(tensors, found, {name_of[p]: _shape(p, ours[p], tensors.torch) for p in wanted}, parts, network)
        raise UserError(f"{where} does not fit the network: {'; '.join(problems[:4])}{more}{hint}")
    taken = {name_of[path] for path in loaded}
    left_out = [n for n in {*tensors.left_out, *found.beside, *beside, *ignored} - taken if not is_counter(n)]
    told = [*found.told, *([f"not in the file: {', '.join(fresh)}"] if fresh else [])]
    if left_out:
        told.append(f"left out: {wrapped.listed(left_out)} ({len(left_out)} in total)")
    return naming.unflatten(loaded), "; ".join([f"{len(loaded)} tensors from {where} ({parts})", *told])


def merge(variables: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's variables with the loaded entries substituted."""
    merged = naming.unflatten({**naming.flatten(variables), **naming.flatten(loaded)})
    return {"params": merged["params"], "batch_stats": merged.get("batch_stats", {})}


def _chosen(tensors: Tensors, wanted: wrapped.Shapes) -> _Source:
    """The sub-tree of the weights that holds the network, or the usual one if none holds any of it."""
    if not tensors.torch or not tensors.containers:
        return _Source(tensors.values, ())
    best, others = wrapped.best(tensors.containers, wanted)
    if not best.matched:
        return _Source(tensors.values, ())
    told = []
    if best.container or best.prefix not in ("", "module.", "model.", "module.model."):
        told.append(f"the network is {best.place}")
    if others:
        also = ", ".join(tree.place for tree in others[:3])
        told.append(f"{best.place} is taken, {also} would fit too")
    if best.added:
        told.append(f"zeros for {len(best.added)} biases that the file does without")
    return _Source(best.values, best.beside, tuple(told))


def _shape(path: str, leaf: Any, torch: bool) -> tuple[int, ...]:
    return naming.shape_in_torch(path, tuple(leaf.shape)) if torch else tuple(leaf.shape)


def _adapted(path: str, value: np.ndarray, expected: tuple[int, ...], input_layer: str, network: str) -> np.ndarray:
    """A tensor with the model's number of positions and, where that is wanted, of colour channels."""
    if path.endswith("/pos_embed"):
        return vit.fit_positions(value, expected, network)
    axis = _channel_axis(value.shape, expected)
    if axis is None or input_layer != "sum":
        return value
    if expected[axis] == 1:
        return value.sum(axis, keepdims=True)
    return np.repeat(value, expected[axis], axis) / expected[axis]


def _channel_axis(there: tuple[int, ...], here: tuple[int, ...]) -> int | None:
    """The axis of the colour channels, if two kernels differ in nothing else."""
    if len(there) != 4 or len(here) != 4:
        return None
    different = [axis for axis in range(4) if there[axis] != here[axis]]
    fits = len(different) == 1 and different[0] in (1, 2) and {there[different[0]], here[different[0]]} == {1, 3}
    return different[0] if fits else None


def _hint(tensors: Tensors, found: _Source, wanted: wrapped.Shapes, parts: str, network: str) -> str:
    """The cure for weights that do not fit: other channels, another network, other heads, or what is there."""
    there = {n: found.values[n].shape for n in wanted if n in found.values}
    channels = [n for n, shape in there.items() if _channel_axis(shape, wanted[n]) is not None]
    if channels and all(there.get(n) == shape or n in channels for n, shape in wanted.items()):
        count = there[channels[0]][_channel_axis(there[channels[0]], wanted[channels[0]]) or 1]
        return (
            f" (the weights see images of {count} channel{'s' * (count > 1)}: config.data.channels={count} gives them "
            "such images, and config.model.input_layer=sum sums their kernels over the channels)"
        )
    trunk_differs = any(not identify.is_head(n, tensors.torch) and there.get(n) != shape for n, shape in wanted.items())
    if trunk_differs:
        fitting = identify.networks(tensors)
        if network in fitting and any(there.get(n) != wanted[n] for n in PROJECTION if n in wanted):
            return " (the weights have no projection of this kind; config.model.pooling=token does without)"
        if fitting and network not in fitting:
            return (
                f" (the tensors are those of {' or '.join(fitting)}: config.model.name={fitting[0]} is a network that "
                "fits)"
            )
    if not there or 2 * len(there) < len(wanted):
        return _prefixes_there(tensors)
    return _hint_on_heads(found, tensors.torch, parts)


def _hint_on_heads(found: _Source, torch: bool, parts: str) -> str:
    kernel = "uncertainty.weight" if torch else "params/heads/uncertainty/kernel"
    if parts == "trunk":
        return ""
    if kernel not in found.values:
        head = "no uncertainty head: config.model.init_parts=semantic leaves it random"
    elif any("uncertainty_hidden" in name for name in found.values):
        head = "an uncertainty head with a hidden layer: config.model.uncertainty_head=mlp"
    else:
        head = "a linear uncertainty head: config.model.uncertainty_head=linear"
    return f" (the file has {head}; config.model.init_parts=trunk leaves heads out)"


def _prefixes_there(tensors: Tensors) -> str:
    """What is there, for the message about weights that do not fit at all."""
    if not tensors.torch or not tensors.containers:
        begin = wrapped.beginnings(tensors.values, "." if tensors.torch else "/")
    else:
        begin = "; ".join(
            wrapped.beginnings(named) + (f" in {place!r}" if place else "")
            for place, named in list(tensors.containers.items())[:4]
        )
    return f" (the names there begin with {begin})"
