"""Loads a trained embedding from a run's folder: network, weights and test transform, without its training data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from idml_jax.data.images.transforms import Transform
from idml_jax.errors import UserError, quiet_libraries
from idml_jax.ism import Metric
from idml_jax.models import EmbeddingModel
from idml_jax.runtime import checkpoint, sharding
from idml_jax.runtime.files import user_path
from idml_jax.training import risk, weights
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import image_shape, transforms_of
from idml_jax.training.config import learns_uncertainty
from idml_jax.training.config_checks import validate
from idml_jax.training.embedder import Embedder, Network
from idml_jax.training.tasks import task_of
from idml_jax.training.tasks.metrics_of_run import metric_of


class Trained(NamedTuple):
    """Everything needed to embed images with a run.

    Attributes:
      workdir: folder of the run.
      step: step of the checkpoint, the run's best.
      config: the run's settings.
      embedder: network, weights, transform and devices of this process.
    """

    workdir: Path
    step: int
    config: ConfigDict
    embedder: Embedder

    def __repr__(self) -> str:
        kind = "introspective" if self.introspective else "plain"
        return f"{type(self).__name__}({kind} {self.config.model.name}, step {self.step} of {self.workdir})"

    @property
    def model(self) -> EmbeddingModel:
        """The network."""
        return self.embedder.network.model

    @property
    def variables(self) -> Any:
        """Weights and statistics, on the mesh."""
        return self.embedder.variables

    @property
    def transform(self) -> Transform:
        """The test transform, from an image to the pixels that the network sees."""
        return self.embedder.transform

    @property
    def mesh(self) -> Mesh:
        """Devices of this process."""
        return self.embedder.mesh

    @property
    def introspective(self) -> bool:
        """Whether the uncertainty head was trained."""
        return self.embedder.learned

    @property
    def metric(self) -> Metric:
        """The metric that compares the embeddings."""
        return metric_of(self.config)

    def using(self, *, threads: int = 0, batch_size: int = 0) -> "Trained":
        """A copy with another number of reader and decoder threads or another batch size; 0: unchanged.

        The batch size is rounded up to a multiple of the number of devices.
        """
        embedder = self.embedder
        size = _shared(batch_size or embedder.batch_size, embedder.mesh)
        return self._replace(embedder=replace(embedder, threads=threads or embedder.threads, batch_size=size))


def _shared(batch_size: int, mesh: Mesh) -> int:
    """A batch size rounded up to a multiple of the number of devices."""
    return -(-batch_size // mesh.size) * mesh.size


def is_there(run: str | Path) -> bool:
    """Whether the run that an index names is at its place."""
    return (Path(run) / "config.json").is_file()


def check_there(run: str | Path) -> None:
    """Raises UserError, which says how to name its new place, unless the run that an index names is there."""
    if not is_there(run):
        raise UserError(f"{run}, the run that the index names, is not there; if it has moved: --workdir=PLACE")


def load(workdir: str | Path, devices: Sequence[jax.Device] | None = None) -> Trained:
    """Loads the best checkpoint of a run.

    Args:
      workdir: folder of the run.
      devices: devices to embed on; by default all of this process.

    Returns:
      Network, weights and transform.

    Raises:
      UserError: if there is no run or checkpoint, or the checkpoint has another architecture.
    """
    with quiet_libraries():
        return _load(user_path(workdir), devices)


def _damaged(checkpoint_folder: Path) -> UserError:
    """The error of a checkpoint that is damaged or incomplete; another one is not taken without a word."""
    others = [step for step in checkpoint.steps_of(checkpoint_folder.parent) if str(step) != checkpoint_folder.name]
    advice = f"move it away to use that of step {others[-1]}" if others else "there is no other one"
    return UserError(f"{checkpoint_folder}: the best checkpoint of the run is damaged or incomplete; {advice}")


def _load(workdir: Path, devices: Sequence[jax.Device] | None) -> Trained:
    config = workdir_lib.read(workdir)
    validate(config)
    folder = checkpoint.find_state(workdir / "checkpoints", config.eval.best_metric)
    shape = jax.ShapeDtypeStruct((1, *image_shape(config)), jnp.float32)
    try:
        model = task_of(config).stored_model(config, lambda: weights.read(folder).values, folder)
        like = jax.eval_shape(model.init, jax.random.key(0), shape)
        loaded, _ = weights.load(folder, like, "all")
    except UserError as error:
        if folder.is_dir() and "cannot be read" not in str(error):
            raise
        raise _damaged(folder.parent) from error
    variables = {"params": loaded["params"], "batch_stats": loaded.get("batch_stats", {})}
    mesh = sharding.data_mesh(list(devices or jax.local_devices()))
    embedder = Embedder(
        network=Network(model, tuple(config.data.mean), tuple(config.data.std)),
        variables=sharding.replicate(variables, mesh),
        transform=transforms_of(config)[1],
        mesh=mesh,
        batch_size=_shared(config.eval.batch_size, mesh),
        channels=config.data.channels,
        learned=learns_uncertainty(config),
    )
    if (workdir / risk.FILE).exists() and config.task == "retrieval":
        head = risk.load(workdir, embedder.digest)
        embedder = replace(embedder, risk=None if head is None else sharding.replicate(head, mesh))
    return Trained(workdir, int(folder.parent.name), config, embedder)
