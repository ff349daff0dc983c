"""Computes all metrics of embeddings from files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idml_jax.errors import UserError
from idml_jax.errors import warn as say
from idml_jax.inference import arrays as stored_arrays
from idml_jax.inference import reranking
from idml_jax.inference.gallery import is_gallery, read_gallery, read_stored
from idml_jax.inference.held_out import held_out_beside, warn_of_shared
from idml_jax.inference.index import Index, check_comparable, check_temperature, labels_in_common, sets_in_common
from idml_jax.inference.own import own_rows
from idml_jax.inference.reranking import Step
from idml_jax.inference.trained_on import warn_of_measured_training_images, warn_of_training_images
from idml_jax.ism import Metric
from idml_jax.metrics import full_ranking, relevance
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.summary import full_report
from idml_jax.training import data_record

_PRECISION = 0.9


class Options(NamedTuple):
    """How embeddings are evaluated.

    Attributes:
      ks: K of R@K.
      temperature: tau of the metric; ``None``: the file's.
      absolute: whether to use the absolute form of the metric; ``None``: the file's form.
      precision: share of right answers that the threshold is chosen for on held-out classes, above 0 and at most 1;
        ``None``: 0.9.
      cluster: whether to compute NMI, AMI and F1.
      seed: seed of clustering and bootstrap.
      ranked: whether to compute P@K and mAP over all ranks.
      exclude: array of the files; a query then does not find images of its class with the same value, and CMC@K is
        added. Empty: if the files have groups, these are excluded in all metrics. ``none``: no exclusion.
      worst: number of classes with the lowest R@1 to list.
      rerank: steps of re-ranking, whose metrics are added.
      distractors: file of other classes that held-out images search, too, or empty.
    """

    ks: tuple[int, ...] = (1, 2, 4, 8)
    temperature: float | None = None
    absolute: bool | None = None
    precision: float | None = None
    cluster: bool = True
    seed: int = 0
    ranked: bool = False
    exclude: str = ""
    worst: int = 0
    rerank: tuple[Step, ...] = ()
    distractors: str = ""


class ClassRow(NamedTuple):
    """A class of the queries, its R@1, and its number of queries."""

    name: str
    recall: float
    queries: int


class Measured(NamedTuple):
    """Metrics by name, warnings about the uncertainty, the number of queries, and the worst classes, if wanted."""

    report: dict[str, float]
    warnings: list[str]
    queries: int
    worst: list[ClassRow]

    def __repr__(self) -> str:
        first = next(iter(self.report.items()), ("no metric", float("nan")))
        more = f"{len(self.report):,} metrics in .report, {len(self.warnings)} .warnings"
        return f"Measured({self.queries:,} queries, {first[0]} {first[1]:.4f}; {more})"


def measure(
    embeddings: str,
    gallery: str = "",
    held_out: str = "",
    options: Options = Options(),  # noqa: B008 (immutable)
    warn: Callable[[str], None] = say,
) -> Measured:
    """Evaluates a file of embeddings.

    Args:
      embeddings: file of the queries, and of the gallery too if none is given.
      gallery: file that is searched, or empty.
      held_out: file of held-out classes, used to choose the answer threshold, or empty.
      options: evaluation options.
      warn: receives a line if settings or classes of the files do not agree; by default it is printed.

    Raises:
      UserError: naming the file and what is wrong with it, two files that cannot be compared, or an option that is out
        of range or has no effect without another.
    """
    _check_options(options, held_out)
    index = read_stored(embeddings, "--embeddings", labels=True)
    metric = _metric(options, index, warn)
    overridden = {"temperature": options.temperature, "relative": options.absolute}
    stored = [name for name, value in overridden.items() if value is None]

    def beside(path: str, option: str) -> Index | None:
        if not path:
            return None
        other = read_stored(path, option, labels=True)
        check_comparable(index, other, embeddings, path, stored)
        return other

    searched, others = beside(gallery, "--gallery"), beside(held_out, "--held_out")
    distractors = beside(options.distractors, "--distractors")
    if others is not None:
        warn_of_training_images(others, held_out)
        warn_of_shared(others, held_out, index, "measured images")
    if searched is None and (beside_them := _gallery_of_run(index)):
        warn(
            f"{embeddings}: the test images of this run search its {beside_them:,} gallery images; here they search "
            "each other (--gallery=FILE: those of embed --split=gallery)"
        )
    warn_of_measured_training_images(index, embeddings)
    index, searched = _without_own(*_by_marks(index, searched, warn), warn)
    if options.exclude:
        index, searched = _without_groups(index), None if searched is None else _without_groups(searched)
    elif index.embedded.groups is not None:
        warn(f"{embeddings}: no query finds images of its class and group, as it has groups (--exclude=none: it does)")
    queries, rows = index.embedded, None
    if searched is not None:
        own_labels, labels, named = labels_in_common(index, searched)
        queries, rows = queries._replace(labels=own_labels), searched.embedded._replace(labels=labels)
        if queries.sets is not None or rows.sets is not None:
            sets, others_sets = sets_in_common(index, searched)
            queries, rows = queries._replace(sets=sets), rows._replace(sets=others_sets)
        if not named:
            warn(f"{embeddings} or {gallery} does not name its classes; their numbers are compared")
        if own_labels is not None and not np.isin(own_labels, labels).any():
            warn(
                f"no class of {embeddings} is in {gallery}: all answers are wrong. Their first classes are "
                f"{_first_class(index)!a} and {_first_class(searched)!a}"
            )
    try:
        calibrating = None
        if others is not None:
            calibrating = held_out_beside(others, index if searched is None else searched, distractors)
        report, warnings = full_report(
            queries,
            rows,
            ks=options.ks,
            metric=metric,
            ambiguity=index.ambiguity,
            held_out=calibrating,
            precision=_PRECISION if options.precision is None else options.precision,
            cluster=options.cluster,
            seed=options.seed,
        )
        more, worst = _ranked(queries, rows, (index, searched), options)
        if options.rerank and relevance.is_special(queries, rows):
            raise UserError("--rerank: needs one label per image, no groups, and queries that are not in the gallery")
        if options.rerank:
            more |= reranking.report(options.rerank, queries, rows, options.ks)
    except ValueError as error:  # sets too small for a metric, and options out of range
        raise UserError(str(error)) from error
    report |= more
    warnings += _why_nan(report, options.exclude, queries.groups is not None)
    return Measured(report, warnings, len(queries.labels), worst)


def _check_options(options: Options, held_out: str) -> None:
    """Refuses shares and numbers out of range, and options of held-out classes where there are none."""
    if options.precision is not None and not 0 < options.precision <= 1:
        raise UserError(f"--precision={options.precision}: a share of right answers, above 0 and at most 1")
    if options.worst < 0:
        raise UserError(f"--worst={options.worst}: a number of classes, at least 0")
    if options.precision is not None and not held_out:
        raise UserError("--precision is for the threshold that is chosen on --held_out, which is not given")
    if options.distractors and not held_out:
        raise UserError("--distractors are for the images of --held_out, which is not given")


def _gallery_of_run(index: Index) -> int:
    """Number of images that the images of an index search in their run; 0: they search each other, or are others."""
    run = index.about.get("workdir")
    if index.about.get("images") != "split:test" or not run:
        return 0
    return data_record.sizes_of(Path(run)).get("gallery", 0)


def _first_class(index: Index) -> str:
    return index.class_of(0) or "unknown"


def _by_marks(index: Index, searched: Index | None, warn: Callable[[str], None]) -> tuple[Index, Index | None]:
    """Queries and gallery as the table marked them, unless a gallery is given."""
    if index.marked is None or searched is not None or not index.marked.any():
        return index, searched
    query, gallery = (np.flatnonzero(column) for column in index.marked.T)
    if not len(query) or not len(gallery):
        raise UserError(f"{index.path}: marks no images as {'queries' if not len(query) else 'the gallery'}")
    warn(f"{index.path}: {len(query):,} images marked as queries search {len(gallery):,} marked as the gallery")
    return index.take(query), index.take(gallery)


def _without_own(index: Index, searched: Index | None, warn: Callable[[str], None]) -> tuple[Index, Index | None]:
    """Marks the queries that are in the gallery, which do not find themselves."""
    own = None if searched is None else own_rows(index, searched)
    if searched is None or own is None:
        return index, searched
    if len(index) == len(searched) and np.array_equal(own, np.arange(len(searched))):
        warn(f"{searched.path}: holds the queries themselves; each searches all the others")
        return index, None
    warn(f"{int((own >= 0).sum()):,} of {len(index):,} queries are in the gallery; they do not find themselves")
    named = lambda side, ids: replace(side, embedded=side.embedded._replace(ids=ids))
    return named(index, np.where(own < 0, -1 - np.arange(len(own)), own)), named(searched, np.arange(len(searched)))


def _without_groups(index: Index) -> Index:
    return replace(index, embedded=index.embedded._replace(groups=None))


def _ranked(
    queries: Embedded, gallery: Embedded | None, files: tuple[Index, Index | None], options: Options
) -> tuple[dict[str, float], list[ClassRow]]:
    """Metrics of the whole ranking and the worst classes, where they are wanted."""
    exclude = options.exclude if options.exclude != "none" else ""
    if not (options.ranked or exclude or options.worst):
        return {}, []
    special = relevance.is_special(queries, gallery)
    if special and exclude:
        raise UserError("--exclude: needs one label per image and queries that are not in the gallery")
    groups = None
    if exclude:
        both = [None if file is None else _column(file, exclude) for file in files]
        assert both[0] is not None
        groups = full_ranking.Groups(both[0], both[1])
    searched = (None, None) if gallery is None else (gallery.semantic, gallery.labels)
    if special:
        found = relevance.rank(queries, gallery)
    else:
        found = full_ranking.rank_all(queries.semantic, queries.labels, *searched, groups=groups)
    wanted = options.ranked or exclude
    report = full_ranking.summarise(found, options.ks, cmc=groups is not None) if wanted else {}
    rows = {label: row for row, label in reversed(list(enumerate(queries.labels.tolist())))}
    worst = [
        ClassRow(files[0].class_of(rows[row.label]) or str(row.label), row.recall, row.queries)
        for row in full_ranking.class_recall(found)[: options.worst]
    ]
    return report, worst


def _why_nan(report: dict[str, float], exclude: str, grouped: bool) -> list[str]:
    """A line about the metrics of a report that are undefined as no query can find an image of its class, if any."""
    means = ("RP", "MAP@R", "mAP")
    names = [name for name, x in report.items() if (name in means or name.startswith("CMC@")) and np.isnan(x)]
    if not names:
        return []
    where = " in another group" if grouped else ""
    if exclude and not np.isnan(report["RP"]):
        where = f" with another value of {exclude} (--exclude)"
    return [f"{', '.join(names)}: undefined (nan), as no query has an image of its class{where} to find"]


def _column(index: Index, name: str) -> np.ndarray:
    """An array [n] of a file."""
    assert index.path is not None
    if is_gallery(index.path):
        gallery = read_gallery(index.path)
        names, size = list(gallery.columns), len(gallery)
        arrays = {name: np.concatenate([part[name] for _, part in gallery.batches((name,))])} if name in names else {}
    else:
        arrays, names = stored_arrays.read(index.path, {name, "labels"})
        size = len(index.files) if index.rows is None else len(arrays.get("labels", ()))
    if name not in arrays:
        raise UserError(f"{index.path}: holds no {name} (--exclude); it holds {', '.join(sorted(names))}")
    if arrays[name].shape != (size,):
        raise UserError(f"{index.path}: {name} has the shape {arrays[name].shape} (--exclude); expected ({size},)")
    return arrays[name] if index.rows is None else arrays[name][index.rows]


def _metric(options: Options, index: Index, warn: Callable[[str], None]) -> Metric:
    """The file's metric, with the given settings substituted."""
    stored, temperature, absolute = index.metric, options.temperature, options.absolute
    if temperature is not None and not check_temperature(temperature):
        raise UserError(f"--temperature={temperature}: must be above 0 and finite")
    if index.uncertainty is None and not (temperature is None and absolute is None):
        warn(f"{index.path}: holds no uncertainty, so --temperature and --absolute change nothing")
    form = stored.form if absolute is None else "absolute" if absolute else "relative"
    used = Metric(form, stored.temperature if temperature is None else temperature)
    for name, value in used.about().items():
        if name in index.about and value != index.about[name]:
            warn(f"{name} = {value} is used; the embeddings were made with {index.about[name]}")
    return used
