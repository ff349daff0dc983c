"""Computes all metrics of embeddings that are stored in a file.

The file may come from ``idml_jax.embed`` or from other software::

    python -m idml_jax.evaluate --embeddings=x.npz [--gallery=y.npz] [--held_out=z.npz --precision=0.9] [--out=m.json]

A file, ``.npz`` or ``.parquet``, holds ``semantic`` (or ``embeddings``) [n, d] and ``labels`` [n] (numbers or names),
and may hold ``uncertainty`` [n, k], ``semantic_norm`` [n] and ``ambiguity`` [n]. The temperature and the form of the
introspective metric are those that ``idml_jax.embed`` stored with the embeddings; ``--temperature`` and ``--absolute``
(or ``--no-absolute``) override them.

``--ranked`` adds P@K and the mean average precision over all ranks, ``--worst=10`` lists the classes with the lowest
R@1, and ``--exclude=camera`` leaves out, for each query, the images of its class with the same value of the array
``camera`` [n] of the file, and adds CMC@K. Of images from a table (docs/data.md) the marked queries search the marked
gallery, images that share a label are right answers, and images of the query's class and group are not found.
``--rerank=reciprocal`` (or ``expand``, ``augment+expand``) adds the metrics after re-ranking, as ``reranked/...``.
"""

import argparse
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idml_jax.errors import UserError, printable, run_command, warn
from idml_jax.inference.choices import EXAMPLES
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.files import check_result, user_path, without_nan, write_json
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import say_next, tell

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from idml_jax.inference.measure import measure
    from idml_jax.metrics.embedded import Embedded

__all__ = ["load_embeddings", "main", "measure", "show"]

__getattr__ = late(__name__, {"measure": "inference.measure"})
make_callable(__name__, "inference.measure:measure")  # idml_jax.evaluate("x.npz")


def load_embeddings(path: str | Path) -> "tuple[Embedded, Float[np.ndarray, 'n'] | None]":
    """Reads embeddings with labels; pickled content is refused.

    Args:
      path: file of embeddings; see the module's docstring for the names of its arrays.

    Returns:
      The embeddings, and the true ambiguity if the file holds one.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    from idml_jax.inference.gallery import read_stored

    index = read_stored(path, "--embeddings", labels=True)
    return index.embedded, index.ambiguity


def show(report: dict[str, float]) -> str:
    """Metrics as text, one line each; the deviation ``x_std`` of a metric ``x`` stands behind it."""
    behind = {f"{name}_std" for name in report} & set(report)
    spread = lambda name: f" ± {report[f'{name}_std']:.4f}" if f"{name}_std" in report else ""
    return "\n".join(f"{name:32s} {value:.4f}{spread(name)}" for name, value in report.items() if name not in behind)


def _ks(given: str) -> tuple[int, ...]:
    try:
        ks = tuple(int(k) for k in given.split(","))
    except ValueError as error:
        raise UserError(f"--ks={given}: whole numbers, e.g. 1,2,4,8") from error
    if min(ks) < 1:
        raise UserError(f"--ks={given}: each must be at least 1")
    return ks


def _evaluate_files(given: dict[str, Any]) -> None:
    start = time.monotonic()
    out = user_path(given["out"]) if given["out"] else None
    if out is not None:
        check_result(out, (given[name] for name in ("embeddings", "gallery", "held_out", "distractors")), (".json",))
    ks = _ks(given["ks"])
    with loading():
        from idml_jax.inference.measure import Options, measure
        from idml_jax.inference.reranking import parse

    names = "temperature", "absolute", "precision", "seed", "ranked", "exclude", "worst", "distractors"
    chosen = {name: given[name] for name in names} | {"rerank": parse(given["rerank"])}
    options = Options(ks, cluster=not given["no_clustering"], **chosen)
    found = measure(given["embeddings"], given["gallery"], given["held_out"], options, warn)
    if out is not None:
        write_json(out, without_nan(found.report))
    print(show(found.report))
    for row in found.worst:
        print(f"R@1 {row.recall:.4f} of {row.queries:,} queries of {printable(row.name)}")
    for warning in found.warnings:
        print(f"warning: {warning}")
    tell(f"{found.queries} queries in {time.monotonic() - start:.1f} s")
    say_next(f"python -m idml_jax.search --index={shlex.quote(given['gallery'] or given['embeddings'])} --query=IMAGE")


def main(argv: list[str] | None = None) -> None:
    """The command line for saved embeddings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--embeddings", required=True, help="file of query embeddings, also the gallery if none is given"
    )
    parser.add_argument("--gallery", default="", help="file of the embeddings to search")
    parser.add_argument("--held_out", default="", help="embeddings of held-out classes, to choose the answer threshold")
    parser.add_argument(
        "--distractors",
        default="",
        help="with --held_out: embeddings that these search, too, best of the training images",
    )
    parser.add_argument(
        "--precision", type=float, help="with --held_out: required share of correct answers; default 0.9"
    )
    parser.add_argument("--ks", default="1,2,4,8", help="K of R@K")
    parser.add_argument("--temperature", type=float, help="tau of the metric; default: the file's, or the paper's")
    parser.add_argument(
        "--absolute", action=argparse.BooleanOptionalAction, help="the absolute form of the metric; default: the file's"
    )
    parser.add_argument("--ranked", action="store_true", help="add P@K and mAP over all ranks")
    parser.add_argument(
        "--exclude", default="", help="array of the files, e.g. camera: do not find one's own class in it"
    )
    parser.add_argument("--worst", type=int, default=0, help="number of classes with the lowest R@1 to list")
    parser.add_argument("--rerank", default="", help=f"re-ranking, e.g. {EXAMPLES}")
    parser.add_argument("--no_clustering", action="store_true", help="skip NMI, AMI and F1")
    parser.add_argument("--seed", type=int, default=0, help="seed of clustering and bootstrap")
    parser.add_argument("--out", default="", help="JSON file to write the metrics to")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _evaluate_files(given))


if __name__ == "__main__":
    main()
