"""Weights to start from: names on the Hugging Face hub, files of torchvision, timm and transformers, and own runs.

``config.model.init_from`` names them; ``config.model.init_parts`` says which parts to use. From the command line::

    python -m idml_jax.pretrained show timm/resnet50.a1_in1k                        # what it is, what fits
    python -m idml_jax.pretrained fetch facebook/dinov2-small --out=dinov2.safetensors
    python -m idml_jax.pretrained convert resnet50.safetensors runs/imagenet        # to this package's format
    python -m idml_jax.pretrained convert runs/cub model.safetensors                # a trained run, for PyTorch

Reading is strict: the part of the file that fits the network must hold every tensor with its shape, and no others.
Classifiers, projection heads and heads that are not requested are left out and named.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from idml_jax.errors import printable, run_command
from idml_jax.runtime.callable_module import imported, late
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.options import Help, LateText

if TYPE_CHECKING:
    from idml_jax.training.weights import convert, fetch, load, merge, read, show

__all__ = ["convert", "fetch", "load", "main", "merge", "read", "show"]

__getattr__ = late(__name__, dict.fromkeys(("convert", "fetch", "load", "merge", "read", "show"), "training.weights"))

_SOURCE = "owner/name on the hub, .safetensors, .pth, a folder written by this command, or a run's folder"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    known = lambda: imported("models:known_models")()
    called = sys.argv[0] if sys.argv[0].startswith("idml-jax") else "python -m idml_jax.pretrained"
    parser = argparse.ArgumentParser(prog=called, description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert", formatter_class=Help, help="write weights in another format")
    command.add_argument("source", help=_SOURCE)
    command.add_argument("out", help=".safetensors file (PyTorch's naming) or folder (this package's format)")
    command.add_argument(
        "--model", default="", help=LateText("default: the weights' own, or resnet50; known: {}", known)
    )
    command.add_argument("--size", type=int, default=224, help="image size in pixels, for a vision transformer")
    command.add_argument("--prefix", default="", help="prefix of every PyTorch name, e.g. model.")
    command = commands.add_parser(
        "fetch", formatter_class=Help, help="write the trunk of weights to one file that says what it is"
    )
    command.add_argument("source", help=_SOURCE)
    command.add_argument("--out", required=True, help=".safetensors file to write")
    command = commands.add_parser(
        "show", formatter_class=Help, help="list the tensors of weights and say which networks they fit"
    )
    command.add_argument("source", help=_SOURCE)
    given = vars(parser.parse_args(arguments))
    run_command(lambda: _run(given))


def _run(given: dict[str, Any]) -> None:
    with loading():
        from idml_jax.training.weights import convert, fetch, show

    if given["command"] == "fetch":
        print(printable(fetch(given["source"], given["out"])))
    elif given["command"] == "show":
        print("\n".join(map(printable, show(given["source"]).split("\n"))))
    else:
        print(convert(given["source"], given["out"], **{name: given[name] for name in ("model", "size", "prefix")}))


if __name__ == "__main__":
    main()
