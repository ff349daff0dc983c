"""A loaded run in Python: images to vectors, the nearest images, and two images compared.

model = idml_jax.load("runs/mine")
photos = model.embed("photos")                  # a folder, paths, images of Pillow, numpy arrays
answers = model.search("bird.jpg", photos, 5)   # nearest images, with the probability of being right
model.compare("a.jpg", "b.jpg").distance
"""

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from idml_jax.data.given import images_of
from idml_jax.errors import UserError, warn
from idml_jax.inference import embed as embedding
from idml_jax.inference import model as trained
from idml_jax.inference import search as searching
from idml_jax.inference import sureness
from idml_jax.inference.gallery import read_stored
from idml_jax.inference.held_out import warn_of_shared
from idml_jax.inference.index import Index, check_comparable, named
from idml_jax.inference.model import Trained
from idml_jax.inference.own import own_rows
from idml_jax.inference.sureness import Confidence, Wanted
from idml_jax.inference.trained_on import warn_of_training_images
from idml_jax.ism import Metric
from idml_jax.metrics.calibration import Calibration
from idml_jax.training.embedder import embedded_rows

__all__ = ["Answer", "Comparison", "Model", "Near", "answers", "embed", "load", "search"]

# Sizes of a batch per device for few images; each is compiled once.
_SMALL_BATCHES = (1, 8, 32)


class Near(NamedTuple):
    """An image of an index near to a query.

    Attributes:
      file: its path or name.
      label: name of its class, of several the first; ``None`` if unknown.
      distance: semantic distance.
      introspective_distance: distance by the introspective metric; ``None`` without an uncertainty.
      row: its row in the index.
      labels: names of all its classes; none if unknown.
      box: left, top, right and bottom if it is a part of a picture; ``None``: all of it.
    """

    file: str
    label: str | None
    distance: float
    introspective_distance: float | None
    row: int
    labels: tuple[str, ...] = ()
    box: tuple[int, int, int, int] | None = None


class Answer(Sequence[Near]):
    """The images of an index nearest to a query, as a sequence, nearest first.

    Args:
      query: path or name of the query.
      near: the nearest images.
      probability: that the nearest image has the query's class, or shares one with it where images have several;
        ``None`` where nothing tells.
      uncertainty: length of the query's uncertainty embedding; ``None`` where the run has none.
      known: probability that the query's class is in the index at all; ``None`` where nothing tells.

    Attributes:
      file: path or name of the nearest image.
      label: name of its class, of several the first; ``None`` if unknown.
      labels: names of all its classes; none if unknown.
      distance: its semantic distance.
    """

    def __init__(
        self,
        query: str,
        near: Sequence[Near],
        probability: float | None,
        uncertainty: float | None,
        known: float | None = None,
    ):
        self.query, self.probability, self.uncertainty, self.known = query, probability, uncertainty, known
        self._near = tuple(near)
        self.file, self.distance = near[0].file, near[0].distance
        self.label, self.labels = near[0].label, near[0].labels

    def __len__(self) -> int:
        return len(self._near)

    @overload
    def __getitem__(self, place: int) -> Near: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Near]: ...
    def __getitem__(self, place: int | slice) -> Near | Sequence[Near]:
        return self._near[place]

    def __iter__(self) -> Iterator[Near]:
        return iter(self._near)

    def __repr__(self) -> str:
        label = f" ({', '.join(self.labels)})" if self.labels else ""
        sure = "" if self.probability is None else f", probability {self.probability:.3f}"
        more = f" and {len(self) - 1} more" if len(self) > 1 else ""
        return f"Answer({self.query}: {named(self.file, self._near[0].box)}{label} at {self.distance:.4f}{sure}{more})"


class Comparison(NamedTuple):
    """Two images compared.

    Attributes:
      distance: semantic distance.
      introspective_distance: distance by the introspective metric; ``None`` where the run has no uncertainty.
    """

    distance: float
    introspective_distance: float | None


