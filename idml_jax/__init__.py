"""Introspective deep metric learning in JAX: embeddings that know when they do not know.

The parts are pure functions::

    from idml_jax import ism, losses
    from idml_jax.metrics import retrieval

and a run takes a few lines::

    config = idml_jax.get_config("folder")              # the settings of configs/folder.py
    config.data.root = "photos"
    idml_jax.train_and_evaluate(config, "runs/mine")
    model = idml_jax.load("runs/mine")
    photos = model.embed(images)                        # a folder, paths, images of Pillow, numpy arrays
    answers = model.search("bird.jpg", photos, 5)

``__all__`` lists the public names: modules, and the main entry functions. They are imported on first use, so
``import idml_jax`` is fast and the pure modules never load the dependencies of training.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Embedding",
    "UserError",
    "audit",
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
    "fit",
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
    "risk",
    "search",
    "semantic_distance",
    "show_progress",
    "train",
    "train_and_evaluate",
    "trained",
]

if TYPE_CHECKING:
    from idml_jax import (
        audit,
        embed,
        evaluate,
        export,
        fit,
        ism,
        losses,
        metrics,
        mixing,
        models,
        report,
        risk,
        search,
    )
    from idml_jax.errors import UserError
    from idml_jax.inference import model as trained
    from idml_jax.inference import store as embeddings
    from idml_jax.inference.use import load
    from idml_jax.ism import Embedding, introspective_distance, introspective_similarity, semantic_distance
    from idml_jax.losses import memory, miners, pairs_from_labels
    from idml_jax.losses import softmax as classifier
    from idml_jax.models import create_classifier, create_model
    from idml_jax.runtime.progress import show_progress
    from idml_jax.training import config, recipes, train
    from idml_jax.training.config import default_config
    from idml_jax.training.recipes import get_config
    from idml_jax.training.train import evaluate_checkpoint, train_and_evaluate

# Origin of each public name: a module, or a module and the attribute in it.
_HOMES = {
    "Embedding": "ism:Embedding",
    "UserError": "errors:UserError",
    "audit": "audit",
    "classifier": "losses.softmax",
    "config": "training.config",
    "create_classifier": "models:create_classifier",
    "create_model": "models:create_model",
    "default_config": "training.config:default_config",
    "embed": "embed",
    "embeddings": "inference.store",
    "evaluate": "evaluate",
    "evaluate_checkpoint": "training.train:evaluate_checkpoint",
    "export": "export",
    "fit": "fit",
    "get_config": "training.recipes:get_config",
    "introspective_distance": "ism:introspective_distance",
    "introspective_similarity": "ism:introspective_similarity",
    "ism": "ism",
    "load": "inference.use:load",
    "losses": "losses",
    "memory": "losses.memory",
    "metrics": "metrics",
    "miners": "losses.miners",
    "mixing": "mixing",
    "models": "models",
    "pairs_from_labels": "losses:pairs_from_labels",
    "recipes": "training.recipes",
    "report": "report",
    "risk": "risk",
    "search": "search",
    "semantic_distance": "ism:semantic_distance",
    "show_progress": "runtime.progress:show_progress",
    "train": "training.train",
    "train_and_evaluate": "training.train:train_and_evaluate",
    "trained": "inference.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'idml_jax' has no attribute {name!r}")
    module, _, member = _HOMES[name].partition(":")
    value: Any = importlib.import_module(f"idml_jax.{module}")
    globals()[name] = value = getattr(value, member) if member else value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
