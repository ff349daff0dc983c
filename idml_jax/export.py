"""Exports a trained run as a program that JAX loads without this package, or embeddings as a faiss index.

    python -m idml_jax.export --workdir=RUN --out=model/

The folder holds ``model.stablehlo`` (by ``jax.export``, weights included, for any batch size), ``about.json`` (inputs
and outputs) and ``example.py``, which loads the program. The program takes uint8 images of the run's size and
normalises them itself. JAX guarantees that such a program loads with all its versions of at least the next six months.

    python -m idml_jax.export --workdir=RUN --out=model/ --format=onnx

writes ``model.onnx`` instead, which onnxruntime runs without JAX, and an example for it. It needs ``idml_jax[onnx]``.

    python -m idml_jax.export --index=photos.npz --faiss=photos.faiss [--faiss_kind=HNSW32]

writes embeddings of ``idml_jax.embed`` as a faiss index over squared distances of the semantic embeddings. Row i of the
index is row i of the file.
"""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from idml_jax.errors import UserError, printable, run_command
from idml_jax.inference.choices import FORMATS, PLATFORMS
from idml_jax.runtime.callable_module import late, make_callable
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.options import Help
from idml_jax.runtime.progress import say_next

if TYPE_CHECKING:
    from idml_jax.inference.export import export_run, write

__all__ = ["PLATFORMS", "export_run", "main", "write"]

__getattr__ = late(__name__, dict.fromkeys(("export_run", "write"), "inference.export"))
make_callable(__name__, "inference.export:write")  # idml_jax.export(idml_jax.load("runs/mine"), "model")


def _export(given: dict[str, Any]) -> None:
    if bool(given["workdir"]) == bool(given["index"]) or bool(given["workdir"]) != bool(given["out"]):
        raise UserError("give either --workdir and --out, for a program, or --index and --faiss, for an index")
    if given["index"]:
        if not given["faiss"]:
            raise UserError("--faiss is missing: the file of the index, e.g. photos.faiss")
        from idml_jax.inference import faiss_index
        from idml_jax.inference import store as embeddings

        index = embeddings.read(given["index"])
        path = faiss_index.write(index.embedded.semantic, given["faiss"], given["faiss_kind"], (given["index"],))
        print(f"{len(index.files):,} rows of {index.embedded.semantic.shape[1]} dimensions in {path}")
        return
    if given["format"] != "stablehlo" and given["platforms"] is not None:
        raise UserError(f"--platforms={given['platforms']} is for --format=stablehlo; an ONNX model runs on any")
    platforms = tuple(name.strip() for name in (given["platforms"] or "cpu,cuda,tpu").split(","))
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise UserError(f"--platforms={given['platforms']}: {unknown[0]!r} is unknown; known: {', '.join(PLATFORMS)}")
    with loading():
        from idml_jax.inference import model as trained
        from idml_jax.inference.export import write

    out = write(trained.load(given["workdir"]), given["out"], platforms, given["format"])
    program = out / f"model.{given['format']}"
    size, runs = program.stat().st_size / 1e6, ", ".join(platforms) if given["format"] == "stablehlo" else "onnxruntime"
    print(f"{printable(program)} ({size:.1f} MB) for {runs}")
    say_next(f"python {shlex.quote(str(out / 'example.py'))} IMAGE IMAGE")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--workdir", default="", help="folder of a run")
    parser.add_argument("--out", default="", help="new folder")
    parser.add_argument(
        "--platforms", help=f"comma-separated platforms, of {', '.join(PLATFORMS)}; default: cpu,cuda,tpu"
    )
    parser.add_argument("--format", default="stablehlo", choices=FORMATS, help="stablehlo, for JAX, or onnx")
    parser.add_argument("--index", default="", help="instead of --workdir: .npz or .parquet of idml_jax.embed")
    parser.add_argument("--faiss", default="", help="faiss index file to write")
    parser.add_argument("--faiss_kind", default="Flat", help="argument of faiss's index_factory; Flat: exact search")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _export(given))


if __name__ == "__main__":
    main()