class Model(Trained):
    """A loaded run, see ``load``; its attributes are those of ``Trained``."""

    def embed(self, images: Any, *, labels: Any = None) -> Index:
        """Embeds images.

        Args:
          images: path of an image, a folder or a list file; an image of Pillow; a numpy array ``[h, w]`` or
            ``[h, w, c]`` of any size, or a batch ``[n, h, w, c]``, c of 1, 3 (RGB) or 4 (RGB and alpha); or a list of
            such images. Arrays are uint8 or uint16, or else fractions from 0 (black) to 1 (white) or whole numbers from
            0 to 255. They are not normalised or resized beforehand: the model does this as in training.
          labels: class of each image, a name or a whole number; by default those of a folder or list file.

        Returns:
          An index, with a row per image: ``semantic`` [n, d], ``uncertainty`` [n, k] or ``None``, ``files`` [n].
          Unreadable images of a folder or list file are left out, each with a line on standard error.

        Raises:
          UserError: for what is no image, naming it.
        """
        source, labelled, single, origin = images_of(images, labels)
        fitting = (size for size in _SMALL_BATCHES if len(source) <= size * self.mesh.size < self.embedder.batch_size)
        model = self.using(batch_size=next(fitting, 0) * self.mesh.size)
        about = embedding.about_of(self, origin)  # of this model, which keeps the digest
        if single:
            values = [rows.values for rows in model.embedder.rows(source, on_bad="raise")]
            whole = {name: np.concatenate([part[name] for part in values]) for name in values[0]}
            records = np.arange(len(source))
            names = [source.name(record) for record in records.tolist()]
            embedding.check_finite(whole, names, str(self.workdir))
            embedded = embedded_rows(source, records, whole)
        else:
            embedded, records = embedding.embed_all(model, source)
            names = [source.name(int(record)) for record in records]
        classes = list(source.class_names) if labelled else None
        return Index(embedded, np.asarray(names), classes, about, **embedding.index_columns(source, records))

    def search(
        self, queries: Any, index: Any, k: int = 10, *, held_out: Any = None, distractors: Any = None
    ) -> list[Answer]:
        """Finds the k images of an index nearest to each query, exactly; an image does not find itself.

        Args:
          queries: images as for ``embed``, an index, or a file of embeddings.
          index: the same, to search.
          k: number of neighbours; fewer if the index has no more.
          held_out: images in classes unseen in training, as for ``embed``, or an index or file of such: the probability
            is fitted on them. By default it is fitted on the index, if that has at least two classes.
          distractors: the same, of other classes, best the training images: the held-out images search them, too.

        Returns:
          An answer per query.

        Raises:
          UserError: for what cannot be embedded or compared.
        """
        found, searched = self._index(queries), self._index(index)
        known, others = (None if x is None else self._index(x) for x in (held_out, distractors))
        return answers(found, searched, k, held_out=known, distractors=others)

    def compare(self, a: Any, b: Any) -> Comparison:
        """Semantic and introspective distance of two images, each given as for ``embed`` or as an index of one row."""
        one, two = self._one(a, "the first"), self._one(b, "the second")
        check_comparable(one, two, "the first image", "the second")
        metric = self.metric.for_ranking()
        distance = float(Metric("plain").distance(one.embedded.embedding, two.embedded.embedding)[0, 0])
        if one.uncertainty is None or two.uncertainty is None:
            return Comparison(distance, None)
        return Comparison(distance, float(metric.distance(one.embedded.embedding, two.embedded.embedding)[0, 0]))

    def _one(self, image: Any, name: str) -> Index:
        index = self._index(image)
        if len(index) != 1:
            raise UserError(f"compare: {name} is {len(index):,} images; it takes two single images (search takes many)")
        return index

    def _index(self, images: Any) -> Index:
        """Embeddings from an index, a file of them, or images."""
        if isinstance(images, Index):
            found = images
        elif _is_file_of_embeddings(images):
            found = read_stored(images, "index")
        else:
            return self.embed(images)
        known = found.about.get("weights")
        if known is not None and known != self.embedder.digest:
            raise UserError(
                f"{found} was made with the weights {known}, and {self.workdir} has {self.embedder.digest}: vectors of "
                "two networks cannot be compared; embed the images again"
            )
        return found


def _is_file_of_embeddings(value: Any) -> bool:
    return isinstance(value, str | Path) and searching.is_stored(value)


# Of an index and the names of its scores: fitting it means a search of the index by itself.
_fitted: "weakref.WeakKeyDictionary[Index, dict[frozenset[str], Calibration]]" = weakref.WeakKeyDictionary()


def _calibrated(
    known: Index, index: Index, names: frozenset[str], distractors: Index | None = None
) -> Calibration | None:
    """The confidence of answers, fitted on images of known classes; ``None`` if there are fewer than two classes."""
    if known.class_names is None or len(np.unique(known.embedded.labels)) < 2:
        return None
    if known is not index:
        warn_of_training_images(known, "held_out")
        return sureness.fit(known, index, names, Wanted(), distractors)
    fits = _fitted.setdefault(index, {})
    if names not in fits:
        warn_of_training_images(index, "the index")
        fits[names] = sureness.fit(index, index, names, Wanted())
    return fits[names]


