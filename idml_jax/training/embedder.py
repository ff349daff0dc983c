"""Embeds the images of a source; shared by evaluation, embedding, search and reports."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from idml_jax import mixing
from idml_jax.data import pipeline
from idml_jax.data.images.transforms import Transform
from idml_jax.data.pipeline import OnBad
from idml_jax.data.sources import Source
from idml_jax.errors import enough_memory
from idml_jax.metrics.embedded import Embedded
from idml_jax.models import EmbeddingModel
from idml_jax.models.risk_head import RiskHead, risk_of
from idml_jax.runtime import sharding
from idml_jax.runtime.progress import Progress, Ticker, erase, is_shown
from idml_jax.training.digests import weights_digest
from idml_jax.training.steps import normalize

OUTPUTS = ("semantic", "uncertainty", "semantic_norm")

logger = logging.getLogger(__name__)
_SECONDS = 10.0  # between two lines of progress in a log
B = TypeVar("B")
R = TypeVar("R")


@dataclass(frozen=True)
class Network:
    """A model with the normalisation of its input. Hashable: a static argument of jitted functions.

    Attributes:
      model: network.
      mean: mean per channel, of images in [0, 1].
      std: standard deviation per channel.
    """

    model: EmbeddingModel
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normal(self, images: UInt8[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        """Images normalised for the model."""
        return normalize(images, self.mean, self.std)

    def outputs(self, variables: Any, inputs: Float[Array, "n h w c"]) -> dict[str, Array]:
        """All outputs of the model in evaluation mode, for normalised images."""
        out: Any = self.model.apply(variables, inputs, False)
        return out


def embed_step(variables: Any, images: UInt8[Array, "n h w c"], *, network: Network) -> dict[str, Array]:
    """Embeddings of uint8 images: ``semantic`` [n, d], ``uncertainty`` [n, k], ``semantic_norm`` [n]. Pure."""
    out = network.outputs(variables, network.normal(images))
    return {name: out[name] for name in OUTPUTS}


def embed_risk_step(
    variables: Any, head: RiskHead, images: UInt8[Array, "n h w c"], *, network: Network
) -> dict[str, Array]:
    """As ``embed_step``, and ``risk`` [n] of a risk head."""
    out = network.outputs(variables, network.normal(images))
    return {"risk": risk_of(head, out["features"]), **{name: out[name] for name in OUTPUTS}}


def embed_mixed_step(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    others: UInt8[Array, "n h w c"],
    lam: float = 0.5,
    *,
    network: Network,
) -> dict[str, Array]:
    """As ``embed_step``, of images blended with others; ``lam`` is the share of the first image."""
    out = network.outputs(variables, mixing.blend(network.normal(images), network.normal(others), lam))
    return {name: out[name] for name in OUTPUTS}


jit_embed_step = jax.jit(embed_step, static_argnames=("network",))
jit_embed_risk_step = jax.jit(embed_risk_step, static_argnames=("network",))
jit_embed_mixed_step = jax.jit(embed_mixed_step, static_argnames=("network",))


class Rows(NamedTuple):
    """The results for the images of one batch, on the host.

    Attributes:
      records: ``[m]`` record indices of the readable images.
      values: arrays with a row per record.
      skipped: record index and reason of each unreadable image.
    """

    records: Int[np.ndarray, "m"]
    values: dict[str, np.ndarray]
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class Embedder:
    """Embeds the images of a source: ``embedder(source)``.

    Attributes:
      network: model and normalisation.
      variables: weights and statistics, on the mesh.
      transform: test transform, from an encoded image to pixels.
      mesh: devices.
      batch_size: number of images per step over all devices.
      channels: 3 for colour, 1 for grey.
      threads: number of reader and decoder threads.
      learned: whether the uncertainty head was trained; otherwise embeddings have no uncertainty.
      check: called before every batch; may raise to stop.
      risk: head that gives a risk to every image that is not mixed; ``None``: none.
    """

    network: Network
    variables: Any
    transform: Transform
    mesh: Mesh
    batch_size: int
    channels: int = 3
    threads: int = 4
    learned: bool = True
    check: Callable[[], None] = lambda: None
    risk: RiskHead | None = None

    def __repr__(self) -> str:
        kind = type(self).__name__
        return (
            f"{kind}({type(self.network.model).__name__}, {self.batch_size} images a batch, {self.mesh.size} devices)"
        )

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the weights."""
        return weights_digest(self.variables)

    def __call__(
        self,
        source: Source,
        order: Int[np.ndarray, "m"] | None = None,
        *,
        partners: Int[np.ndarray, "m"] | None = None,
    ) -> Embedded:
        """Embeds every image of a source (or those of ``order``) once.

        Args:
          source: images.
          order: ``[m]`` records; all by default.
          partners: ``[m]`` records to blend them with, at equal weight.

        Returns:
          ``m`` embeddings in that order.

        Raises:
          UserError: naming an image that cannot be read.
        """
        order = np.arange(len(source)) if order is None else np.asarray(order)
        if partners is None:
            values = self.gathered(self._embed, source, order)
        else:
            values = self.gathered(self._embed_mixed, source, order, partners)
        return embedded_rows(source, order, values)

    def gathered(
        self,
        step: Callable[..., dict[str, Array]],
        source: Source,
        order: Int[np.ndarray, "m"],
        partners: Int[np.ndarray, "m"] | None = None,
    ) -> dict[str, np.ndarray]:
        """The results of a step for all images of ``order``.

        Args:
          step: function from images ``[n, h, w, c]``, sharded over the mesh (and those of the partners), to arrays with
            one row per image.
          source: images.
          order: ``[m]`` records.
          partners: ``[m]`` records whose images are passed to the step as second argument.

        Returns:
          Arrays ``[m, ...]`` with the names that ``step`` returns.

        Raises:
          UserError: naming an image that cannot be read.
        """
        placed = self._placed(source, order, partners)
        return joined_rows(self.results(lambda images: step(*images), placed, len(order)), len(order))

    def results(self, step: Callable[[B], R], batches: Iterable[B], total: int) -> list[R]:
        """The results of a step for all batches; shows the progress of a long work.

        Args:
          step: function from a batch to arrays.
          batches: batches of ``batch_size`` images.
          total: number of images.
        """
        shown, parts = progress_of("evaluating", total), []
        with self._enough_memory():
            for batch in batches:
                parts.append(step(batch))
                if len(parts) > 1:
                    jax.block_until_ready(parts[-2])  # what was only dispatched is not done
                    shown.add(self.batch_size)
        erase()
        return parts

    def _enough_memory(self) -> contextlib.AbstractContextManager[None]:
        return enough_memory(
            f"images are embedded in batches of {self.batch_size} ({self.batch_size // self.mesh.size} a device); "
            "smaller ones need less (config.eval.batch_size; of a finished run embed --batch_size)"
        )

    def rows(self, source: Source, order: Int[np.ndarray, "m"] | None = None, on_bad: OnBad = "skip") -> Iterator[Rows]:
        """Embeds batch by batch, for sources larger than memory or with images that cannot be read.

        Args:
          source: images.
          order: ``[m]`` records; all by default.
          on_bad: ``skip`` reports an image that cannot be read, ``raise`` raises ``UserError``.

        Yields:
          The embeddings of each batch.
        """
        for batch in self._batches(source, order, on_bad):
            self.check()
            good = batch["mask"]
            skipped = [(int(r), str(p)) for r, p in zip(batch["index"], batch["problem"], strict=True) if p]
            values: dict[str, np.ndarray] = {}
            if good.any():
                values = {name: value[good] for name, value in self.images(batch["image"]).items()}
            yield Rows(batch["index"][good], values, skipped)

    def images(self, images: UInt8[np.ndarray, "n h w c"]) -> dict[str, Float[np.ndarray, "n ..."]]:
        """Embeds transformed images, in batches padded to ``batch_size`` so that one compiled program serves all.

        Args:
          images: ``[n, h, w, c]`` of the network's size.

        Returns:
          ``semantic`` [n, d], ``semantic_norm`` [n] and, where it was learned, ``uncertainty`` [n, k] and ``risk`` [n].
        """
        count = len(images)
        missing = -count % self.batch_size
        padded = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)]) if missing else images
        parts = []
        with self._enough_memory():
            for start in range(0, len(padded), self.batch_size):
                part = sharding.shard_batch({"image": padded[start : start + self.batch_size]}, self.mesh)["image"]
                parts.append(self._embed(part))
            return joined_rows(parts, count)

    def _embed(self, images: Array) -> dict[str, Array]:
        if self.risk is not None:
            return self._taught(jit_embed_risk_step(self.variables, self.risk, images, network=self.network))
        return self._taught(jit_embed_step(self.variables, images, network=self.network))

    def _embed_mixed(self, images: Array, others: Array) -> dict[str, Array]:
        return self._taught(jit_embed_mixed_step(self.variables, images, others, network=self.network))

    def _taught(self, out: dict[str, Array]) -> dict[str, Array]:
        return out if self.learned else {name: value for name, value in out.items() if name != "uncertainty"}

    def _batches(
        self, source: Source, order: Int[np.ndarray, "m"] | None, on_bad: OnBad = "raise"
    ) -> Iterator[pipeline.Batch]:
        host, hosts = sharding.host_of(self.mesh)
        reading = pipeline.Reading(self.transform, self.channels, self.threads, host=host, hosts=hosts)
        return pipeline.eval_batches(source, reading, batch_size=self.batch_size, order=order, on_bad=on_bad)

    def placed(self, source: Source, order: Int[np.ndarray, "m"] | None = None) -> Iterator[dict[str, Array]]:
        """Batches on the mesh: ``image`` [n, h, w, c], ``label`` [n] and ``mask`` [n], false for padding."""
        for batch in self._batches(source, order):
            self.check()
            yield sharding.shard_batch({name: batch[name] for name in ("image", "label", "mask")}, self.mesh)

    def _placed(
        self, source: Source, order: Int[np.ndarray, "m"], partners: Int[np.ndarray, "m"] | None
    ) -> Iterator[tuple[Array, ...]]:
        orders = [order] if partners is None else [order, partners]
        for batches in zip(*(self._batches(source, some) for some in orders), strict=True):
            self.check()
            yield tuple(sharding.shard_batch({"image": batch["image"]}, self.mesh)["image"] for batch in batches)


