"""Writes a trained run as one program that JAX loads without this package, or embeddings as an index of faiss.

    python -m idml_jax.export --workdir=RUN --out=model/

The folder holds ``model.stablehlo`` (weights included, for any batch size, by ``jax.export``), ``about.json`` (what
goes in and comes out) and ``example.py``, which loads it. Into the program go pictures cut to size, as uint8; it
normalises them itself. JAX promises to load such programs with its versions of at least the six months that follow.

    python -m idml_jax.export --index=photos.npz --faiss=photos.faiss [--faiss_kind=HNSW32]

writes embeddings of ``idml_jax.embed`` as an index of faiss (squared distances of the semantic embeddings; its row i is
row i of the file).
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idml_jax import embeddings, faiss_index, trained
from idml_jax.errors import UserError, run_command
from idml_jax.trained import Trained

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")

EXAMPLE = '''"""Embeds pictures: python example.py a.jpg b.jpg. Needs jax, numpy, flatbuffers and pillow."""

import json
import sys

import numpy as np
from jax import export
from PIL import Image

about = json.load(open("about.json"))
model = export.deserialize(open("model.stablehlo", "rb").read())


def load(path):
    image = Image.open(path).convert("RGB" if about["channels"] == 3 else "L")
    size, scale = about["size"], about["resize"] / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, -1)


found = model.call(np.stack([load(path) for path in sys.argv[1:]]))
print({name: value.shape for name, value in found.items()}, found["semantic"] @ found["semantic"].T)
'''


def export_run(model: Trained, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")) -> tuple[bytes, dict[str, Any]]:
    """A run as a serialised program.

    Args:
      model: trained embedding.
      platforms: that it shall run on.

    Returns:
      The program from ``[b, size, size, channels]`` uint8 to ``semantic`` [b, d], ``semantic_norm`` [b] and, of an
      introspective run, ``uncertainty`` [b, k], and a JSON-able description.
    """
    data = model.config.data
    variables = jax.tree.map(np.asarray, model.variables)
    embed = trained.embed_function(model)

    def embed_images(images: jax.Array) -> dict[str, jax.Array]:
        out = embed(variables, images)
        return out if model.introspective else {k: v for k, v in out.items() if k != "uncertainty"}

    shape = jax.export.symbolic_shape(f"b, {data.image_size}, {data.image_size}, {data.channels}")
    exported = jax.export.export(jax.jit(embed_images), platforms=platforms)(jax.ShapeDtypeStruct(shape, np.uint8))
    kept = data.transform == "cifar"  # its test pictures are taken as they are
    about = {
        "size": data.image_size, "resize": data.image_size if kept else data.resize, "channels": data.channels,
        "colours": "RGB" if data.channels == 3 else "grey", "values": "uint8, 0 to 255, not normalised",
        "outputs": {n: [str(side) for side in a.shape] for n, a in zip(
            sorted(jax.eval_shape(embed_images, jax.ShapeDtypeStruct((1, *shape[1:]), np.uint8))), exported.out_avals,
            strict=True)},
        "platforms": list(platforms), "temperature": model.settings.temperature, "relative": model.settings.relative,
        "workdir": str(model.workdir), "step": model.step, "jax": jax.__version__,
    }  # fmt: skip
    return bytes(exported.serialize()), about


def write(model: Trained, out: str | Path, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")) -> Path:
    """Writes the folder, whole or not at all.

    Raises:
      UserError: if it is there already.
    """
    out = Path(out).expanduser().absolute()
    if out.exists():
        raise UserError(f"{out} is already there")
    program, about = export_run(model, platforms)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "model.stablehlo").write_bytes(program)
    (temporary / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    (temporary / "example.py").write_text(EXAMPLE)
    temporary.replace(out)
    return out


def _export(given: dict[str, Any]) -> None:
    if bool(given["workdir"]) == bool(given["index"]) or bool(given["workdir"]) != bool(given["out"]):
        raise UserError("give either --workdir and --out, for a program, or --index and --faiss, for an index")
    if given["index"]:
        if not given["faiss"]:
            raise UserError("--faiss is missing: the file of the index, e.g. photos.faiss")
        index = embeddings.read(given["index"])
        path = faiss_index.write(index.embedded.semantic, given["faiss"], given["faiss_kind"])
        print(f"{len(index.files):,} rows of {index.embedded.semantic.shape[1]} dimensions in {path}")
        return
    platforms = tuple(name.strip() for name in given["platforms"].split(","))
    if unknown := [name for name in platforms if name not in PLATFORMS]:
        raise UserError(f"--platforms={given['platforms']}: {unknown[0]!r} is unknown; known: {', '.join(PLATFORMS)}")
    out = write(trained.load(given["workdir"]), given["out"], platforms)
    size = (out / "model.stablehlo").stat().st_size / 1e6
    print(f"{out / 'model.stablehlo'} ({size:.1f} MB) for {', '.join(platforms)}; {out / 'example.py'} loads it")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="folder of a run")
    parser.add_argument("--out", default="", help="new folder")
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help=f"of {', '.join(PLATFORMS)}")
    parser.add_argument("--index", default="", help="instead of a run: .npz or .parquet of idml_jax.embed")
    parser.add_argument("--faiss", default="", help="file of the index for faiss")
    parser.add_argument("--faiss_kind", default="Flat", help="for faiss's index_factory; Flat: exact")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _export(given))


if __name__ == "__main__":
    main()
