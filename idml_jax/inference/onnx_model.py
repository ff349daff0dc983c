"""Exports a trained run as an ONNX model, for onnxruntime and other programs without JAX."""

import logging
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from idml_jax.errors import UserError
from idml_jax.inference.model import Trained
from idml_jax.training.embedder import Network, embed_step

# Largest accepted difference between a number in onnxruntime and in JAX, relative for numbers above 1.
TOLERANCE = 1e-4
_CHECKED = (1, 3)  # numbers of images


def export_onnx(model: Trained) -> tuple[bytes, dict[str, Any]]:
    """Converts the embedding function of a run by jax2onnx, and compares the result with JAX in onnxruntime.

    The model computes in float32, also where the run's trunk computes in bfloat16, which few programs for ONNX support.

    Args:
      model: trained embedding.

    Returns:
      The model, from ``images`` [b, size, size, channels] uint8 to ``semantic`` [b, d], ``semantic_norm`` [b] and, for
      an introspective run, ``uncertainty`` [b, k]; and its part of the description: outputs, and the largest difference
      from JAX (``None`` without onnxruntime).

    Raises:
      UserError: if jax2onnx is missing or cannot convert the network, or the numbers differ.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise UserError("--format=onnx needs jax2onnx; pip install 'idml_jax[onnx]'") from error
    data, network = model.config.data, model.embedder.network
    names = ["semantic", "semantic_norm", *(["uncertainty"] if model.introspective else [])]
    single = Network(_in_float32(network.model), network.mean, network.std)
    variables = jax.tree.map(np.asarray, model.variables)

    def embed_images(images: jax.Array) -> tuple[jax.Array, ...]:
        out = embed_step(variables, images, network=single)
        return tuple(out[name] for name in names)

    shape = (data.image_size, data.image_size, data.channels)
    # It warns of shapes that its own graph does not use.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        found = jax2onnx.to_onnx(
            embed_images,
            [jax.ShapeDtypeStruct(cast(Any, ("b", *shape)), np.uint8)],
            model_name="idml_jax",
            input_names=["images"],
            output_names=names,
        )
    except Exception as error:  # it can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"jax2onnx cannot convert {model.config.model.name} ({reason[:300]})") from error
    content = found.SerializeToString()
    sizes = jax.eval_shape(embed_images, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    outputs = {name: ["b", *map(str, one.shape[1:])] for name, one in zip(names, sizes, strict=True)}
    difference = _difference(content, jax.jit(embed_images), shape, names)
    return content, {"outputs": outputs, "difference_from_jax": difference}


def _in_float32(network: Any) -> Any:
    """The network with all parts computing in float32."""
    parts = {name: getattr(network, name) for name in ("trunk", "heads")}
    return network.clone(**{n: p.clone(dtype=jnp.float32) if hasattr(p, "dtype") else p for n, p in parts.items()})


def _difference(content: bytes, embed: Any, shape: tuple[int, ...], names: list[str]) -> float | None:
    """The largest difference from JAX on random images; ``None`` if onnxruntime is not installed.

    Raises:
      UserError: if it is too large.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    largest = 0.0
    for count in _CHECKED:
        images = np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)
        for name, one, other in zip(names, session.run(names, {"images": images}), embed(images), strict=True):
            wanted = np.asarray(other)
            apart = float(np.max(np.abs(one - wanted) / np.maximum(np.abs(wanted), 1.0)))
            if not apart <= TOLERANCE:
                raise UserError(f"the ONNX model gives another {name} than JAX, by {apart:.2g}; nothing is written")
            largest = max(largest, apart)
    return largest
