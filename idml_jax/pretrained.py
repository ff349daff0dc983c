"""Weights to start from: torchvision and timm files, published metric-learning checkpoints, and this package's own.

``config.model.init_from`` names the file; ``config.model.init_parts`` says which parts to use. From the command line::

    python -m idml_jax.pretrained convert resnet50.safetensors runs/imagenet        # to this package's format
    python -m idml_jax.pretrained convert runs/cub model.safetensors                # a trained run, for PyTorch

Reading is strict: the file must hold every tensor of the network with its shape, and no others. Only classifiers,
BatchNorm's batch counters and heads that are not requested are left out silently.
"""

import argparse
from collections.abc import Sequence

from idml_jax.errors import run_command
from idml_jax.models import MODELS
from idml_jax.training.weights import convert, load, merge, read

__all__ = ["convert", "load", "main", "merge", "read"]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m idml_jax.pretrained", description="Converts weights between formats."
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "convert", help="write weights in another format"
    )
    command.add_argument("source", help=".safetensors, .pth, a folder written by this command, or a run's folder")
    command.add_argument("out", help=".safetensors file (PyTorch's naming) or folder (this package's format)")
    command.add_argument("--model", default="resnet50", help=f"one of: {', '.join(sorted(MODELS))}")
    command.add_argument("--size", type=int, default=224, help="image size in pixels, for a vision transformer")
    command.add_argument("--prefix", default="", help="prefix of every PyTorch name, e.g. model.")
    given = parser.parse_args(arguments)
    options = {"model": given.model, "size": given.size, "prefix": given.prefix}
    run_command(lambda: print(convert(given.source, given.out, **options)))


if __name__ == "__main__":
    main()
