"""Weights to start from: torchvision and timm files, published metric-learning checkpoints, and this package's own.

``config.model.init_from`` names the file; ``config.model.init_parts`` says which parts to use. From the command line::

    python -m idml_jax.pretrained convert resnet50.safetensors runs/imagenet        # to this package's format
    python -m idml_jax.pretrained convert runs/cub model.safetensors                # a trained run, for PyTorch

Reading is strict: the file must hold every tensor of the network with its shape, and no others. Only classifiers,
BatchNorm's batch counters and heads that are not requested are left out silently.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idml_jax.errors import UserError
from idml_jax.models import MODELS, EmbeddingModel, create_model, naming, vit
from idml_jax.runtime import checkpoint
from idml_jax.runtime.files import first_line, write_bytes
from idml_jax.training import workdir as workdir_lib

logger = logging.getLogger("idml_jax")

PARTS = {
    "trunk": ("params/trunk/", "batch_stats/"),
    "semantic": ("params/trunk/", "batch_stats/", "params/heads/semantic/"),
    "all": ("params/trunk/", "batch_stats/", "params/heads/"),
}
TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin")
# Keys under which training scripts store the tensors, in the order they are tried.
CONTAINERS = ("model_state_dict", "state_dict", "teacher", "model")
# Prefixes of wrappers: DataParallel; a network that is an attribute (published IDML and ProxyAnchor code); DINO.
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
CLASSIFIERS = ("fc.", "head.", "classifier.")


class Tensors(NamedTuple):
    """The content of a weights file, with the file's names.

    Attributes:
      values: tensors, without classifiers and counters.
      left_out: names of the tensors left out.
      torch: whether names and axes are PyTorch's; otherwise they are this package's.
      network: key of ``MODELS`` named by the file's metadata or the run's settings; empty if unknown.
    """

    values: dict[str, np.ndarray]
    left_out: tuple[str, ...]
    torch: bool
    network: str = ""


def read(source: str | Path) -> Tensors:
    """Reads all tensors of a file or folder.

    Args:
      source: ``.safetensors``; ``.pth``, ``.pt``, ``.tar``, ``.bin`` (needs PyTorch; may hold only tensors
        and plain containers); a folder written by ``convert``; the folder of a run, whose best checkpoint is read, or
        one checkpoint in it.

    Returns:
      The tensors as float32 numpy arrays.

    Raises:
      UserError: if it is missing, has an unknown format, is damaged, or holds no tensors.
    """
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{path}: no such weights file (config.model.init_from)")
    network = ""
    if path.is_dir():
        return _read_own(path)
    if path.suffix == ".safetensors":
        named, network = _read_safetensors(path)
    elif path.suffix in TORCH_SUFFIXES:
        named = _read_torch(path)
    else:
        raise UserError(
            f"{path}: weights come as .safetensors, as {', '.join(TORCH_SUFFIXES)} or as a folder of this package"
        )
    named = _without_prefixes(named)
    left_out = tuple(n for n in named if n.startswith(CLASSIFIERS) or n.endswith("num_batches_tracked"))
    values = {n: v for n, v in named.items() if n not in left_out}
    if not values:
        raise UserError(f"{path}: holds no weights of a network")
    return Tensors(values, left_out, torch=True, network=network)


def load(
    source: str | Path | Tensors, like: Mapping[str, Any], parts: str = "trunk", network: str = ""
) -> tuple[dict[str, Any], str]:
    """Loads variables for a model from a file.

    Args:
      source: as for ``read``, or its result.
      like: the model's variables (``params`` and ``batch_stats``), arrays or their shapes.
      parts: ``trunk``, ``semantic`` (with the semantic head) or ``all`` (with both heads).
      network: key of ``MODELS`` of the model; a file that names another network is refused, since different networks
        may have the same shapes (ResNets v1 and v1.5).

    Returns:
      The variables of these parts as nested dictionaries of numpy arrays, for ``merge``; and a line that describes
      what was loaded.

    Raises:
      UserError: naming missing, additional, wrongly shaped or non-finite tensors.
      ValueError: for an unknown part.
    """
    if parts not in PARTS:
        raise ValueError(f"unknown parts {parts!r}; known: {', '.join(PARTS)}")
    where = "the given tensors" if isinstance(source, Tensors) else str(source)
    tensors = source if isinstance(source, Tensors) else read(source)
    if network and tensors.network in MODELS and tensors.network != network:
        raise UserError(
            f"{where} holds weights of {tensors.network}, and the network is {network}; "
            f"config.model.name={tensors.network} is the network that fits"
        )
    ours = naming.flatten(like)
    name_of = {path: naming.torch_name(path) if tensors.torch else path for path in ours}
    wanted = {path for path in ours if path.startswith(PARTS[parts])}
    heads = {path for path in ours if path.startswith("params/heads/")}
    # Heads that are not requested may be present or absent, in any form.
    ignored = {n for n in tensors.values if _is_head(n, tensors.torch)} - {name_of[path] for path in wanted & heads}
    if parts == "all":
        ignored = set()
    problems, loaded = [], {}
    for path in sorted(wanted):
        name, shape = name_of[path], tuple(ours[path].shape)
        if name not in tensors.values:
            problems.append(f"{name} is missing there")
            continue
        value = tensors.values[name]
        expected = naming.shape_in_torch(path, shape) if tensors.torch else shape
        if path.endswith("/pos_embed"):
            value = vit.fit_positions(value, expected, network)
        if value.shape != expected:
            problems.append(f"{name} is {value.shape} there, {expected} here")
        elif not np.isfinite(value).all():
            problems.append(f"{name} is not finite")
        else:
            loaded[path] = naming.from_torch(path, value) if tensors.torch else value
    used = {name_of[path] for path in wanted} | ignored
    problems += [f"{name} is only there" for name in sorted(set(tensors.values) - used)]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        hint = _hint(tensors, parts) if loaded else _prefixes_there(tensors)
        raise UserError(f"{where} does not fit the network: {'; '.join(problems[:4])}{more}{hint}")
    left_out = sorted({*tensors.left_out, *ignored} - {n for n in tensors.left_out if "num_batches" in n})
    told = f"; left out: {', '.join(left_out)}" if left_out else ""
    return naming.unflatten(loaded), f"{len(loaded)} tensors from {where} ({parts}){told}"


def merge(variables: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a model's variables with the loaded entries substituted."""
    merged = naming.unflatten({**naming.flatten(variables), **naming.flatten(loaded)})
    return {"params": merged["params"], "batch_stats": merged.get("batch_stats", {})}


