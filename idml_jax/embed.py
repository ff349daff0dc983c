"""Embeds images with a trained run.

    python -m idml_jax.embed --workdir=RUN --images=PHOTOS --out=photos.npz        # or photos.parquet
    python -m idml_jax.embed --workdir=RUN --split=test --out=test.npz             # the run's own images
    python -m idml_jax.embed --workdir=RUN --images=PHOTOS --out=photos --shard=1/4  # one of four processes

``--images`` is an image, a folder, or a table: a text file with one path per line, optionally followed by a tab and the
class, or a CSV, TSV, JSON lines or Parquet file with named columns (docs/data.md). If all images of a folder lie in
subfolders, the subfolders are the classes. Unreadable images are skipped and listed in ``<out>.skipped.txt``. A stopped
command resumes when it is run again. ``python -m idml_jax.evaluate --embeddings=photos.npz`` measures them, ``python -m
idml_jax.search`` searches them.

With ``--shard=i/n`` the output is a gallery, a folder of Parquet parts, for collections that outgrow memory or one
process; ``--append`` adds images to it.

In Python the module is a function: ``idml_jax.embed("runs/mine", images)``, see ``idml_jax.inference.use``.
"""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from idml_jax.errors import UserError, run_command
from idml_jax.inference.choices import SPLITS
from idml_jax.runtime import huge_pages
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.files import check_result, user_path
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import say_next, tell

if TYPE_CHECKING:
    from idml_jax.inference.embed import LISTS, embed_all, embed_to_file, index_of, list_images, split_source
    from idml_jax.inference.use import embed

__all__ = [
    "LISTS",
    "SPLITS",
    "embed",
    "embed_all",
    "embed_to_file",
    "index_of",
    "list_images",
    "main",
    "split_source",
]

_PARTS = ("LISTS", "embed_all", "embed_to_file", "index_of", "list_images", "split_source")
__getattr__ = late(__name__, {"embed": "inference.use", **dict.fromkeys(_PARTS, "inference.embed")})
make_callable(__name__, "inference.use:embed")  # idml_jax.embed("runs/mine", "photos")


def _embed(given: dict[str, Any]) -> None:
    if bool(given["images"]) == bool(given["split"]):
        raise UserError("give either --images or --split")
    if given["root"] and not given["images"]:
        raise UserError("--root needs --images, a table")
    out, say = user_path(given["out"]), tell
    cluster = given["engine"] == "ray"
    parts = bool(given["shard"] or given["append"] or cluster)
    if cluster and given["shard"]:
        raise UserError("--engine=ray divides the work by itself; leave out --shard")
    if not cluster and (given["workers"] != 1 or given["worker_gpus"]):
        raise UserError("--workers and --worker_gpus are for --engine=ray")
    if given["workers"] < 1 or given["worker_gpus"] < 0:
        raise UserError(f"--workers={given['workers']}: at least 1; --worker_gpus={given['worker_gpus']}: at least 0")
    with loading():
        from idml_jax.inference import store as embeddings
        from idml_jax.inference.embed import embed_to_file, list_images, split_source
        from idml_jax.inference.gallery_parts import embed_to_gallery, parse_shard
        from idml_jax.inference.use import load
        from idml_jax.training import data_record

    if parts:
        shard = parse_shard(given["shard"] or "1/1")
        if given["overwrite"]:
            raise UserError("--overwrite replaces a file; a gallery keeps its parts: delete the folder to start anew")
    else:
        embeddings.check_suffix(out, "--out")
        check_result(out, (given["images"],))
    for name in ("batch_size", "threads"):
        if given[name] < (name == "threads"):
            raise UserError(f"--{name}={given[name]} must be at least {int(name == 'threads')}")
    if cluster:
        from idml_jax.inference.ray_engine import Job, Workers, embed_on_cluster

        job = Job(**{name: given[name] for name in Job._fields if name != "out"}, out=str(out))
        embed_on_cluster(job, Workers(given["workers"], given["worker_gpus"]), say)
        return
    model = load(given["workdir"]).using(threads=given["threads"], batch_size=given["batch_size"])
    if given["split"]:
        source, labelled, origin = split_source(model, given["split"]), True, f"split:{given['split']}"
    else:
        source, labelled = list_images(given["images"], root=given["root"])
        origin = str(user_path(given["images"]))
    labelled = labelled and not given["no_labels"]
    classes = f" of {len(source.class_names):,} classes" if labelled else ", classes unknown"
    say(f"{len(source):,} images{classes}; checkpoint of step {model.step} of {model.workdir}")
    if given["split"] == "test" and (others := data_record.sizes_of(model.workdir).get("gallery")):
        say(f"these are the queries of the run; the {others:,} images that they search: --split=gallery")
    if parts:
        how = {"labelled": labelled, "origin": origin, "append": given["append"], "say": say}
        embed_to_gallery(model, source, out, shard=shard, **how)
    else:
        embed_to_file(model, source, out, labelled=labelled, origin=origin, overwrite=given["overwrite"], say=say)
    say_next(f"python -m idml_jax.search --index={shlex.quote(str(out))} --query=IMAGE")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--workdir", required=True, help="folder of a run")
    parser.add_argument("--images", default="", help="image, folder of images, or list or table of images")
    parser.add_argument("--root", default="", help="folder that a table's relative paths start from; default: its own")
    parser.add_argument(
        "--split", default="", choices=SPLITS, help="instead of --images: a split of the run's own data"
    )
    parser.add_argument(
        "--out", required=True, help="file to write, .npz or .parquet; with --shard or --append a folder"
    )
    parser.add_argument("--no_labels", action="store_true", help="do not take folder names as classes")
    parser.add_argument(
        "--batch_size", type=int, default=0, help="images per batch; default: the run's evaluation batch size"
    )
    parser.add_argument("--threads", type=int, default=4, help="number of reader and decoder threads")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument(
        "--shard", default="", help="i/n: write part i of n of a gallery, a folder that n processes fill together"
    )
    parser.add_argument(
        "--engine", default="", choices=("", "ray"), help="ray: workers of a Ray cluster write a gallery"
    )
    parser.add_argument("--workers", type=int, default=1, help="with --engine=ray: number of workers")
    parser.add_argument("--worker_gpus", type=float, default=0.0, help="with --engine=ray: accelerators of each worker")
    parser.add_argument("--append", action="store_true", help="add to a gallery the images that it lacks")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _embed(given), "stopped; rerun the same command to resume")


if __name__ == "__main__":
    huge_pages.start_again()
    main()
