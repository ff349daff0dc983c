"""Writes weights in another format, and says what a file or a name on the hub holds."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from idml_jax.errors import UserError
from idml_jax.models import MODELS, EmbeddingModel, create_model, known_models, naming
from idml_jax.runtime import checkpoint
from idml_jax.runtime.files import check_target, user_path
from idml_jax.training.weights import about, files, identify
from idml_jax.training.weights.loading import OWN_LEAVES, OWN_NAMES, PROJECTION, load
from idml_jax.training.weights.locate import Located, locate, sha256
from idml_jax.training.weights.reading import read, read_located
from idml_jax.training.weights.tensors import Native, Tensors

logger = logging.getLogger("idml_jax")


def _model_of(tensors: Tensors, name: str) -> tuple[EmbeddingModel, str]:
    """A model with the heads found in the tensors, and the parts to load."""
    shape = {n: v.shape for n, v in tensors.values.items()}
    names = ("embedding", "uncertainty", "uncertainty_hidden")
    semantic, uncertainty, hidden = (shape.get(f"{name}.weight") for name in names)
    pooling = "gem" if shape.keys() & set(OWN_NAMES) else "avg_max"
    if semantic is None:
        return create_model(name, pooling=pooling), "trunk"
    return create_model(
        name,
        pooling=pooling,
        embedding_dim=semantic[0],
        uncertainty_dim=uncertainty[0] if uncertainty else 1,
        uncertainty_head="none" if uncertainty is None else "mlp" if hidden else "linear",
        uncertainty_hidden=hidden[0] if hidden else 1,
    ), "all"


def convert(source: str | Path, out: str | Path, *, model: str = "", size: int = 224, prefix: str = "") -> str:
    """Converts weights to another format.

    Args:
      source: see ``read``.
      out: a ``.safetensors`` file (PyTorch's names and axes), or a folder (this package's format).
      model: key of ``MODELS``; PyTorch's weights are checked against this network when written to a folder. Empty: the
        network that the weights name, or else ``resnet50``.
      size: image size in pixels, for networks whose weights depend on it.
      prefix: prefix of every name in a ``.safetensors`` file (``model.`` for the published IDML code).

    Returns:
      A line that says what was written.

    Raises:
      UserError: if the source does not match the network, or ``out`` already exists.
    """
    out = user_path(out)
    if out.exists():
        raise UserError(f"{out} already exists")
    if model and model not in MODELS:
        raise UserError(f"--model={model}; known: {known_models()}")
    tensors = read(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        named = tensors.values
        if not tensors.torch:
            named = {naming.torch_name(path): naming.to_torch(path, value) for path, value in named.items()}
        metadata = about.metadata_of(tensors.native, tensors.name) if tensors.native.network else None
        files.write_safetensors(out, {prefix + n: v for n, v in named.items()}, metadata)
        return f"{len(named)} tensors written to {out} in PyTorch's naming"
    if not tensors.torch:
        raise UserError(f"{source} already is in this package's format; give a .safetensors file to write to")
    model = model or (tensors.network if tensors.network in MODELS else "resnet50")
    try:
        network, parts = _model_of(tensors, model)
    except ValueError as error:
        raise UserError(f"{source}: {error}; --model={model}") from error
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    try:
        variables, told = load(tensors, like, parts, network=model)
    except UserError as error:
        raise UserError(f"{error}; --model={model}") from error
    checkpoint.save_variables(out, variables)
    return f"{told} written to {out}"


def network_of(tensors: Tensors) -> str:
    """The network of weights: as their files say, or by names and shapes.

    Raises:
      UserError: if no network of this package has such tensors.
    """
    if tensors.network in MODELS:
        return tensors.network
    found = identify.networks(tensors)
    if found:
        if tensors.native.called:
            logger.warning(
                "warning: %s: %s is not known here by its name; its tensors are those of %s",
                tensors.name, tensors.native.called, found[0],
            )  # fmt: skip
        return found[0]
    called = f"{tensors.native.called}, " if tensors.native.called else ""
    raise UserError(
        f"{tensors.name}: none of this package's networks has these tensors ({called}{identify.looks_like(tensors)}); "
        f"known: {known_models()}"
    )


def native_of(tensors: Tensors) -> Native:
    """The settings that weights were made with: their own, and for what these leave open the catalogue's.

    Raises:
      UserError: if no network of this package has such tensors.
    """
    network, own = network_of(tensors), tensors.native
    usual = about.of_catalogue(network)
    size = own.image_size or identify.size_of(tensors, network) or usual.image_size
    # Published sizes need not be whole patches: 384 pixels of a network with patches of 14 are 27 patches, 378 pixels.
    size -= size % getattr(MODELS[network](), "patch", 1)
    resize = own.resize or (round(size * usual.resize / usual.image_size) if usual.image_size else size)
    mean, std = (own.mean, own.std) if own.mean else (usual.mean, usual.std)
    told_by = own.told_by or f"names and shapes of the tensors, and {usual.told_by or 'nothing else'}"
    return Native(network, own.called or network, size, resize, mean, std, own.pooling or usual.pooling, told_by)


def fetch(source: str | Path, out: str | Path) -> str:
    """Writes the trunk of weights as one ``.safetensors`` file in timm's naming that says what it is.

    Args:
      source: see ``locate``.
      out: a ``.safetensors`` file.

    Returns:
      A line that says what was written.

    Raises:
      UserError: if this package has no such network, or ``out`` exists or does not end in ``.safetensors``.
    """
    out = user_path(out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out={out}: the name of the file must end in .safetensors")
    if check_target(out):
        raise UserError(f"{out} already exists")
    located = locate(source)
    tensors = read_located(located)
    native = native_of(tensors)
    size = _checked_size(native)
    width = getattr(MODELS[native.network](), "projection", 0)
    projected = width and identify.shape_of(tensors, PROJECTION[1])[:1] == (width,)
    model = create_model(native.network, pooling="projection" if projected else "avg")
    variables, told = _trunk(tensors, model, native.network, size)
    flat = {p: v for p, v in naming.flatten(variables).items() if not p.endswith(OWN_LEAVES)}
    named = {naming.torch_name(path): naming.to_torch(path, value) for path, value in flat.items()}
    files.write_safetensors(out, named, about.metadata_of(native, _origin(located)))
    return f"{told}; {native.network} written to {out}"


def _trunk(tensors: Tensors, model: EmbeddingModel, network: str, size: int) -> tuple[dict[str, Any], str]:
    """The trunk's variables, for as many channels as the weights see; and a line that says what was loaded."""
    problem = None
    for channels in (3, 1):
        image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        try:
            return load(tensors, jax.eval_shape(model.init, jax.random.key(0), image), "trunk", network=network)
        except UserError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _checked_size(native: Native) -> int:
    """The image size of a trunk; 224 pixels where nothing says and nothing depends on it."""
    return native.image_size or 224


