"""Computes all metrics of embeddings from files."""

from collections.abc import Callable
from typing import NamedTuple

from idml_jax.errors import UserError
from idml_jax.errors import warn as say
from idml_jax.inference.index import Index, check_comparable, check_temperature, labels_in_common, read
from idml_jax.ism import Metric
from idml_jax.metrics.summary import full_report


class Options(NamedTuple):
    """How embeddings are evaluated.

    Attributes:
      ks: K of R@K.
      temperature: tau of the metric; ``None``: the file's.
      absolute: whether to use the absolute form of the metric; ``None``: the file's form.
      precision: share of right answers that the threshold is chosen for.
      cluster: whether to compute NMI, AMI and F1.
      seed: seed of clustering and bootstrap.
    """

    ks: tuple[int, ...] = (1, 2, 4, 8)
    temperature: float | None = None
    absolute: bool | None = None
    precision: float = 0.9
    cluster: bool = True
    seed: int = 0


class Measured(NamedTuple):
    """Metrics by name, warnings about the uncertainty, and the number of queries."""

    report: dict[str, float]
    warnings: list[str]
    queries: int


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
      UserError: naming the file and what is wrong with it, or two files that cannot be compared.
    """
    index = read(embeddings, "--embeddings", labels=True)
    metric = _metric(options, index, warn)
    overridden = {"temperature": options.temperature, "relative": options.absolute}
    stored = [name for name, value in overridden.items() if value is None]

    def beside(path: str, option: str) -> Index | None:
        if not path:
            return None
        other = read(path, option, labels=True)
        check_comparable(index, other, embeddings, path, stored)
        return other

    searched, others = beside(gallery, "--gallery"), beside(held_out, "--held_out")
    queries, rows = index.embedded, None
    if searched is not None:
        own_labels, labels, named = labels_in_common(index, searched)
        queries, rows = queries._replace(labels=own_labels), searched.embedded._replace(labels=labels)
        if not named:
            warn(f"{embeddings} or {gallery} does not name its classes; their numbers are compared")
    try:
        report, warnings = full_report(
            queries,
            rows,
            ks=options.ks,
            metric=metric,
            ambiguity=index.ambiguity,
            held_out=None if others is None else others.embedded,
            precision=options.precision,
            cluster=options.cluster,
            seed=options.seed,
        )
    except ValueError as error:  # sets too small for a metric, and options out of range
        raise UserError(str(error)) from error
    return Measured(report, warnings, len(queries.labels))


def _metric(options: Options, index: Index, warn: Callable[[str], None]) -> Metric:
    """The file's metric, with the given settings substituted."""
    stored, temperature, absolute = index.metric, options.temperature, options.absolute
    if temperature is not None and not check_temperature(temperature):
        raise UserError(f"--temperature={temperature}: must be above 0 and finite")
    form = stored.form if absolute is None else "absolute" if absolute else "relative"
    used = Metric(form, stored.temperature if temperature is None else temperature)
    for name, value in used.about().items():
        if name in index.about and value != index.about[name]:
            warn(f"{name} = {value} is used; the embeddings were made with {index.about[name]}")
    return used
