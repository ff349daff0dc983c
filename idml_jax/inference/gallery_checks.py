"""What a gallery accepts: a folder that is one or becomes one, and images to be searched together with its own."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idml_jax.errors import UserError
from idml_jax.inference.gallery import Made, source_path
from idml_jax.inference.index import SUFFIXES
from idml_jax.inference.told import OF_TABLES
from idml_jax.runtime.files import user_path


class Asked(NamedTuple):
    """What a command wants to have in the gallery.

    Attributes:
      names: names of the images.
      class_names: names of their classes by label; ``None`` if unknown.
      about: their origin.
      digest: of all that is asked.
      told: what a table says about them.
    """

    names: list[str]
    class_names: list[str] | None
    about: dict[str, Any]
    digest: str
    told: dict[str, np.ndarray]


def check_alike(folder: Path, made: Made, asked: Asked) -> None:
    """Refuses images that cannot be searched together with those of a gallery."""
    for name in ("weights", "temperature", "relative", "form", "risk"):
        if asked.about.get(name) != made.about.get(name):
            raise UserError(
                f"{folder}: was made with {name} = {made.about.get(name)}, and this run has {asked.about.get(name)}; "
                "their vectors cannot be compared; give another --out"
            )
    if (made.class_names is None) != (asked.class_names is None):
        has, these = ("no classes", "have some (--no_labels)") if made.class_names is None else ("classes", "have none")
        raise UserError(f"{folder}: its images have {has}, and these {these}")


def check_told(folder: Path, columns: dict[str, int], told: dict[str, np.ndarray]) -> None:
    """Refuses images about which a table says other things than about those of a gallery."""
    for name in OF_TABLES:
        has, new = columns.get(name), told[name].shape[1:] if name in told else None
        cure = "give another --out, or a table with the same columns"
        if (has is None) != (new is None):
            one, two = ("no", "some") if has is None else ("a", "none")
            raise UserError(f"{folder}: its images have {one} {name} from a table, and these {two}; {cure}")
        if has and new and has != new[0]:  # of label_sets
            raise UserError(f"{folder}: its images have up to {has} labels ({name}), and these {new[0]}; {cure}")


def checked_folder(out: str | Path, append: bool) -> Path:
    """The folder of a gallery, made if it is missing; refuses files and folders of something else."""
    folder = user_path(out)
    if folder.suffix in SUFFIXES:
        raise UserError(f"--out={folder}: parts are written into a folder; give a name without {folder.suffix}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder (--out)")
    known = folder.exists() and source_path(folder, 0).exists()
    if folder.exists() and not known and any(not path.name.startswith(".idml_jax-") for path in folder.iterdir()):
        raise UserError(f"{folder}: is not a gallery and not empty; give a new folder (--out)")
    if append and not known:
        raise UserError(f"{folder}: is no gallery, so nothing can be added to it; leave out --append to start one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder
