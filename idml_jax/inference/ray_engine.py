"""Embeds into a gallery on a Ray cluster: actors of Ray Data that hold the model write parts; ray is optional.

An actor opens the run and the list of images by their paths, so that all machines of the cluster must see the same
files. It writes whole parts, as ``embed --shard`` does: a part that was lost with its worker is written again by
another, and finished parts are never written twice. Scheduling, restarts and retries are Ray's.
"""

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.inference.embed import list_images, split_source
from idml_jax.inference.gallery_parts import Work, open_work
from idml_jax.inference.model import Trained, load
from idml_jax.runtime.files import user_path


class Job(NamedTuple):
    """What every worker opens by itself.

    Attributes:
      workdir: folder of the run.
      images: image, folder or list; empty: ``split``.
      split: split of the run's own data.
      no_labels: whether folder names are no classes.
      batch_size: images per batch; 0: the run's.
      threads: reader and decoder threads of each worker.
      out: the gallery.
      append: whether images are added to a gallery.
      root: folder that a table's relative paths start from; empty: its own.
    """

    workdir: str
    images: str
    split: str
    no_labels: bool
    batch_size: int
    threads: int
    out: str
    append: bool
    root: str = ""

    def open(self, say: Callable[[str], None] = lambda line: None) -> Work | None:
        """The source of the gallery that this job writes; ``None`` if there is nothing to do."""
        model = load(self.workdir).using(threads=self.threads, batch_size=self.batch_size)
        source, labelled, origin = self.source(model)
        how: dict[str, Any] = {"labelled": labelled, "origin": origin, "append": self.append, "say": say}
        return open_work(model, source, self.out, **how)

    def source(self, model: Trained) -> tuple[Source, bool, str]:
        """The images, whether their labels are valid, and their origin."""
        if self.split:
            return split_source(model, self.split), not self.no_labels, f"split:{self.split}"
        source, labelled = list_images(self.images, root=self.root)
        return source, labelled and not self.no_labels, str(user_path(self.images))


class Workers(NamedTuple):
    """The workers of a cluster.

    Attributes:
      actors: their number.
      gpus: accelerators of each.
    """

    actors: int
    gpus: float = 0.0


def _ray() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine=ray needs ray, which is not installed; pip install idml_jax[ray]") from error
    return ray


class _Writer:
    """An actor: holds the model and writes parts."""

    def __init__(self, job: Job, before: Callable[[int], None]):
        self._work, self._before = job.open(), before

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = []
        for number in batch["number"].tolist():
            self._before(number)
            assert self._work is not None  # the driver has found parts to write
            if not self._work.has(number):
                self._work.write(number)
            images.append(len(self._work.records(number)))
        return {"number": batch["number"], "images": np.asarray(images)}


def embed_on_cluster(
    job: Job,
    workers: Workers,
    say: Callable[[str], None] = print,
    before: Callable[[int], None] = lambda number: None,
) -> None:
    """Embeds images into a gallery with the workers of a Ray cluster.

    The cluster is the one that ``RAY_ADDRESS`` names or that this program is connected to, or else a local one.

    Args:
      job: what to embed.
      workers: number and kind of actors.
      say: receives progress lines.
      before: called by a worker before each part, with its number.

    Raises:
      UserError: if ray is missing, or for the reasons of ``gallery_parts.embed_to_gallery``.
    """
    ray = _ray()
    work = job.open(say)
    if work is None:
        return
    missing = [number for number in range(work.made.parts) if not work.has(number)]
    if missing:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="error")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        parts = ray.data.from_items([{"number": n} for n in missing], override_num_blocks=len(missing)).map_batches(
            _Writer,
            fn_constructor_args=(job, before),
            batch_size=1,
            num_gpus=workers.gpus or None,
            compute=ray.data.ActorPoolStrategy(size=min(workers.actors, len(missing))),
        )
        done, total = 0, sum(len(work.records(number)) for number in missing)
        for batch in parts.iter_batches(batch_size=None):
            done += int(np.sum(batch["images"]))
            say(f"{done:,} of {total:,} images")
    work.finish(say)
