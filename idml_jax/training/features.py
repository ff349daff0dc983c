"""Pooled features of a run's images, computed once and kept in the run's folder.

``RUN/features/NAME/`` holds the features of one set of images under one transform, in parts ``000000.npy`` of ``ROWS``
images, each written completely or not at all; they are memory-mapped when read. ``about.json`` identifies trunk,
transform and images. Parts of a stopped command are used again, parts with another identity are not.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from idml_jax.data.images.transforms import AnyPicture, Picture, Transform
from idml_jax.data.pipeline import slot_generator
from idml_jax.data.samplers import Sampler
from idml_jax.data.sources import Source
from idml_jax.errors import UserError, printable
from idml_jax.metrics.embedded import Embedded
from idml_jax.models import EmbeddingModel
from idml_jax.models.risk_head import risk_of
from idml_jax.runtime import hosts, sharding
from idml_jax.runtime.files import TEMPORARY, atomic, write_json
from idml_jax.runtime.progress import Progress, erase
from idml_jax.training.digests import images_digest, weights_digest
from idml_jax.training.embedder import OUTPUTS, Embedder, Network, embedded_rows, joined_rows, progress_of

logger = logging.getLogger("idml_jax")

ROWS = 1024  # images in a part
Identity = Mapping[str, str]


@dataclass(frozen=True)
class Features:
    """Features in parts; iterating gives every part with its labels.

    Attributes:
      parts: arrays ``[m, f]`` float32, memory-mapped.
      labels: ``[n]`` of all images.
    """

    parts: tuple[Float[np.ndarray, "m f"], ...]
    labels: Int[np.ndarray, "n"]

    def __iter__(self) -> Iterator[tuple[Float[np.ndarray, "m f"], Int[np.ndarray, "m"]]]:
        start = 0
        for part in self.parts:
            yield part, self.labels[start : start + len(part)]
            start += len(part)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Length f of a feature."""
        return self.parts[0].shape[1]

    def rows(self, chosen: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m f"]:
        """The features of some images, in memory."""
        out = np.empty((len(chosen), self.width), np.float32)
        part_of = chosen // ROWS
        for number in np.unique(part_of):
            some = part_of == number
            out[some] = self.parts[number][chosen[some] - number * ROWS]
        return out


@dataclass(frozen=True)
class SeededView:
    """A random transform whose randomness is a function of (seed, content of the image, view) alone.

    Attributes:
      transform: the transform.
      seed: seed of the run.
      view: number of the view.
    """

    transform: Transform
    seed: int
    view: int

    def __call__(self, image: AnyPicture, rng: np.random.Generator) -> UInt8[np.ndarray, "size size c"]:
        content = image.data if isinstance(image, Picture) else image.tobytes()
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        seeds = np.random.SeedSequence((self.seed, self.view, number))
        return self.transform(image, np.random.Generator(np.random.Philox(seeds)))


@partial(jax.jit, static_argnames=("network",))
def feature_step(variables: Any, images: UInt8[Array, "n h w c"], *, network: Network) -> dict[str, Array]:
    """Pooled ``features`` [n, f] of uint8 images."""
    found: Any = network.model.apply(variables, network.normal(images), False, method=EmbeddingModel.features)
    return {"features": found}


@partial(jax.jit, static_argnames=("network",))
def heads_step(heads: Any, features: Float[Array, "n f"], *, network: Network) -> dict[str, Array]:
    """The heads' outputs for pooled features, as ``embedder.embed_step`` gives them for images."""
    out: Any = network.model.apply({"params": {"heads": heads}}, features, method=EmbeddingModel.embed)
    return {name: out[name] for name in OUTPUTS}


jit_risk_of = jax.jit(risk_of)


def identity_of(embedder: Embedder, network: str, source: Source) -> Identity:
    """What the features of a source depend on.

    Args:
      embedder: trunk and transform.
      network: name of the network and its settings.
      source: images.
    """
    variables = {"params": {"trunk": embedder.variables["params"]["trunk"]}}
    variables["batch_stats"] = embedder.variables["batch_stats"]
    inputs = (embedder.transform, embedder.channels, embedder.network.mean, embedder.network.std)
    return {
        "weights": weights_digest(variables),
        "network": network,
        "transform": repr(inputs),
        "images": f"{len(source)} images, {images_digest(source)}",
    }


def features_of(embedder: Embedder, network: str, source: Source, folder: Path) -> Features:
    """The features of all images of a source, from the folder or computed into it.

    With several processes all of them compute; the first one reads and writes the folder, and it alone gets the values.

    Args:
      embedder: trunk, transform and devices; its ``check`` may stop the work between two batches.
      network: name of the network and its settings.
      source: images.
      folder: folder of these features.

    Returns:
      The features; without any parts on other processes than the first.

    Raises:
      UserError: naming an image that cannot be read or whose feature is not finite, or if the folder cannot be used.
    """
    count = -(-len(source) // ROWS)
    identity = identity_of(embedder, network, source)

    def known_parts() -> dict[str, np.ndarray]:
        _claim(folder, identity)
        found = [_read(folder, number, len(source)) is not None for number in range(count)]
        return {"known": np.asarray(found, np.int32)}

    known = hosts.from_first(known_parts, {"known": np.zeros(count, np.int32)})["known"] > 0
    done = min(int(known.sum()) * ROWS, len(source))
    if done:
        logger.info("features of %s: %s of %s images are stored", folder.name, f"{done:,}", f"{len(source):,}")
    progress = progress_of(f"features of {folder.name}", len(source), done)
    for number in np.flatnonzero(~known).tolist():
        records = np.arange(number * ROWS, min((number + 1) * ROWS, len(source)))
        found = _computed(embedder, source, records, progress)
        problem = None
        if jax.process_index() == 0:
            try:
                _check_finite(found, source, records)
                with atomic(_path(folder, number)) as file:
                    np.save(file, found)
            except UserError as error:
                problem = error
        hosts.agree(problem)
    erase()
    if not known.all():
        line = "features of %s: %s images in %.1f s (%.0f/s)"
        logger.info(line, folder.name, f"{progress.fresh:,}", progress.seconds, progress.rate)
    if jax.process_index() != 0:
        return Features((), source.labels)
    parts = [_read(folder, number, len(source)) for number in range(count)]
    missing = [number for number, part in enumerate(parts) if part is None]
    if missing:
        raise UserError(f"{_path(folder, missing[0])}: was removed or changed while it was in use; run it again")
    return Features(tuple(part for part in parts if part is not None), source.labels)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npy"


def _claim(folder: Path, identity: Identity) -> None:
    """Makes the folder one of this identity: removes parts with another one, and says why."""
    about = folder / "about.json"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder; features are kept in a folder of their own")
    stored: Any = None
    try:
        stored = json.loads(about.read_text())
    except (OSError, ValueError):
        if folder.is_dir() and any(path.suffix != TEMPORARY for path in folder.iterdir() if path != about):
            raise UserError(f"{folder}: is not a folder of features (no valid about.json); move it away") from None
    if stored == identity:
        return
    if stored is not None:
        known = stored if isinstance(stored, dict) else {}
        changed = [name for name in identity if known.get(name) != identity[name]]
        logger.info("features of %s: stored ones are of other %s; computing them again", folder.name, _listed(changed))
        shutil.rmtree(folder)
    write_json(about, dict(identity))


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names or ["contents"])


def _read(folder: Path, number: int, total: int) -> Float[np.ndarray, "m f"] | None:
    """A part, memory-mapped; ``None`` if it is missing or damaged."""
    try:
        part = np.load(_path(folder, number), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    right = part.ndim == 2 and part.dtype == np.float32 and len(part) == min(ROWS, total - number * ROWS)
    return part if right else None


def _computed(
    embedder: Embedder, source: Source, records: Int[np.ndarray, "m"], progress: Progress
) -> Float[np.ndarray, "m f"]:
    """The features of some images; the next batch is under way while one is fetched."""
    pending: list[dict[str, Array]] = []
    done: list[dict[str, np.ndarray]] = []
    left = len(records)

    def fetch() -> None:
        nonlocal left
        done.append(sharding.to_host(pending.pop(0)))
        fresh = min(left, len(done[-1]["features"]))  # the last batch is padded
        left -= fresh
        progress.add(fresh)

    for batch in embedder.placed(source, records):
        pending.append(feature_step(embedder.variables, batch["image"], network=embedder.network))
        if len(pending) > 1:
            fetch()
    while pending:
        fetch()
    return np.concatenate([batch["features"] for batch in done])[: len(records)]


def _check_finite(found: Float[np.ndarray, "m f"], source: Source, records: Int[np.ndarray, "m"]) -> None:
    bad = ~np.isfinite(found).all(axis=1)
    if bad.any():
        raise UserError(
            f"the trunk gives NaN or infinity for {int(bad.sum()):,} of {len(bad):,} images, the first "
            f"{printable(source.name(int(records[bad.argmax()])))}; its weights are damaged or do not fit"
        )


@dataclass(frozen=True)
class FeatureEmbedder(Embedder):
    """An embedder that applies the heads to known features; other images or transforms go through the network.

    Attributes:
      known: sources and their features.
      plain: transform of these features.
    """

    known: tuple[tuple[Source, Features], ...] = ()
    plain: Transform | None = None

    @classmethod
    def over(cls, embedder: Embedder, known: tuple[tuple[Source, Features], ...]) -> "FeatureEmbedder":
        """An embedder with the features of some sources under its own transform."""
        own = {field.name: getattr(embedder, field.name) for field in fields(Embedder)}
        return cls(**own, known=known, plain=embedder.transform)

    def __call__(
        self,
        source: Source,
        order: Int[np.ndarray, "m"] | None = None,
        *,
        partners: Int[np.ndarray, "m"] | None = None,
    ) -> Embedded:
        """As ``Embedder``; features that are known are not computed."""
        found = next((features for one, features in self.known if one is source), None)
        if found is None or partners is not None or self.transform is not self.plain:
            return super().__call__(source, order, partners=partners)
        order = np.arange(len(source)) if order is None else np.asarray(order)
        heads = sharding.to_host(self.variables["params"]["heads"])
        parts = []
        for start in range(0, len(order), ROWS):
            rows = found.rows(order[start : start + ROWS])
            padded = np.concatenate([rows, np.zeros((-len(rows) % min(ROWS, len(order)), rows.shape[1]), np.float32)])
            part = self._taught(heads_step(heads, padded, network=self.network))
            parts.append(part if self.risk is None else {"risk": jit_risk_of(self.risk, padded), **part})
        return embedded_rows(source, order, joined_rows(parts, len(order)))


def view_embedder(embedder: Embedder, transform: Transform, seed: int, view: int) -> Embedder:
    """The embedder of a view: of view 0 the test transform, of others a random one, as of training."""
    return embedder if view == 0 else replace(embedder, transform=SeededView(transform, seed, view))


@dataclass(frozen=True)
class Views:
    """The features of several views of the same images, one after the other."""

    of: tuple[Features, ...]

    def __iter__(self) -> Iterator[tuple[Float[np.ndarray, "m f"], Int[np.ndarray, "m"]]]:
        for features in self.of:
            yield from features

    def batches(self, sampler: Sampler, *, seed: int, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """Training batches of features in place of images; the view of an image is a function of (seed, step).

        Args:
          sampler: order of the images.
          seed: seed of the run.
          start: first step.
          stop: step after the last.

        Yields:
          ``image`` [b, f] float32, ``label`` [b] int32, ``index`` [b] int32.
        """
        for step in range(start, stop):
            records = sampler.batch(step)
            view = slot_generator(seed, step).integers(len(self.of), size=len(records))
            rows = np.empty((len(records), self.plain.width), np.float32)
            for number in np.unique(view):
                rows[view == number] = self.of[number].rows(records[view == number])
            labels = self.plain.labels[records].astype(np.int32)
            yield {"image": rows, "label": labels, "index": records.astype(np.int32)}

    @property
    def plain(self) -> Features:
        """The features under the test transform."""
        return self.of[0]