def _origin(located: Located) -> str:
    origin = {"name": located.name, "commit": located.commit, "sha256": sha256(located)}
    return json.dumps({key: value for key, value in origin.items() if value})


def show(source: str | Path) -> str:
    """Describes weights: tensors with their shapes, the network, the trunks that they fit, and their settings.

    Args:
      source: see ``locate``.

    Returns:
      Lines of text.

    Raises:
      UserError: if they cannot be read.
    """
    located = locate(source)
    tensors = read_located(located)
    lines = []
    for place, named in (tensors.containers or {"": tensors.values}).items():
        lines += [f"in {place!r}:"] if place else []
        lines += [f"{name}  {' x '.join(map(str, value.shape)) or 'a number'}" for name, value in named.items()]
    fitting = identify.networks(tensors)
    own = tensors.native
    lines += ["", f"what        {tensors.name}: {own.called or identify.looks_like(tensors)}"]
    if located.files:
        lines.append(f"sha256      {sha256(located)}")
    lines.append(f"fits        {', '.join(fitting) or f'no network of this package; known: {known_models()}'}")
    if tensors.network in MODELS or fitting:
        native = native_of(tensors)
        side = lambda value: f"{value} px" if value else "unknown"
        lines += [
            f"network     {native.network}",
            f"images      {side(native.image_size)}, shorter side {side(native.resize)} before the crop",
            f"mean, std   {native.mean or 'unknown'}, {native.std or 'unknown'}",
            f"pooling     {native.pooling or 'unknown'}",
            f"told by     {native.told_by}",
        ]
    return "\n".join(lines)
