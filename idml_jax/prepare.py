"""Converts a downloaded data set into a tfds set of array_record files, which allow random access in training.

    python -m idml_jax.prepare --dataset=cub --source=~/Downloads/CUB_200_2011.tgz
    python -m idml_jax.prepare --dataset=folder --source=PATH --name=mine

The source is an archive, a folder of archives, or their unpacked content; archives are read as streams, never unpacked.
To resume a stopped run, repeat the command. Image and class counts are compared with the benchmark's: an incomplete set
is refused, naming what is missing, unless --allow_incomplete is given. TensorFlow is not needed.
"""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from idml_jax.data.stored.names import NAMES
from idml_jax.errors import UserError, run_command
from idml_jax.runtime.callable_module import late
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import say_next, tell

if TYPE_CHECKING:
    from idml_jax.data.stored.prepare import LAYOUTS, prepare

__all__ = ["LAYOUTS", "main", "prepare"]

# Settings of the package that have another name than their data set.
_CONFIGS = {"cub": "cub200", "cars": "cars196"}
_WEIGHTS = "efficientnet_lite0"  # of the extra "weights", as README recommends for own images


__getattr__ = late(__name__, dict.fromkeys(("LAYOUTS", "prepare"), "data.stored.prepare"))


def _prepare(given: dict[str, Any]) -> None:
    with loading():
        from idml_jax.data.stored.prepare import prepare

    folder = prepare(**given, say=tell)
    say_next(_training(given["dataset"], folder.parent.name, given["data_dir"]))


def _training(dataset: str, name: str, data_dir: str) -> str:
    """The command that trains on a prepared set; ``name`` is that of an image folder."""
    from idml_jax.training.packaged_weights import packaged

    config, more, run = _CONFIGS.get(dataset, dataset), "", dataset
    if dataset == "folder":
        run, more = name, f" --config.data.variant={name}"
        try:
            packaged(_WEIGHTS)
            more += f" --config.model.init_from={_WEIGHTS}"
        except UserError:  # not installed
            config = "folder:scratch"
    home = f" --config.data.data_dir={shlex.quote(data_dir)}" if data_dir else ""
    return f"python -m idml_jax.main --config={config}{more}{home} --workdir=runs/{run}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--dataset", required=True, choices=NAMES, metavar="|".join(NAMES))
    parser.add_argument("--source", required=True, help="archive, folder of archives, or folder of unpacked files")
    parser.add_argument(
        "--data_dir", default="", help="folder of data sets; default: $TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    parser.add_argument("--name", default="", help="name for a prepared image folder, for --config.data.variant=")
    parser.add_argument(
        "--allow_incomplete", action="store_true", help="store the set even if its counts are not the benchmark's"
    )
    parser.add_argument(
        "--on_corrupt",
        default="refuse",
        choices=["refuse", "skip"],
        help="refuse or skip files that are not complete images",
    )
    parser.add_argument("--shard_megabytes", type=int, default=256, help="size of each record file in MB")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _prepare(given), "stopped; rerun the same command to resume")


if __name__ == "__main__":
    main()
