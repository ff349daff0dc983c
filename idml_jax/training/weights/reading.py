"""Reads weights from files, hubs and runs into ``Tensors``."""

from pathlib import Path

from idml_jax.errors import UserError
from idml_jax.models import naming
from idml_jax.runtime import checkpoint
from idml_jax.training.weights import about, files, names
from idml_jax.training.weights.locate import Located, locate, state_of
from idml_jax.training.weights.tensors import CONTAINERS, Named, Tensors, is_classifier, is_counter, without_prefixes


def read(source: str | Path) -> Tensors:
    """Reads all tensors of weights.

    Args:
      source: ``.safetensors``; ``.pth``, ``.pt``, ``.tar``, ``.bin``, ``.ckpt`` (need PyTorch; may hold only tensors
        and plain containers); a folder written by ``convert``; the folder of a run, whose best checkpoint is read, or
        one checkpoint in it; a name on the Hugging Face hub, see ``locate``.

    Returns:
      The tensors as float32 numpy arrays.

    Raises:
      UserError: if it is missing, has an unknown format, is damaged, or holds no tensors.
    """
    return read_located(locate(source))


def read_located(located: Located) -> Tensors:
    """Reads all tensors of weights on this machine; see ``read``."""
    if not located.files:
        return _read_own(located)
    containers, metadata = files.read_files(located.files)
    native = about.native_of(located.folder, metadata, located.path)
    if located.network and not native.network:
        native = about.of_catalogue(located.network)
    named = without_prefixes(_default(containers))
    named = names.canonical(named).values
    left_out = tuple(n for n in named if is_classifier(n) or is_counter(n))
    values = {n: v for n, v in named.items() if n not in left_out}
    if not values:
        raise UserError(f"{located.path}: holds no weights of a network")
    network = native.network or metadata.get("network", "")
    return Tensors(values, left_out, True, network, containers, native, located.name)


def _default(containers: dict[str, Named]) -> Named:
    """The dictionary that usually holds the network; ``loading`` looks at all of them."""
    known = [place for place in ("", *CONTAINERS) if len(containers.get(place, ())) > 1]
    return containers[known[0] if known else max(containers, key=lambda place: len(containers[place]))]


def _read_own(located: Located) -> Tensors:
    """Reads weights of a run, of one of its checkpoints, or of a folder written by ``convert``."""
    folder, config = state_of(located.path)
    tree = checkpoint.read_variables(folder)
    native = about.native_of_run(config, str(located.path)) if config else about.Native()
    network = config.model.name if config else ""
    return Tensors(naming.flatten(tree), (), torch=False, network=network, native=native, name=located.name)
