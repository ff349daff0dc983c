"""The settings that come with the package, by name: the files in ``configs/``, from a checkout or a wheel.

    config = recipes.get_config("glyphs:quick")          # configs/glyphs.py:quick on the command line
    recipes.names()                                      # ['cars196', 'cifar10', ...]

``python -m idml_jax.main --config=configs/glyphs.py:quick`` finds them from any folder, and so does
``--config=glyphs:quick``.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from idml_jax.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
# In a wheel they are inside the package, in a checkout next to it.
FOLDER = next((f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()), _PACKAGE / "configs")


def names() -> list[str]:
    """Names of the settings that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def find(value: str) -> str:
    """Completes a value of ``--config`` with the full path of its file.

    Args:
      value: ``path.py``, ``path.py:variant``, or the name of settings that come with the package, with or without
        the prefix ``configs/`` and the suffix ``.py``.

    Returns:
      The value with the full path of the package's file if the user has no such file; otherwise the value unchanged.
    """
    path, colon, variant = value.partition(":")
    if not path or Path(path).is_file():
        return value
    given = Path(path)
    if given.parent.name not in ("", "configs") or given.suffix not in ("", ".py"):
        return value
    own = FOLDER / f"{given.stem}.py"
    return f"{own}{colon}{variant}" if own.is_file() else value


def get_config(name: str) -> ConfigDict:
    """Loads settings by name, to change and pass to ``train.train_and_evaluate``.

    Args:
      name: as for ``find``, such as ``glyphs:quick``, ``folder`` or ``mine/settings.py``.

    Returns:
      The settings.

    Raises:
      UserError: for an unknown name or variant.
    """
    path, _, variant = find(name).partition(":")
    if not Path(path).is_file():
        raise UserError(f"{name}: no such settings; known: {', '.join(names())}, or the path of a file")
    spec = importlib.util.spec_from_file_location(f"idml_jax_settings_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{name}: the name of a settings file must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: has no function get_config(), which gives the settings")
    try:
        config = module.get_config(variant) if variant else module.get_config()
    except ValueError as error:
        raise UserError(str(error)) from error
    return config