def answers(
    queries: Index, index: Index, k: int = 10, *, held_out: Index | None = None, distractors: Index | None = None
) -> list[Answer]:
    """Finds the k rows of an index nearest to each row of another; see ``Model.search``."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UserError(f"k = {k!r} must be a whole number of at least 1")
    check_comparable(queries, index, "the queries", "the index")
    if held_out is not None:
        check_comparable(held_out, index, "held_out", "the index")
        if held_out.class_names is None or len(np.unique(held_out.embedded.labels)) < 2:
            raise UserError("held_out has no two known classes; give class folders, or labels to embed")
        warn_of_shared(held_out, "held_out", queries, "queries")
    if distractors is not None:
        check_comparable(distractors, index, "distractors", "the index")
        if held_out is None or distractors.class_names is None:
            raise UserError("distractors need held_out beside them, and known classes")
    own = np.arange(len(index)) if queries is index else own_rows(queries, index)
    count = min(int(k), len(index) - (own is not None))
    if count < 1:
        raise UserError("the index holds nothing but the query")
    known = index if held_out is None else held_out
    confident = lambda names: Confidence(_calibrated(known, index, frozenset(names), distractors), "")
    scores, setting, confidence = sureness.scored(queries, index, own, confident)
    found = searching.search(
        queries.embedded,
        index.embedded,
        count,
        own=own,
        metric=index.metric,
        calibrated=confidence.calibrated,
        scores=scores,
        rule=sureness.rule_for(confidence, scores, Wanted()),
        setting=setting,
    )
    return [
        Answer(
            queries.name_of(query),
            [_near(index, found, query, place) for place in range(count)],
            None if found.sure is None else float(found.sure[query]),
            None if found.uncertainty is None else float(found.uncertainty[query]),
            None if found.known is None else float(found.known[query]),
        )
        for query in range(len(queries))
    ]


def _near(index: Index, found: searching.Answers, query: int, place: int) -> Near:
    row = int(found.index[query, place])
    introspective = None if found.introspective is None else float(found.introspective[query, place])
    distance, told = float(found.distance[query, place]), (index.classes_of(row), index.box_of(row))
    return Near(str(index.files[row]), index.class_of(row), distance, introspective, row, *told)


def load(workdir: str | Path, devices: Sequence[jax.Device] | None = None) -> Model:
    """Loads the best checkpoint of a run, to embed, search and compare images with it.

    Args:
      workdir: folder of the run.
      devices: devices to embed on; by default all of this process.

    Returns:
      Network, weights and test transform, with ``embed``, ``search`` and ``compare``.

    Raises:
      UserError: if there is no run or checkpoint, or the checkpoint has another architecture.
    """
    return Model(*trained.load(workdir, devices))


def embed(model: Trained | str | Path, images: Any, *, labels: Any = None) -> Index:
    """Embeds images with a run, loaded or given by its folder; see ``Model.embed``."""
    return _model(model).embed(images, labels=labels)


def search(
    queries: Any,
    index: Any,
    k: int = 10,
    *,
    model: Trained | str | Path | None = None,
    held_out: Any = None,
    distractors: Any = None,
) -> list[Answer]:
    """Finds the images of an index nearest to each query; see ``Model.search``.

    Args:
      queries: images as for ``embed``, an index, or a file of embeddings.
      index: an index or a file of embeddings; with ``model`` also images.
      k: number of neighbours; fewer if the index has no more.
      model: a run, loaded or given by its folder; by default the one that the index names.
      held_out: as for ``Model.search``.
      distractors: as for ``Model.search``.
    """
    if model is not None:
        return _model(model).search(queries, index, k, held_out=held_out, distractors=distractors)
    if _is_file_of_embeddings(index):
        index = read_stored(index, "index")
    if not isinstance(index, Index):
        raise UserError("search: the index is neither an index nor a file of embeddings; images need model=, the run")
    others = [read_stored(x, "queries") if _is_file_of_embeddings(x) else x for x in (queries, held_out, distractors)]
    if any(not isinstance(x, Index) and x is not None for x in others):
        loaded = Model(*searching.load_model(index, "", warn))
        others = [None if x is None else loaded._index(x) for x in others]
    found, known, more = others
    if found is None:
        raise UserError("search: the queries are None")
    return answers(found, index, k, held_out=known, distractors=more)


def _model(model: Trained | str | Path) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(model, Trained):
        return Model(*model)
    if not isinstance(model, str | Path):
        raise UserError(f"the model is {type(model).__name__}; give a loaded run (idml_jax.load) or its folder")
    return load(model)
