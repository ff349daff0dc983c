"""Fits a risk head to a finished run: from cached features of its training images, by order, on folds of classes.

For every fold of training classes a semantic head in closed form is made from the other folds' features, so that the
fold's classes are new to it, and every picture of the fold searches all training images with it. How close its nearest
wrong image comes, less its nearest right one, is the loss whose order the risk head learns. The head that is kept has
seen all folds; for how many epochs is chosen on folds that it has not seen.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from idml_jax.data.images.transforms import SometimesChanged
from idml_jax.data.sources import sets_of
from idml_jax.errors import UserError, quiet_libraries
from idml_jax.losses.auxiliary import order_loss
from idml_jax.metrics import relevance
from idml_jax.metrics.class_folds import fold_classes
from idml_jax.metrics.closed_form import ClosedForm, Moments, moments, statistics
from idml_jax.metrics.embedded import scores_of
from idml_jax.metrics.uncertainty import nearest_twenty, r_auroc
from idml_jax.metrics.vote import Vote
from idml_jax.models import risk_head
from idml_jax.models.risk_head import RiskHead
from idml_jax.runtime.files import atomic, first_line, user_path, without_nan, write_json
from idml_jax.training import data_record
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import Run, build
from idml_jax.training.digests import weights_digest
from idml_jax.training.features import FeatureEmbedder, Features, features_of, jit_risk_of, view_embedder
from idml_jax.training.semantic_init import FOLDER, evaluated_features, network_of
from idml_jax.training.tasks.metrics_of_run import metric_of

logger = logging.getLogger("idml_jax")

FILE, RESULT = "risk.npz", "risk.json"
_BLOCK = 1024  # pictures that search at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a risk head is fitted.

    Attributes:
      crops: pictures of each training image by the training transform.
      corrupted: pictures of each training image that are cropped, blurred, noised or occluded.
      folds: folds of training classes, each left out once.
      epochs: most passes over the pictures; the best number is chosen on folds that are left out.
      batch_size: pictures in a step.
      learning_rate: of AdamW.
      gap: least difference of two risks in the right order.
      shrinkage: of the closed forms that the folds search with.
      seed: of the folds, weights and order; the pictures depend on the run's seed.
    """

    crops: int = 1
    corrupted: int = 1
    folds: int = 4
    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    gap: float = 0.1
    shrinkage: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"crops": 0, "corrupted": 0, "folds": 2, "epochs": 1, "batch_size": 2, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"{name} = {getattr(self, name)} must be at least {low}")
        for name in ("learning_rate", "gap", "shrinkage"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {getattr(self, name)} must be above 0 and finite")


class Pictures(NamedTuple):
    """What a head learns from.

    Attributes:
      features: ``[n, f]`` of all pictures, the views one after the other, the test transform's first.
      losses: ``[n]``, above 0 if the nearest image is of another class; NaN without one of the class.
      folds: ``[n]`` fold of the picture's class.
    """

    features: Float[np.ndarray, "n f"]
    losses: Float[np.ndarray, "n"]
    folds: Int[np.ndarray, "n"]

    def of(self, chosen: np.ndarray) -> "Pictures":
        """Some pictures."""
        return Pictures(self.features[chosen], self.losses[chosen], self.folds[chosen])


def answer_losses(
    queries: Float[np.ndarray, "q d"],
    gallery: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
    rows: Int[np.ndarray, "q"],
) -> Float[np.ndarray, "q"]:
    """Similarity of the nearest image of another class less that of the nearest one of the query's class.

    Args:
      queries: ``[q, d]`` unit embeddings of pictures.
      gallery: ``[m, d]`` unit embeddings of the images.
      labels: ``[m]`` of the images.
      rows: ``[q]`` image that each picture shows, which it leaves out.

    Returns:
      ``[q]``, above 0 for a wrong answer; NaN without another image of the class.
    """
    found = np.empty(len(queries))
    for start in range(0, len(queries), _BLOCK):
        some = slice(start, start + _BLOCK)
        similar = queries[some] @ gallery.T
        same = labels[rows[some]][:, None] == labels[None, :]
        right = same.copy()
        right[np.arange(len(similar)), rows[some]] = False
        best = np.where(right, similar, -np.inf).max(axis=1)
        wrong = np.where(same, -np.inf, similar).max(axis=1)
        known = np.isfinite(best) & np.isfinite(wrong)
        found[some] = np.subtract(wrong, best, where=known, out=np.full(len(best), np.nan))
    return found


def cross_fitted_losses(
    views: list[Features], num_classes: int, width: int, settings: Settings
) -> tuple[Float[np.ndarray, "v n"], Int[np.ndarray, "n"]]:
    """The losses of all views of all images, each with a head that has not seen the image's class, and the folds.

    Args:
      views: features, the test transform's first.
      num_classes: number of training classes.
      width: of the embeddings.
      settings: how many folds, and the shrinkage.
    """
    plain = views[0]
    fold_of = fold_classes(np.bincount(plain.labels, minlength=num_classes), settings.folds, settings.seed)
    if fold_of.max() < 1:
        raise UserError(f"{num_classes} training classes are too few for folds: a risk head needs at least 4")
    sums: Moments = moments(plain, num_classes, fold_of)
    folds, everyone = fold_of[plain.labels], np.arange(len(plain))
    losses = np.full((len(views), len(plain)), np.nan)
    for fold in range(int(fold_of.max()) + 1):
        form = ClosedForm(statistics(sums, np.arange(len(sums.scatter)) != fold))
        embed = form.whiten(settings.shrinkage, width)
        gallery, rows = embed(plain.rows(everyone)), np.flatnonzero(folds == fold)
        for number, view in enumerate(views):
            losses[number, rows] = answer_losses(embed(view.rows(rows)), gallery, plain.labels, rows)
    return losses, folds


@partial(jax.jit, static_argnames=("settings",))
def _epoch(head: RiskHead, state: Any, features: Array, losses: Array, order: Array, *, settings: Settings) -> Any:
    """One pass over the pictures in an order of batches ``[b, batch]``."""
    rule = optax.adamw(settings.learning_rate)

    def loss(layers: Any, rows: Array) -> Array:
        return order_loss(risk_head.risk_of(head._replace(layers=layers), features[rows]), losses[rows], settings.gap)

    def step(carry: Any, rows: Array) -> Any:
        layers, state = carry
        updates, state = rule.update(jax.grad(loss)(layers, rows), state, layers)
        return (optax.apply_updates(layers, updates), state), None

    (layers, state), _ = jax.lax.scan(step, (head.layers, state), order)
    return head._replace(layers=layers), state


def trained(pictures: Pictures, settings: Settings, epochs: int, seed: int) -> "list[RiskHead]":
    """The head after each epoch.

    Args:
      pictures: to learn from; those with NaN are left out.
      settings: of the optimizer.
      epochs: number of passes.
      seed: of weights and order.
    """
    pictures = pictures.of(np.isfinite(pictures.losses))
    count, batch = len(pictures.losses), min(settings.batch_size, len(pictures.losses))
    mean, scale = pictures.features.mean(axis=0), pictures.features.std(axis=0)
    head = risk_head.init(jax.random.key(seed), jnp.asarray(mean), jnp.asarray(scale))
    state = optax.adamw(settings.learning_rate).init(head.layers)
    features, losses = jnp.asarray(pictures.features), jnp.asarray(pictures.losses, jnp.float32)
    rng, heads = np.random.Generator(np.random.PCG64(seed)), []
    for _ in range(epochs):
        order = rng.permutation(count)[: count // batch * batch].reshape(-1, batch)
        head, state = _epoch(head, state, features, losses, order, settings=settings)
        heads.append(head)
    return heads


def risks(head: RiskHead, features: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n"]:
    """The risk of each image, on the host."""
    return np.asarray(jit_risk_of(head, jnp.asarray(features)))


def fit_head(pictures: Pictures, images: int, settings: Settings) -> tuple[RiskHead, dict[str, Any]]:
    """The head fitted on all folds, and how it did on folds that were left out.

    Args:
      pictures: of all folds; the first ``images`` are those of the test transform.
      images: number of training images.
      settings: how to fit.

    Returns:
      The head; and ``epochs``, and by epoch the mean AUROC for wrong answers on left-out folds, of pictures of the test
      transform (``clean``) and of all (``all``); ``None`` where no fold has both right and wrong answers.
    """
    known = np.isfinite(pictures.losses)
    clean = np.arange(len(known)) < images
    scores: dict[str, list[list[float]]] = {"clean": [], "all": []}
    for fold in np.unique(pictures.folds):
        inside = pictures.folds == fold
        heads = trained(pictures.of(~inside), settings, settings.epochs, settings.seed)
        for name, rows in {"clean": inside & known & clean, "all": inside & known}.items():
            some = pictures.of(rows)
            scores[name].append([r_auroc(risks(head, some.features), some.losses <= 0) for head in heads])
    means = {name: _mean_of_known(values) for name, values in scores.items()}
    chosen_by = means["clean"] if np.isfinite(means["clean"]).any() else means["all"]
    epochs = int(np.nanargmax(chosen_by)) + 1 if np.isfinite(chosen_by).any() else settings.epochs
    head = trained(pictures, settings, epochs, settings.seed)[-1]
    return head, {"epochs": epochs, **{f"held_out/{name}": values.tolist() for name, values in means.items()}}


def _mean_of_known(values: list[list[float]]) -> Float[np.ndarray, "epochs"]:
    """Means over folds without NaN; NaN where all are."""
    table = np.asarray(values)
    known = np.isfinite(table)
    return np.where(known.any(axis=0), np.where(known, table, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


def pictures_of(run: Run, variables: Any, workdir: Path, settings: Settings) -> tuple[Pictures, int]:
    """The pictures of the training images, from features kept as ``idml_jax.fit`` does, and the number of images."""
    embedder, train, config = run.evaluation(variables).embedder, run.splits.train, run.config
    views = {"train": embedder}
    for number in range(1, settings.crops + 1):
        views[f"train_view{number}"] = view_embedder(embedder, run.train_transform, config.seed, number)
    changed = SometimesChanged(run.test_transform, 1.0)
    for number in range(1, settings.corrupted + 1):
        views[f"train_corrupted{number}"] = view_embedder(embedder, changed, config.seed, number)
    features = [features_of(one, network_of(config), train, workdir / FOLDER / name) for name, one in views.items()]
    classes, width = len(train.class_names), min(config.model.embedding_dim, features[0].width)
    losses, folds = cross_fitted_losses(features, classes, width, settings)
    everyone = np.arange(len(train))
    rows = np.concatenate([view.rows(everyone) for view in features])
    return Pictures(rows, losses.reshape(-1), np.tile(folds, len(features))), len(train)


def measured(run: Run, variables: Any, workdir: Path, head: RiskHead) -> dict[str, float]:
    """R@1 of the evaluation images, and the AUROC for wrong answers of every score and of the feature's norm.

    Without scores by votes, if the run has held-out classes.
    """
    evaluation, config = run.evaluation(variables), run.config
    known = evaluated_features(evaluation, workdir, held_out=False)
    embedder = FeatureEmbedder.over(dataclasses.replace(evaluation.embedder, risk=head), tuple(known))
    queries = embedder(evaluation.source)
    gallery = None if evaluation.gallery is None else embedder(evaluation.gallery)
    searched = queries if gallery is None else gallery
    own = relevance.own_rows(queries, gallery)
    found = nearest_twenty(queries.semantic, None if gallery is None else gallery.semantic, own=own)
    correct = relevance.relevant(queries, searched, found.index[:, 0])
    # Scores by votes depend on held-out classes, on which the evaluation chooses the vote.
    vote = Vote() if run.splits.validation is None else None
    scores = scores_of(queries, gallery, metric_of(config), own, found, setting=vote)
    scores["feature_norm"] = np.linalg.norm(known[0][1].rows(np.arange(len(queries.labels))), axis=1)
    report = {f"R-AUROC({name})": r_auroc(score, correct) for name, score in scores.items()}
    # A short feature is uncertain.
    report["R-AUROC(feature_norm)"] = 1.0 - report["R-AUROC(feature_norm)"]
    return {"queries": float(len(correct)), "R@1": float(correct.mean()), **report}


def restored(workdir: Path) -> tuple[Run, Any, int]:
    """A run with the variables of its best checkpoint, and the checkpoint's step."""
    config = workdir_lib.read(workdir)
    with workdir_lib.finding_images(config, workdir):
        run = build(config)
    if run.config.task != "retrieval":
        raise UserError(f"{workdir} is a classifier; a risk head is for task retrieval, a classifier has its softmax")
    if sets_of(run.splits.train) is not None:
        raise UserError(f"{workdir}: its images have several labels each; a risk head is fitted on folds of classes")
    for line in data_record.check(run.splits, workdir):
        logger.warning("warning: %s: %s", workdir, line)
    state, step = run.best_state(workdir)
    return run, state.variables, step


def fit_risk(workdir: str | Path, settings: Settings = Settings(), *, overwrite: bool = False) -> dict[str, Any]:
    """Fits a risk head to a finished run and stores it in the run's folder, where embedding and search find it.

    Features are computed once and kept in ``RUN/features``; a stopped call goes on from those that are done.

    Args:
      workdir: folder of the run.
      settings: how to fit.
      overwrite: replaces an existing risk head.

    Returns:
      The content of ``RUN/risk.json``: what was chosen on left-out folds, and on the evaluation images ``R@1`` and
      ``R-AUROC`` of the risk and of every other score.

    Raises:
      UserError: for a folder without a run of task retrieval, too few classes, or an existing head.
    """
    workdir = user_path(workdir)
    if (workdir / FILE).exists() and not overwrite:
        raise UserError(f"{workdir / FILE} already exists; --overwrite replaces it")
    if jax.process_count() > 1:
        raise UserError("a risk head is fitted by one process; start a single one")
    with quiet_libraries():
        run, variables, step = restored(workdir)
        pictures, images = pictures_of(run, variables, workdir, settings)
        logger.info("%d pictures of %d training images; fitting", len(pictures.losses), images)
        head, about = fit_head(pictures, images, settings)
        about |= {"wrong_answers": float(np.mean(pictures.losses > 0)), "settings": dataclasses.asdict(settings)}
        about |= {"step": step, "evaluation": measured(run, variables, workdir, head)}
    save(head, workdir, weights_digest(variables))
    about = without_nan(about)
    write_json(workdir / RESULT, about)
    return about


def save(head: RiskHead, workdir: Path, weights: str) -> None:
    """Writes ``RUN/risk.npz``, completely or not at all."""
    arrays: dict[str, Any] = {"mean": head.mean, "scale": head.scale, "about": json.dumps({"weights": weights})}
    for number, (kernel, bias) in enumerate(head.layers):
        arrays |= {f"kernel{number}": kernel, f"bias{number}": bias}
    with atomic(workdir / FILE) as file:
        np.savez(file, **cast(Any, {name: np.asarray(value) for name, value in arrays.items()}))


def digest(head: RiskHead) -> str:
    """16 hexadecimal digits that change with any number of a head."""
    found = hashlib.sha256()
    for value in jax.tree.leaves(head):
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def load(workdir: Path, weights: str) -> RiskHead | None:
    """The risk head of a run; ``None`` if it has none, and, with a warning, if it is of other weights.

    Args:
      workdir: folder of the run.
      weights: digest of the weights in use.

    Raises:
      UserError: if the file is damaged.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, np.ndarray] = {name: file[name] for name in file.files}
        layers = tuple((jnp.asarray(arrays[f"kernel{i}"]), jnp.asarray(arrays[f"bias{i}"])) for i in range(3))
        fitted_on = json.loads(str(arrays["about"]))["weights"]
        head = RiskHead(jnp.asarray(arrays["mean"]), jnp.asarray(arrays["scale"]), layers)
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise UserError(
            f"{path}: is damaged ({first_line(error)}); python -m idml_jax.risk --overwrite makes it again"
        ) from error
    if fitted_on != weights:
        logger.warning(
            "warning: %s was fitted on other weights of this run and is not used; python -m idml_jax.risk --overwrite "
            "fits it again",
            path,
        )
        return None
    return head
