"""Introspective deep metric learning in JAX: embeddings that know when they do not know.

The parts are pure functions::

    from idml_jax import ism, losses
    from idml_jax.metrics import retrieval

and a run takes a few lines::

    config = idml_jax.get_config("folder")              # the settings of configs/folder.py
    config.data.root = "photos"
    idml_jax.train_and_evaluate(config, "runs/mine")
    model = idml_jax.load("runs/mine")

What ``__all__`` lists is public: modules, and the functions one starts from. They are imported when they are first
used, so that ``import idml_jax`` takes no time and the pure parts never load what training needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Embedding",
    "UserError",
    "classifier",
    "config",
    "create_classifier",
    "create_model",
    "default_config",
    "embed",
    "embeddings",
    "evaluate",
    "evaluate_checkpoint",
    "export",
    "get_config",
    "introspective_distance",
    "introspective_similarity",
    "ism",
    "load",
    "losses",
    "memory",
    "metrics",
    "miners",
    "mixing",
    "models",
    "pairs_from_labels",
    "recipes",
    "report",
    "search",
    "semantic_distance",
    "show_progress",
    "train",
    "train_and_evaluate",
    "trained",
]

if TYPE_CHECKING:
    from idml_jax import (
        classifier,
        config,
        embed,
        embeddings,
        evaluate,
        export,
        ism,
        losses,
        memory,
        metrics,
        miners,
        mixing,
        models,
        recipes,
        report,
        search,
        train,
        trained,
    )
    from idml_jax.config import default_config
    from idml_jax.errors import UserError, show_progress
    from idml_jax.ism import Embedding, introspective_distance, introspective_similarity, semantic_distance
    from idml_jax.losses import pairs_from_labels
    from idml_jax.models import create_classifier, create_model
    from idml_jax.recipes import get_config
    from idml_jax.train import evaluate_checkpoint, train_and_evaluate
    from idml_jax.trained import load

# Where the names that are no modules come from.
_HOMES = {
    "Embedding": "ism", "UserError": "errors", "create_classifier": "models", "create_model": "models",
    "default_config": "config", "evaluate_checkpoint": "train", "get_config": "recipes",
    "introspective_distance": "ism", "introspective_similarity": "ism", "load": "trained",
    "pairs_from_labels": "losses", "semantic_distance": "ism", "show_progress": "errors", "train_and_evaluate": "train",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"idml_jax.{_HOMES[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"idml_jax.{name}")
    else:
        raise AttributeError(f"module 'idml_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
