"""Weights to start from: names on the Hugging Face hub, files of torchvision, timm and transformers, and own runs.

``config.model.init_from`` names them; ``config.model.init_parts`` says which parts to use. The steps, a module each:
``locate`` finds the files (``hub`` downloads them), ``files`` reads their tensors, ``about`` reads the settings they
were made with, ``wrapped`` finds the network among the tensors, ``identify`` says which trunk they are of, ``loading``
puts them into a model, and ``convert`` writes them in another format.

Reading is strict: the sub-tree of the file that fits the network must hold every tensor with its shape, and no others.
What is left out beside it (classifiers, projection heads, heads that are not requested) is counted and named.
"""

from idml_jax.training.weights.about import Native
from idml_jax.training.weights.convert import convert, fetch, show
from idml_jax.training.weights.loading import PARTS, load, merge
from idml_jax.training.weights.locate import Located, locate, sha256
from idml_jax.training.weights.reading import read, read_located
from idml_jax.training.weights.tensors import Tensors

__all__ = [
    "PARTS", "Located", "Native", "Tensors", "convert", "fetch", "load", "locate", "merge", "read", "read_located",
    "sha256", "show",
]  # fmt: skip
