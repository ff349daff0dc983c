"""Turns a data set as it was downloaded into a tfds set of array_record files, which training reads at random.

    python -m idml_jax.prepare --dataset=cub --source=~/Downloads/CUB_200_2011.tgz
    python -m idml_jax.prepare --dataset=folder --source=PATH --name=mine

The source is an archive, a folder with archives, or what came out of them; archives are read as streams, never
unpacked. A stopped run goes on with the same command. Counts are held against the benchmark's: an incomplete set is
refused, with what is missing, unless --allow_incomplete is given. No TensorFlow is needed.
"""

import argparse

from idml_jax.data.stored.prepare import LAYOUTS, prepare
from idml_jax.errors import run_command

__all__ = ["LAYOUTS", "main", "prepare"]


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=list(LAYOUTS), metavar="|".join(LAYOUTS))
    parser.add_argument("--source", required=True, help="archive, or folder of archives or of unpacked files")
    parser.add_argument("--data_dir", default="", help="of sets; default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--name", default="", help="of an image folder's set, for --config.data.variant=")
    parser.add_argument("--allow_incomplete", action="store_true", help="store a set with other counts too")
    parser.add_argument(
        "--on_corrupt",
        default="refuse",
        choices=["refuse", "skip"],
        help="refuse or skip files that are no whole images",
    )
    parser.add_argument("--shard_megabytes", type=int, default=256, help="size of the files of records")
    given = vars(parser.parse_args(argv))
    run_command(lambda: prepare(**given, say=lambda line: print(line, flush=True)), "stopped; the same command goes on")


if __name__ == "__main__":
    main()
