"""Finds the files that ``config.model.init_from`` names: a file, a folder, a run, or a repository on the hub."""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.runtime import checkpoint
from idml_jax.runtime.files import first_line, user_path
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.packaged_weights import PACKAGES, packaged
from idml_jax.training.weights import hub

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
INDEX = ".index.json"  # of weights in several files: {"weight_map": {tensor: file}}
# Settings beside the weights: of timm and transformers, of transformers' image processors, of open_clip.
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
# Weights in the order of preference; timm's file of a CLIP model comes before open_clip's of both towers.
_PREFERRED = (
    "model.safetensors", f"model.safetensors{INDEX}", "open_clip_model.safetensors",
    "pytorch_model.bin", f"pytorch_model.bin{INDEX}", "open_clip_pytorch_model.bin",
)  # fmt: skip
_OWN = ("_METADATA", "checkpoints", "state")  # what only folders of this package hold


class Located(NamedTuple):
    """Weights on this machine.

    Attributes:
      name: what the user called them, for messages.
      path: the file, or the folder of a run or of ``convert``.
      files: the files of the tensors; empty for a run or a folder of ``convert``.
      folder: the folder of settings such as ``config.json``; ``None`` if there is none.
      commit: of the repository on the hub; empty elsewhere.
      network: key of ``MODELS`` that the name itself says; empty if it does not.
    """

    name: str
    path: Path
    files: tuple[Path, ...] = ()
    folder: Path | None = None
    commit: str = ""
    network: str = ""


def locate(source: str | Path) -> Located:
    """Finds weights by path or name, and downloads them if need be. An existing path comes before a name.

    Args:
      source: a file; a folder in the layout of the hub, of a run, of one of its checkpoints, or of ``convert``; the
        name of weights that are installed as a package; or ``owner/name`` on the hub, with or without ``hf://``
        before and ``@revision`` behind it.

    Raises:
      UserError: if there is nothing of that name, or it cannot be downloaded.
    """
    text = str(source)
    path = user_path(text)
    if not hub.is_meant(text) and path.exists():
        return _local(path)
    package = packaged(text)
    if package is not None:
        return _local(package)._replace(name=f"{text} ({package})", network=text)
    name = hub.parse(text, SUFFIXES)
    if name is None:
        if hub.is_meant(text):
            raise UserError(f"{text}: not a name on the hub; hf://owner/name, hf://owner/name/file, and @revision")
        raise UserError(f"{path}: no such weights file (config.model.init_from){_hint(text)}")
    if name.file and not name.file.endswith((*SUFFIXES, INDEX)):
        raise UserError(
            f"{text}: {name.file} is no file of weights; they come as .safetensors, as {', '.join(TORCH_SUFFIXES)}, or "
            f"as an index of such files ({INDEX})"
        )
    found = hub.download(name, lambda names: _wanted(str(name), names, name.file))
    weights = [file for file in found.names if file not in SETTINGS]
    if weights[0].endswith(INDEX):  # its pieces, which it alone names
        pieces = _pieces(found.folder / weights[0])
        settings = [file for file in found.names if file in SETTINGS]
        choose = lambda names: (weights[0], *(p for p in pieces if p in names), *settings)
        found = hub.download(name._replace(revision=found.commit), choose)
    files = _files(str(name), found.folder, weights[0])
    return Located(f"{name} (commit {found.commit[:12]})", found.folder / weights[0], files, found.folder, found.commit)


def _hint(text: str) -> str:
    """What else the name of weights may have been meant as."""
    word = text.lower().replace("-", "_")
    if near := difflib.get_close_matches(word, PACKAGES, n=1, cutoff=0.8):
        return f"; {near[0]} is the name of weights that are installed as a package"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", text) and not text.startswith("."):
        return f"; a file on the Hugging Face hub is named hf://{text}"
    if re.fullmatch(r"\w+\.\w+", text) and not text.endswith(SUFFIXES):
        return f"; weights of timm are named with their owner, timm/{text}"
    return ""


def _local(path: Path) -> Located:
    if not path.is_dir():
        if path.name.endswith(INDEX):
            return Located(str(path), path, _files(str(path), path.parent, path.name), path.parent)
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"{path}: weights come as .safetensors, as {', '.join(TORCH_SUFFIXES)} or as a folder of this package"
            )
        return Located(str(path), path, (path,), _settings_of(path))
    names = [] if any((path / own).exists() for own in _OWN) else [p.name for p in path.iterdir() if p.is_file()]
    if not any(name.endswith(SUFFIXES) for name in names):
        return Located(str(path), path)
    weights = _weights(str(path), names)
    return Located(str(path), path / weights, _files(str(path), path, weights), path)


def _settings_of(path: Path) -> Path | None:
    """The folder of a file, if the settings in it are those of this file: the one that the folder itself stands for."""
    names = [file.name for file in path.parent.iterdir() if file.is_file()]
    if "config.json" not in names:
        return None
    try:
        return path.parent if _weights(str(path.parent), names) == path.name else None
    except UserError:  # several files
        return None


def run_of(path: Path) -> Path | None:
    """The run's folder that a folder of weights belongs to: a checkpoint is ``RUN/checkpoints/STEP/state``."""
    return next((folder for folder in (path, *list(path.parents)[:3]) if (folder / "config.json").is_file()), None)


def state_of(path: Path) -> tuple[Path, ConfigDict | None]:
    """The folder of the tensors of a run, checkpoint or folder of ``convert``, and the settings of the run.

    Raises:
      UserError: if there are none.
    """
    run = run_of(path)
    config = workdir_lib.read(run) if run else None
    return checkpoint.find_state(path, config.eval.best_metric if config else ""), config


def _wanted(name: str, names: Sequence[str], file: str = "") -> tuple[str, ...]:
    """The files to download from a repository: the weights first."""
    if file and file not in names:
        near = ", ".join(sorted(n for n in names if n.endswith(SUFFIXES))[:6]) or "no weights"
        raise UserError(f"{name}: the repository has no such file; it has {near}")
    weights = file or _weights(name, names)
    return (weights, *(n for n in SETTINGS if n in names))


def _weights(name: str, names: Sequence[str]) -> str:
    """The weights among the files of a folder."""
    preferred = next((n for n in _PREFERRED if n in names), None)
    if preferred:
        return preferred
    for suffixes in ((".safetensors",), (".bin", ".pth", ".pt"), (".ckpt", ".tar")):
        found = sorted(n for n in names if n.endswith(suffixes) and "/" not in n)
        if len(found) == 1:
            return found[0]
        if found:
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            raise UserError(f"{name}: holds several files of weights ({', '.join(found[:6])}{more}); name one of them")
    raise UserError(f"{name}: holds no weights: no file that ends in {', '.join(SUFFIXES)}")


def _files(name: str, folder: Path, weights: str) -> tuple[Path, ...]:
    """The files of tensors: the file itself, or the pieces that an index names."""
    if not weights.endswith(INDEX):
        return (folder / weights,)
    pieces = _pieces(folder / weights)
    for piece in pieces:
        if not (folder / piece).is_file():
            raise UserError(f"{name}: {piece} is missing, one of the {len(pieces)} files that {weights} names")
    return tuple(folder / piece for piece in pieces)


def _pieces(index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        pieces = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not pieces or not all(isinstance(p, str) and Path(p).name == p for p in pieces):
            raise ValueError("its weight_map names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read as an index of weights ({first_line(error)})") from error
    return pieces


def sha256(located: Located) -> str:
    """Digest of the files of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for file in located.files or sorted(p for p in state_of(located.path)[0].rglob("*") if p.is_file()):
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