def _hint(tensors: Tensors, parts: str) -> str:
    kernel = "uncertainty.weight" if tensors.torch else "params/heads/uncertainty/kernel"
    if parts == "trunk":
        return ""
    if kernel not in tensors.values:
        head = "no uncertainty head: config.model.init_parts=semantic leaves it random"
    elif any("uncertainty_hidden" in name for name in tensors.values):
        head = "an uncertainty head with a hidden layer: config.model.uncertainty_head=mlp"
    else:
        head = "a linear uncertainty head: config.model.uncertainty_head=linear"
    return f" (the file has {head}; config.model.init_parts=trunk leaves heads out)"


def _prefixes_there(tensors: Tensors) -> str:
    """The most common beginnings of tensor names, for the message about a file that does not fit at all."""
    separator = "." if tensors.torch else "/"
    counts = Counter(separator.join(name.split(separator)[:2]) for name in tensors.values)
    begin = ", ".join(f"{prefix}{separator}* ({count})" for prefix, count in counts.most_common(4))
    return f" (the names there begin with {begin}; a wrapper's prefix has to be taken off)"


def _is_head(name: str, torch: bool) -> bool:
    return name.startswith(tuple(f"{n}." for n in naming.HEADS.values()) if torch else "params/heads/")


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors, and the network named by the metadata."""
    import ml_dtypes  # noqa: F401  numpy then knows bfloat16
    from safetensors import numpy as safetensors
    from safetensors import safe_open

    try:
        named = safetensors.load_file(path)
        with safe_open(path, framework="numpy") as file:
            network = (file.metadata() or {}).get("network", "")
    except Exception as error:
        raise UserError(f"{path}: cannot be read as safetensors ({first_line(error)})") from error
    return {name: value.astype(np.float32) for name, value in named.items()}, network


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: {path.suffix} files are read by PyTorch, which is not installed; install it (pip install torch) "
            "or convert the file to .safetensors"
        ) from error
    try:
        # Only tensors and plain containers are unpickled: a weights file cannot run code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: is damaged, or holds more than tensors and is refused ({first_line(error)}); "
            "save the state_dict alone"
        ) from error
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{path}: holds no state_dict, alone or under {', '.join(CONTAINERS)}")
    return {name: _dense(path, name, value) for name, value in content.items()}


def _dense(path: Path, name: str, value: Any) -> np.ndarray:
    """A PyTorch tensor as a float32 array; also for sparse and quantised tensors."""
    try:
        value = value.detach()
        value = value.dequantize() if value.is_quantized else value
        value = value.to_dense() if value.layout != _strided() else value
        return value.float().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path}: {name} cannot be read as numbers ({first_line(error)})") from error


def _strided() -> Any:
    import torch

    return torch.strided


def _without_prefixes(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while True:
        prefix = next((p for p in PREFIXES if named and all(name.startswith(p) for name in named)), None)
        if prefix is None:
            return named
        named = {name.removeprefix(prefix): value for name, value in named.items()}


def _read_own(path: Path) -> Tensors:
    """Reads weights of a run, of one of its checkpoints, or of a folder written by ``convert``."""
    above = (path, *list(path.parents)[:3])  # a checkpoint is RUN/checkpoints/STEP/state
    run = next((folder for folder in above if (folder / "config.json").is_file()), None)
    config = workdir_lib.read(run) if run else None
    tree = checkpoint.read_variables(checkpoint.find_state(path, config.eval.best_metric if config else ""))
    return Tensors(naming.flatten(tree), (), torch=False, network=config.model.name if config else "")


def _model_of(tensors: Tensors, name: str) -> tuple[EmbeddingModel, str]:
    """A model with the heads found in the tensors, and the parts to load."""
    shape = {n: v.shape for n, v in tensors.values.items()}
    names = ("embedding", "uncertainty", "uncertainty_hidden")
    semantic, uncertainty, hidden = (shape.get(f"{name}.weight") for name in names)
    if semantic is None:
        return create_model(name), "trunk"
    return create_model(
        name,
        embedding_dim=semantic[0],
        uncertainty_dim=uncertainty[0] if uncertainty else 1,
        uncertainty_head="none" if uncertainty is None else "mlp" if hidden else "linear",
        uncertainty_hidden=hidden[0] if hidden else 1,
    ), "all"


def convert(source: str | Path, out: str | Path, *, model: str = "resnet50", size: int = 224, prefix: str = "") -> str:
    """Converts weights to another format.

    Args:
      source: see ``read``.
      out: a ``.safetensors`` file (PyTorch's names and axes), or a folder (this package's format).
      model: key of ``MODELS``; PyTorch's weights are checked against this network when written to a folder.
      size: image size in pixels, for networks whose weights depend on it.
      prefix: prefix of every name in a ``.safetensors`` file (``model.`` for the published IDML code).

    Returns:
      A line that says what was written.

    Raises:
      UserError: if the source does not match the network, or ``out`` already exists.
    """
    out = Path(out).expanduser().absolute()
    if out.exists():
        raise UserError(f"{out} already exists")
    if model not in MODELS:
        raise UserError(f"--model={model}; known: {', '.join(sorted(MODELS))}")
    tensors = read(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".safetensors":
        from safetensors import numpy as safetensors

        named = tensors.values
        if not tensors.torch:
            named = {naming.torch_name(path): naming.to_torch(path, value) for path, value in named.items()}
        write_bytes(out, safetensors.save({prefix + n: np.ascontiguousarray(v) for n, v in named.items()}))
        return f"{len(named)} tensors written to {out} in PyTorch's naming"
    if not tensors.torch:
        raise UserError(f"{source} already is in this package's format; give a .safetensors file to write to")
    network, parts = _model_of(tensors, model)
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    try:
        variables, told = load(tensors, like, parts, network=model)
    except UserError as error:
        raise UserError(f"{str(error).replace('the given tensors', str(source))}; --model={model}") from error
    checkpoint.save_variables(out, variables)
    return f"{told.replace('the given tensors', str(source))} written to {out}"
