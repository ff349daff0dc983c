"""A trained embedding from a run's folder: network, weights and test transform, without the data it was trained on."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from idml_jax.data.images import transforms
from idml_jax.data.images.transforms import DecodeError, Picture, Transform
from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.ism import Metric
from idml_jax.models import EmbeddingModel
from idml_jax.runtime import checkpoint, sharding
from idml_jax.training import config as config_lib
from idml_jax.training import steps
from idml_jax.training import weights as pretrained
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import _create_model
from idml_jax.training.config_checks import validate
from idml_jax.training.tasks import classification as classify_steps
from idml_jax.training.tasks.objective import metric_of


class Trained(NamedTuple):
    """What is needed to embed pictures as a run does.

    Attributes:
      workdir: folder of the run.
      step: of the checkpoint, the run's best.
      config: the run's settings.
      model: network.
      variables: its weights, on the mesh.
      transform: from a picture to the pixels that the network sees.
      mesh: devices of this process.
    """

    workdir: Path
    step: int
    config: ConfigDict
    model: EmbeddingModel
    variables: Any
    transform: Transform
    mesh: Mesh

    @property
    def introspective(self) -> bool:
        """Whether training has taught the uncertainty head anything."""
        return config_lib.learns_uncertainty(self.config)

    @property
    def metric(self) -> Metric:
        """The metric that compares its embeddings."""
        return metric_of(self.config)


class Loaded(NamedTuple):
    """Some images of a source, read and transformed.

    Attributes:
      records: ``[m]``, of those that could be read.
      images: their pixels, ``[m, size, size, channels]``.
      skipped: record and reason of the others.
    """

    records: np.ndarray
    images: UInt8[np.ndarray, "m size size c"]
    skipped: list[tuple[int, str]]


def load(workdir: str | Path, devices: Sequence[jax.Device] | None = None) -> Trained:
    """The best checkpoint of a run.

    Args:
      workdir: folder of the run.
      devices: to embed on; all of this process by default.

    Returns:
      Network, weights and transform.

    Raises:
      UserError: if there is no run, no checkpoint, or one of another architecture.
    """
    workdir = Path(workdir).expanduser().absolute()
    config = workdir_lib.read(workdir)
    validate(config)
    data = config.data
    folder = checkpoint.find_state(workdir / "checkpoints", config.eval.best_metric)
    weights: Path | pretrained.Tensors = folder
    if config.task == "classification":
        weights = pretrained.read(folder)
        model = _classifier(config, weights, folder)
    else:
        model = _create_model(config)
    images = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, data.channels), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    loaded, _ = pretrained.load(weights, like, "all")
    variables = {"params": loaded["params"], "batch_stats": loaded.get("batch_stats", {})}
    _, transform = transforms.create(
        data.transform, size=data.image_size, resize=data.resize, pad=data.pad, resample=data.resample
    )
    mesh = sharding.data_mesh(list(devices or jax.local_devices()))
    step = int(folder.parent.name)
    return Trained(workdir, step, config, model, sharding.replicate(variables, mesh), transform, mesh)


def _classifier(config: ConfigDict, stored: pretrained.Tensors, folder: Path) -> EmbeddingModel:
    """Its classes are counted in the weights, since the data need not be there."""
    bias = stored.values.get("params/heads/classifier/bias")
    if bias is None:
        raise UserError(f"{folder}: config.task is 'classification', but the weights hold no classifier")
    return classify_steps.create_network(config, len(bias))


def embed_images(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    *,
    model: EmbeddingModel,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Float[Array, "n ..."]]:
    """``semantic`` [n, d], ``uncertainty`` [n, k] and ``semantic_norm`` [n] of transformed pictures. Pure."""
    out: Any = model.apply(variables, steps.normalize(images, mean, std), False)
    return {key: out[key] for key in ("semantic", "uncertainty", "semantic_norm")}


_jit_embed_images = jax.jit(embed_images, static_argnames=("model", "mean", "std"))


def embed_function(trained: Trained) -> partial:
    """``embed_images`` with all but variables and pictures given."""
    data = trained.config.data
    return partial(embed_images, model=trained.model, mean=tuple(data.mean), std=tuple(data.std))


def batch_size_of(trained: Trained, wanted: int = 0) -> int:
    """A batch size that the devices share evenly: the wanted one, else the run's of evaluation, rounded up."""
    wanted = wanted or trained.config.eval.batch_size
    return -(-wanted // trained.mesh.size) * trained.mesh.size


def embed_pictures(
    trained: Trained, images: UInt8[np.ndarray, "n h w c"], batch_size: int
) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Embeddings of up to ``batch_size`` transformed pictures, as ``embed_images``, without ``uncertainty`` in a plain
    run. Fewer are filled up, so that one program serves all batches."""
    count = len(images)
    if count < batch_size:
        images = np.concatenate([images, np.zeros((batch_size - count, *images.shape[1:]), np.uint8)])
    placed = sharding.shard_batch({"image": images}, trained.mesh)["image"]
    out = _jit_embed_images(trained.variables, placed, **embed_function(trained).keywords)
    out = {key: np.asarray(value)[:count] for key, value in out.items()}
    if not trained.introspective:
        del out["uncertainty"]
    return out


def read_batches(
    trained: Trained, source: Source, records: Sequence[int], batch_size: int, threads: int = 4
) -> Iterator[Loaded]:
    """Reads and transforms images, one batch ahead; those that cannot be read are told, not raised.

    Args:
      trained: for the transform.
      source: images.
      records: which, in this order.
      batch_size: of them at a time.
      threads: that read and decode.

    Yields:
      Batches; memory is that of two.
    """
    channels = trained.config.data.channels
    # A transform at test draws nothing, but takes a generator.
    rng = np.random.default_rng(0)

    def one(record: int) -> np.ndarray | str:
        try:
            return trained.transform(Picture(source.read(record), channels), rng)
        except (DecodeError, UserError) as error:
            return str(error).removeprefix(f"{source.name(record)}: ")

    def collect(chunk: Sequence[int], results: list[Any]) -> Loaded:
        done = [result.result() for result in results]
        good = [place for place, image in enumerate(done) if not isinstance(image, str)]
        size = trained.config.data.image_size
        images = np.stack([done[p] for p in good]) if good else np.zeros((0, size, size, channels), np.uint8)
        skipped = [(int(r), image) for r, image in zip(chunk, done, strict=True) if isinstance(image, str)]
        return Loaded(np.asarray(chunk)[good], images, skipped)

    records = [int(record) for record in records]
    chunks = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    with ThreadPoolExecutor(threads) as pool:
        pending: tuple[Sequence[int], list[Any]] | None = None
        for chunk in chunks:
            following = chunk, [pool.submit(one, record) for record in chunk]
            if pending is not None:
                yield collect(*pending)
            pending = following
        if pending is not None:
            yield collect(*pending)
