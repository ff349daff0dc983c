"""A trained run as one program that JAX loads without this package."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idml_jax.errors import UserError
from idml_jax.inference.model import Trained
from idml_jax.training.embedder import embed_step

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

    def embed_images(images: jax.Array) -> dict[str, jax.Array]:
        out = embed_step(variables, images, network=model.embedder.network)
        return out if model.introspective else {k: v for k, v in out.items() if k != "uncertainty"}

    shape = jax.export.symbolic_shape(f"b, {data.image_size}, {data.image_size}, {data.channels}")
    exported = jax.export.export(jax.jit(embed_images), platforms=platforms)(jax.ShapeDtypeStruct(shape, np.uint8))
    kept = data.transform == "cifar"  # its test pictures are taken as they are
    about = {
        "size": data.image_size,
        "resize": data.image_size if kept else data.resize,
        "channels": data.channels,
        "colours": "RGB" if data.channels == 3 else "grey",
        "values": "uint8, 0 to 255, not normalised",
        "outputs": {
            n: [str(side) for side in a.shape]
            for n, a in zip(
                sorted(jax.eval_shape(embed_images, jax.ShapeDtypeStruct((1, *shape[1:]), np.uint8))),
                exported.out_avals,
                strict=True,
            )
        },
        "platforms": list(platforms),
        **model.metric.about(),
        "workdir": str(model.workdir),
        "step": model.step,
        "jax": jax.__version__,
    }
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
