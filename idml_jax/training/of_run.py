"""The settings of the run in a folder, as a settings file: ``--config=idml_jax/training/of_run.py:WORKDIR``.

The commands take it where a workdir with a run is named and no ``--config``, so that single settings can be changed.
"""

from ml_collections import ConfigDict

from idml_jax.runtime.files import user_path
from idml_jax.training import workdir


def get_config(arg: str) -> ConfigDict:
    """``arg``: the folder of the run."""
    return workdir.read(user_path(arg))