def progress_of(work: str, total: int, done: int = 0) -> Progress:
    """The progress of a work on images: one line after ``show_progress``, else lines of the log."""
    ticker = Ticker(logger.info, _SECONDS, live=jax.process_index() == 0 and is_shown())
    return Progress(total, done, ticker, lambda done, rate: f"{work}: {done:,} of {total:,} images, {rate:,.0f}/s")


def embedded_rows(source: Source, records: Int[np.ndarray, "m"], values: Mapping[str, np.ndarray]) -> Embedded:
    """Embeddings of some images of a source, with their labels and groups.

    Args:
      source: images.
      records: ``[m]`` records of the images.
      values: ``semantic`` [m, d] and what else an ``Embedded`` may have.
    """
    known = {"sets": "labels", "groups": "group", "ids": "row"}
    fields = getattr(source, "fields", {})
    more = {name: fields[field][records] for name, field in known.items() if field in fields}
    return Embedded(labels=source.labels[records], **more, **values)


def joined_rows(parts: list[dict[str, jax.Array]], count: int) -> dict[str, np.ndarray]:
    """The rows of all batches on the host, without padding.

    Args:
      parts: for each batch, arrays with one row per image.
      count: total number of images.

    Returns:
      Arrays ``[count, ...]`` with the same names.
    """
    # Each host holds one contiguous part of a global batch, so all padding is at the end.
    arrays = [sharding.to_host(part) for part in parts]
    return {name: np.concatenate([part[name] for part in arrays])[:count] for name in arrays[0]}
