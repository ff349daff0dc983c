"""Exports a trained run as a program that JAX, or a program for ONNX models, loads without this package."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idml_jax.errors import UserError
from idml_jax.inference.choices import FORMATS
from idml_jax.inference.model import Trained
from idml_jax.inference.onnx_model import export_onnx
from idml_jax.runtime.files import replace_folder, user_path
from idml_jax.training.digests import weights_digest
from idml_jax.training.embedder import embed_step

_START = '''"""Embeds images: python example.py a.jpg b.jpg. Needs {needs}."""
import json
import pathlib
import sys

import numpy as np
{imports}
from PIL import Image, ImageOps

folder = pathlib.Path(sys.argv[0]).resolve().parent
about = json.loads((folder / "about.json").read_text())
{model}

'''
_LOAD = """def load(path):
    try:
        image, size = ImageOps.exif_transpose(Image.open(path)), about["size"]
        image.load()
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).partition(" '")[0]
        sys.exit(f"error: {path}: cannot be read as an image ({reason})")
    if image.mode[0] == "I":  # 16 bits
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    image = image.convert("RGB" if about["channels"] == 3 else "L")
    image = image.resize([about["resize"] * side // min(image.size) for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, -1)

paths = sys.argv[1:] or sys.exit("error: no images are named; give some: python example.py a.jpg b.jpg")
"""
_PRINT = """print({name: value.shape for name, value in found.items()}, found["semantic"] @ found["semantic"].T)
"""
EXAMPLE = (
    _START.format(
        needs="jax, numpy, flatbuffers and pillow",
        imports="from jax import export",
        model='model = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))',
    )
    + _LOAD
    + "found = model.call(np.stack([load(path) for path in paths]))\n"
    + _PRINT
)
ONNX_EXAMPLE = (
    _START.format(
        needs="onnxruntime, numpy and pillow",
        imports="import onnxruntime",
        model='model = onnxruntime.InferenceSession(str(folder / "model.onnx"))',
    )
    + _LOAD
    + """names = [output.name for output in model.get_outputs()]
images = np.stack([load(path) for path in paths])
found = dict(zip(names, model.run(names, {"images": images})))
"""
    + _PRINT
)


def export_run(model: Trained, platforms: tuple[str, ...] = ("cpu", "cuda", "tpu")) -> tuple[bytes, dict[str, Any]]:
    """Serialises the embedding function of a run.

    Args:
      model: trained embedding.
      platforms: platforms to compile for.

    Returns:
      The program, from ``[b, size, size, channels]`` uint8 to ``semantic`` [b, d], ``semantic_norm`` [b] and, for an
      introspective run, ``uncertainty`` [b, k]; and a JSON-serialisable description.
    """
    data = model.config.data
    variables = jax.tree.map(np.asarray, model.variables)

    def embed_images(images: jax.Array) -> dict[str, jax.Array]:
        out = embed_step(variables, images, network=model.embedder.network)
        return out if model.introspective else {k: v for k, v in out.items() if k != "uncertainty"}

    shape = jax.export.symbolic_shape(f"b, {data.image_size}, {data.image_size}, {data.channels}")
    exported = jax.export.export(jax.jit(embed_images), platforms=platforms)(jax.ShapeDtypeStruct(shape, np.uint8))
    outputs = {
        n: [str(side) for side in a.shape]
        for n, a in zip(
            sorted(jax.eval_shape(embed_images, jax.ShapeDtypeStruct((1, *shape[1:]), np.uint8))),
            exported.out_avals,
            strict=True,
        )
    }
    return bytes(exported.serialize()), _about(model, outputs, {"platforms": list(platforms)})


def _about(model: Trained, outputs: dict[str, list[str]], more: dict[str, Any]) -> dict[str, Any]:
    """The description of an exported program."""
    data = model.config.data
    kept = data.transform == "cifar"  # its test images are not resized
    return {
        "size": data.image_size,
        "resize": data.image_size if kept else data.resize,
        "resample": data.resample,  # method of the run; the example uses exact resampling
        "channels": data.channels,
        "colours": "RGB" if data.channels == 3 else "grey",
        "values": "uint8, 0 to 255, not normalised",
        "outputs": outputs,
        **more,
        **model.metric.about(),
        "workdir": str(model.workdir),
        "step": model.step,
        "weights": weights_digest(model.variables),
        "jax": jax.__version__,
    }


def write(
    model: Trained,
    out: str | Path,
    platforms: tuple[str, ...] = ("cpu", "cuda", "tpu"),
    form: str = "stablehlo",
) -> Path:
    """Writes the exported folder, completely or not at all.

    Args:
      model: trained embedding.
      out: new folder.
      platforms: platforms to compile for; for ``stablehlo``.
      form: one of ``FORMATS``.

    Raises:
      UserError: if the folder already exists, or the run cannot be exported in this form.
    """
    out = user_path(out)
    if form not in FORMATS:
        raise UserError(f"--format={form}; known: {', '.join(FORMATS)}")
    if os.path.lexists(out):  # fails before the work starts
        raise UserError(f"{out} already exists")
    if form == "onnx":
        program, found = export_onnx(model)
        outputs = found.pop("outputs")
        about, example = _about(model, outputs, found), ONNX_EXAMPLE
    else:
        program, about = export_run(model, platforms)
        example = EXAMPLE
    with replace_folder(out) as folder:
        (folder / f"model.{form}").write_bytes(program)
        (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        (folder / "example.py").write_text(example)
    return out
