"""The semantic head in closed form, from the features of the training images.

``idml_jax.fit`` makes a run of it; with ``model.semantic_init=whiten`` training starts from it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.metrics.class_folds import Candidate, best_of, fold_classes, held_out_scores
from idml_jax.metrics.closed_form import ClosedForm, Projection, moments, statistics
from idml_jax.runtime import hosts, sharding
from idml_jax.training.build import Run
from idml_jax.training.config import default_config
from idml_jax.training.features import Features, Views, features_of, view_embedder
from idml_jax.training.state import TrainState
from idml_jax.training.tasks import Evaluation
from idml_jax.training.tasks.terms import proxy_sets

logger = logging.getLogger("idml_jax")

FOLDER = "features"
ZERO_SHOT, RANDOM = Candidate("zero_shot"), Candidate("random")
PROXY_LENGTH = 3.0  # proxies per mean of a class's unit embeddings
Scores = dict[Candidate, dict[str, float]]


class Chosen(NamedTuple):
    """Closed forms of the training classes, and how they did on held-out ones.

    Attributes:
      form: fitted to all training classes.
      best: the best candidate of each method.
      scores: R@1 and MAP@R of every candidate on held-out training classes; empty if none could be held out.
      folds: number of folds of classes.
      lone: number of classes with one image.
    """

    form: ClosedForm
    best: dict[str, Candidate]
    scores: Scores
    folds: int
    lone: int

    def projection(self, method: str) -> Projection:
        """The best projection of a method."""
        return self.form.project(*self.best[method])

    def about(self, config: ConfigDict, method: str) -> dict[str, Any]:
        """What was chosen and how, for the record of a run."""
        best, fit = self.best[method], config.fit
        tried = [
            {"method": c.method, "shrinkage": c.shrinkage, "width": c.width, **found}
            for c, found in self.scores.items()
            if c.method == method
        ]
        return {
            "method": method,
            "shrinkage": best.shrinkage,
            "width": best.width,
            "lone_classes": self.lone,
            "folds": self.folds,
            "select": fit.select,
            "views": fit.views,
            "unit": fit.unit,
            "tried": tried,
        }


def network_of(config: ConfigDict) -> str:
    """The network and its settings that a feature depends on, besides weights and transform."""
    model = config.model
    return f"{model.name}, {model.pooling}, {model.dtype}"


def training_features(run: Run, variables: Any, workdir: Path, check: Callable[[], None]) -> Views:
    """The features of the training images under the test transform and, for further views, the training transform.

    Args:
      run: parts of the run.
      variables: variables of the model, on the mesh.
      workdir: folder of the run.
      check: called before every batch; may raise to stop.
    """
    config, source = run.config, run.splits.train
    embedder = run.evaluation(variables, check).embedder
    views = []
    for view in range(config.fit.views):
        folder = workdir / FOLDER / ("train" if view == 0 else f"train_view{view}")
        one = view_embedder(embedder, run.train_transform, config.seed, view)
        views.append(features_of(one, network_of(config), source, folder))
    return Views(tuple(views))


def evaluated_features(
    evaluation: Evaluation, workdir: Path, *, held_out: bool = True
) -> list[tuple[Source, Features]]:
    """The features of the images that an evaluation embeds, kept in the run's folder.

    Args:
      evaluation: network and images.
      workdir: folder of the run.
      held_out: whether those of held-out classes, too.

    Returns:
      The queries first, then the gallery and the held-out images, if there are such.
    """
    config = evaluation.config
    parts = {config.eval.split: evaluation.source, "gallery": evaluation.gallery}
    if held_out and evaluation.held_out is not None:
        parts["validation"] = evaluation.held_out
    return [
        (source, features_of(evaluation.embedder, network_of(config), source, workdir / FOLDER / name))
        for name, source in parts.items()
        if source is not None
    ]


def choose(
    config: ConfigDict,
    views: Views,
    num_classes: int,
    methods: Sequence[str],
    shrinkages: Sequence[float],
    fixed: Mapping[str, Projection] | None = None,
    *,
    always: bool = False,
) -> Chosen:
    """Chooses shrinkage and width of each method on folds of held-out training classes.

    Args:
      config: settings of the run.
      views: features of the training images.
      num_classes: number of training classes.
      methods: keys of ``closed_form.METHODS``.
      shrinkages: lambdas to choose from; with one (and one width) nothing is chosen.
      fixed: projections that learn nothing, to be measured beside them.
      always: whether to measure also where there is nothing to choose.

    Raises:
      UserError: for features from which nothing can be learned.
    """
    fit, labels = config.fit, views.plain.labels
    counts = np.bincount(labels, minlength=num_classes)
    widths = tuple(fit.widths) or (config.model.embedding_dim,)
    grid = [(float(shrinkage), width) for width in widths for shrinkage in shrinkages]
    fold_of = fold_classes(counts, fit.folds if len(grid) > 1 or always else 1, config.seed)
    folds = int(fold_of.max()) + 1
    scores: Scores = {}
    try:
        sums = moments(views, num_classes, fold_of, unit=fit.unit)
        found = statistics(sums)
        if folds > 1:
            tried = [Candidate(method, *setting) for method in methods for setting in grid]
            beside = [ZERO_SHOT, RANDOM] if fixed else [ZERO_SHOT]
            scores = held_out_scores(
                sums, labels, views.plain.rows, [*beside, *tried], centre=not fit.unit, fixed=fixed
            )
    except ValueError as error:
        raise UserError(f"the closed form of the training images: {error}") from error
    if scores:
        best = {method: best_of(scores, method, fit.select) for method in methods}
    else:
        best = {method: Candidate(method, *grid[len(grid) // 2]) for method in methods}
        if len(grid) > 1:
            logger.warning(
                "warning: %d training classes are too few to hold some out, so config.fit.shrinkage is %g, not chosen",
                num_classes,
                grid[len(grid) // 2][0],
            )
    if found.lone:
        logger.info("%d training classes have one image: they count in the mean, not within classes", found.lone)
    return Chosen(ClosedForm(found, centre=not fit.unit), best, scores, folds, found.lone)


def class_means(views: Views, projection: Projection, num_classes: int) -> Float[np.ndarray, "c d"]:
    """The mean unit embedding of each class."""
    sums, counts = np.zeros((num_classes, projection.kernel.shape[1])), np.zeros(num_classes)
    for rows, labels in views:
        np.add.at(sums, labels, projection(np.asarray(rows)))
        counts += np.bincount(labels, minlength=num_classes)
    return sums / np.maximum(counts, 1)[:, None]


def head_arrays(
    projection: Projection, means: Float[np.ndarray, "c d"], like: Float[np.ndarray, "f d"]
) -> dict[str, np.ndarray]:
    """Kernel and bias of the semantic head, and the proxies, in float32.

    The embedding does not depend on the kernel's scale. It gets the deviation of a random kernel, which the learning
    rates are made for.

    Args:
      projection: the closed form.
      means: mean unit embedding of each class.
      like: a random kernel of the head.
    """
    factor = float(like.std()) / float(projection.kernel[:, : projection.used].std())
    values = {"kernel": projection.kernel * factor, "bias": projection.bias * factor, "proxies": PROXY_LENGTH * means}
    return {name: value.astype(np.float32) for name, value in values.items()}


def proxy_rows(
    means: Float[np.ndarray, "c d"], fresh: Float[np.ndarray, "rows kd"], alone: int | None = None
) -> Float[np.ndarray, "rows kd"]:
    """The table of proxies with those of each class at its mean; if they are split, the last rows are padding.

    Several proxies of a class are moved a tenth of the mean's length apart, each in the direction of its ``fresh`` one:
    equal proxies would get equal gradients for ever. Of a sum of losses the proxy with the index ``alone`` is that of
    the losses with a single one, and stays at the mean.
    """
    rows, (classes, width) = np.zeros(fresh.shape, np.float32), means.shape
    centres = fresh.shape[1] // width
    if centres == 1:
        rows[:classes] = means
        return rows
    apart = fresh[:classes].reshape(classes, centres, width)
    apart = apart / np.maximum(np.linalg.norm(apart, axis=2, keepdims=True), 1e-12)
    length = np.linalg.norm(means, axis=1)[:, None, None]
    if alone is not None:
        apart[:, alone] = 0.0
    rows[:classes] = (means[:, None, :] + 0.1 * length * apart).reshape(classes, -1)
    return rows


def with_head(run: Run, state: TrainState, arrays: Mapping[str, np.ndarray], shorter: float = 1.0) -> TrainState:
    """The state with the semantic head of ``head_arrays`` and, if the loss has proxies, with these.

    Args:
      run: parts of the run.
      state: fresh state.
      arrays: see ``head_arrays``.
      shorter: factor on the last weights of the uncertainty head. Only its last layer has that name, and the head
        ``scalar``, whose length does not follow its weights, has none.
    """
    params = dict(state.params)
    heads = {**params["heads"], "semantic": {"kernel": arrays["kernel"], "bias": arrays["bias"]}}
    if "uncertainty" in heads:
        heads["uncertainty"] = {**heads["uncertainty"], "kernel": shorter * heads["uncertainty"]["kernel"]}
    params["heads"] = heads
    if "proxies" in params:
        alone = proxy_sets(getattr(run.setup.objective, "parts", ())).get(1)
        params["proxies"] = proxy_rows(arrays["proxies"], sharding.to_host(params["proxies"]), alone)
    state = state.replace(params=params)
    return run.place(state.averaging() if run.setup.ema else state)


def random_kernel(state: TrainState) -> Float[np.ndarray, "f d"]:
    """The kernel of the semantic head of a fresh state, on the host."""
    kernel: np.ndarray = sharding.to_host(state.params["heads"]["semantic"]["kernel"])
    return kernel


def start_whitened(
    run: Run, state: TrainState, workdir: Path, check: Callable[[], None]
) -> tuple[TrainState, dict[str, Any]]:
    """A fresh state whose semantic head whitens the features within classes, with proxies at the class means.

    Lambda is ``model.whitened_shrinkage``, not the best one for search: training goes further from a smaller one.

    The uncertainty starts short (``model.whitened_uncertainty``): a long random one makes pairs of different classes
    look alike, and the first steps would change the trunk to undo that, away from what the head was fitted to.

    Features are computed by all processes together; process 0 fits the head and sends it to the others.

    Args:
      run: parts of the run.
      state: fresh state, with pretrained weights if there are any.
      workdir: folder of the run, where features are kept.
      check: called before every batch; may raise to stop.

    Returns:
      The state, and what was chosen (empty on other processes than the first).

    Raises:
      UserError: see ``choose`` and ``features.features_of``.
    """
    config, classes = run.config, len(run.splits.train.class_names)
    views = training_features(run, state.latest, workdir, check)
    like, about = random_kernel(state), {}

    def make() -> dict[str, np.ndarray]:
        fixed, given = config.model.whitened_shrinkage, tuple(config.fit.shrinkage)
        if fixed and given != tuple(default_config().fit.shrinkage):
            logger.warning(
                "warning: config.fit.shrinkage = %s is not used: training starts from "
                "config.model.whitened_shrinkage = %g; with 0 it starts from the best of them",
                given,
                fixed,
            )
        chosen = choose(config, views, classes, ["whiten"], (fixed,) if fixed else given)
        projection = chosen.projection("whiten")
        about.update(chosen.about(config, "whiten"))
        _tell(chosen, projection, config)
        return head_arrays(projection, class_means(views, projection, classes), like)

    shapes = {"kernel": like, "bias": like[0], "proxies": np.zeros((classes, like.shape[1]), np.float32)}
    return with_head(run, state, hosts.from_first(make, shapes), config.model.whitened_uncertainty), about


def _tell(chosen: Chosen, projection: Projection, config: ConfigDict) -> None:
    """One line about the start, and one about columns that stay 0."""
    best = chosen.best["whiten"]
    found = ""
    if chosen.scores:
        text = lambda one: f"{100 * one['R@1']:.1f} / {100 * one['MAP@R']:.1f}"
        found = (
            f"; R@1 / MAP@R on held-out training classes {text(chosen.scores[best])}, "
            f"of the features {text(chosen.scores[ZERO_SHOT])}"
        )
    logger.info("semantic head: within-class whitening, lambda %g%s", best.shrinkage, found)
    tell_width(projection, config)


def tell_width(projection: Projection, config: ConfigDict) -> None:
    """Says if the embedding is wider than the features allow."""
    width = projection.kernel.shape[1]
    if projection.used < width:
        logger.warning(
            "warning: the closed form has %d of %d dimensions (config.model.embedding_dim); the others are 0 at first",
            projection.used,
            width,
        )
