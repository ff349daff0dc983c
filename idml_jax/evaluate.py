"""Evaluation: embed every image once, tail included, then all figures of the whole set.

Embeddings saved by anyone are evaluated from the shell::

    python -m idml_jax.evaluate --embeddings=x.npz [--gallery=y.npz] [--held_out=z.npz --precision=0.9] [--out=m.json]

A file holds ``semantic`` (or ``embeddings``) [n, d] and ``labels`` [n], and may hold ``uncertainty`` [n, k],
``semantic_norm`` [n] and ``ambiguity`` [n].
"""

import argparse
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float

from idml_jax.errors import UserError, stop
from idml_jax.ism import Metric
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.summary import full_report
from idml_jax.runtime.files import without_nan, write_json

__all__ = ["load_embeddings", "main", "show"]


def load_embeddings(path: str | Path) -> tuple[Embedded, Float[np.ndarray, "n"] | None]:
    """Reads embeddings from an ``.npz`` file; pickled content is refused.

    Args:
      path: of the file, see the module's docstring for its names.

    Returns:
      The embeddings, and the true ambiguity if the file holds one.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:
        raise UserError(f"{path}: not an .npz file of plain arrays ({str(error).splitlines()[0]})") from error
    semantic = arrays.get("semantic", arrays.get("embeddings"))
    if semantic is None or "labels" not in arrays:
        names = ", ".join(sorted(arrays)) or "nothing"
        raise UserError(f"{path}: needs the arrays semantic (or embeddings) [n, d] and labels [n]; it holds {names}")
    for name in ("semantic", "embeddings", "uncertainty", "semantic_norm", "ambiguity"):  # others may hold anything
        if name in arrays and arrays[name].dtype.kind not in "fiub":
            raise UserError(f"{path}: {name} holds {arrays[name].dtype}, not numbers")
    for name in ("labels", "uncertainty", "semantic_norm", "ambiguity"):
        if name in arrays and (semantic.ndim != 2 or arrays[name].shape[:1] != semantic.shape[:1]):
            raise UserError(f"{path}: {name} has the shape {arrays[name].shape}, the embeddings {semantic.shape}")
    embedded = Embedded(semantic, arrays["labels"], arrays.get("uncertainty"), arrays.get("semantic_norm"))
    return embedded, arrays.get("ambiguity")


def show(report: dict[str, float]) -> str:
    """A line per figure."""
    return "\n".join(f"{name:32s} {value:.4f}" for name, value in report.items())


def _evaluate_files(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    embedded, truth = load_embeddings(arguments.embeddings)
    gallery = load_embeddings(arguments.gallery)[0] if arguments.gallery else None
    held_out = load_embeddings(arguments.held_out)[0] if arguments.held_out else None
    try:
        ks = tuple(int(k) for k in arguments.ks.split(","))
    except ValueError as error:
        raise UserError(f"--ks={arguments.ks}: whole numbers, e.g. 1,2,4,8") from error
    report, warnings = full_report(
        embedded,
        gallery,
        ks=ks,
        metric=Metric("absolute" if arguments.absolute else "relative", arguments.temperature),
        ambiguity=truth,
        held_out=held_out,
        precision=arguments.precision,
        cluster=not arguments.no_clustering,
        seed=arguments.seed,
    )
    if arguments.out:
        write_json(Path(arguments.out), without_nan(report))
    print(show(report))
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{len(embedded.labels)} queries in {time.monotonic() - start:.1f} s")


def main(argv: list[str] | None = None) -> None:
    """The command line for saved embeddings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, help="queries, and gallery too if none is given")
    parser.add_argument("--gallery", help="what is searched")
    parser.add_argument("--held_out", help="embeddings of held-out classes, which choose the threshold of answers")
    parser.add_argument("--precision", type=float, default=0.9, help="wanted share of right answers")
    parser.add_argument("--ks", default="1,2,4,8")
    parser.add_argument("--temperature", type=float, default=Metric().temperature)
    parser.add_argument("--absolute", action="store_true", help="the absolute reading of the uncertainty")
    parser.add_argument("--no_clustering", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file for the figures")
    try:
        _evaluate_files(parser.parse_args(argv))
    except (UserError, ValueError, OSError) as error:
        stop(error)


if __name__ == "__main__":
    main()
