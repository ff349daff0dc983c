"""A run whose semantic head is a closed form of the training images' features; nothing is trained by gradient."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from idml_jax.data.datasets import Splits
from idml_jax.data.sources import Source
from idml_jax.errors import UserError, quiet_libraries
from idml_jax.metrics import clustering
from idml_jax.metrics.closed_form import METHODS, Projection, unit_rows
from idml_jax.metrics.retrieval import retrieval_metrics
from idml_jax.runtime import hosts
from idml_jax.runtime.checkpoint import Checkpoints, has_checkpoints
from idml_jax.runtime.files import user_path, without_nan, write_json
from idml_jax.runtime.interrupt import Stopped, StopRequest
from idml_jax.runtime.trackers import check_installed
from idml_jax.runtime.writers import MetricWriter
from idml_jax.training import auto, data_record, together, train, weights
from idml_jax.training import semantic_init as heads
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import Run, build
from idml_jax.training.config import tracking_of
from idml_jax.training.digests import images_digest
from idml_jax.training.features import FeatureEmbedder, Features, Views
from idml_jax.training.state import TrainState
from idml_jax.training.tasks import Evaluation
from idml_jax.training.workdir import flatten

logger = logging.getLogger("idml_jax")

Known = tuple[Source, Features]

# Settings of a run in closed form; those that the user has set otherwise are named.
FIXED: dict[str, Any] = {
    "fit.only": True, "ism.enabled": False, "ism.ranking": 0.0, "ism.prior": 0.0, "model.uncertainty_head": "none",
    "ism.prior_by": "constant", "ism.negatives": "learn", "ism.attenuation": 0.0, "prism.share": 0.0,
    "model.semantic_init": "random", "model.init_parts": "trunk", "eval.ambiguity_images": 0,
}  # fmt: skip
NO_UNCERTAINTY = "none: a closed form does not learn one"
SHOWN = {"zero_shot": "zero-shot features", "random": "random projection", "pca": "whitening", "lda": "LDA",
         "whiten": "within-class whitening"}  # fmt: skip
# What a run has in its folder, besides the features.
FILES = (
    "config.json", "data.json", "metrics.jsonl", "result.json", "eval.json", "report.html", "checkpoints", "stopped",
    "damaged", "tensorboard", "broken_batch.json", "trackers.json", "wandb",
)  # fmt: skip


def fit(
    config: ConfigDict, workdir: str | Path, *, overwrite: bool = False, build: train.Build = build
) -> dict[str, Any]:
    """Makes a run whose semantic head is the metric in closed form, and evaluates it.

    The trunk keeps the weights of ``config.model.init_from``. Shrinkage and width are chosen on held-out training
    classes. Each image goes through the trunk once; its features stay in the workdir, so that a stopped or repeated
    call does not compute them again. The workdir is like that of any run, with one checkpoint, at step 0.

    Args:
      config: settings, see ``idml_jax.default_config``; the run has no uncertainty, whatever they say.
      workdir: folder of the run.
      overwrite: moves the files of another run in the folder into ``workdir/replaced``; otherwise it is refused.
      build: as for ``train.train_and_evaluate``.

    Returns:
      The content of ``result.json``: as that of a training run, and ``closed_form``, ``peers`` and ``uncertainty``.

    Raises:
      UserError: for settings or data that cannot work, and for a folder with another run.
      Stopped: on SIGTERM or SIGUSR1; the same call goes on from the features that are done.
    """
    workdir = user_path(workdir)
    with StopRequest() as stop, quiet_libraries():
        try:
            return _fit(config, workdir, overwrite, stop, build)
        except Stopped as stopped:
            raise Stopped(
                f"stopped by {stopped}; the features so far are in {workdir / heads.FOLDER}; rerun the same command to "
                "go on from there"
            ) from None


def settings_of(config: ConfigDict) -> ConfigDict:
    """The settings of a run in closed form; what the user asked for otherwise is logged."""
    if config.task != "retrieval":
        raise UserError(f"config.task = {config.task!r}; a metric in closed form is for retrieval")
    given, config = flatten(config.to_dict()), ConfigDict(config.to_dict())
    config.update_from_flattened_dict(FIXED)
    changed = [f"{name}={value}" for name, value in FIXED.items() if given[name] != value and name != "fit.only"]
    if changed:
        logger.info("a closed form has no uncertainty and trains nothing, so here: %s", ", ".join(changed))
    if not config.model.init_from:
        logger.warning("warning: config.model.init_from is empty, so these are features of random weights")
    return config


def _fit(config: ConfigDict, workdir: Path, overwrite: bool, stop: StopRequest, build: train.Build) -> dict[str, Any]:
    started = time.monotonic()
    train.check_settings(config, build)
    # What the weights tell (model.name=auto) stays for a call that goes on, not for a run that is replaced.
    place = workdir / heads.FOLDER if overwrite else workdir
    config = hosts.together(lambda: auto.resolved(settings_of(config), place))
    stored = None if overwrite else _stored(config, workdir)
    run = together.build_same(build, config)
    if stored is not None:
        _check_finished(run, workdir, stored)
        logger.info("this run is finished: %s", workdir / "result.json")
        return stored
    check_installed(tracking_of(config).names)
    digests = {name: images_digest(source) for name, source in _images(run).items()}  # before they are read
    train_source, classes = run.splits.train, len(run.splits.train.class_names)
    logger.info("%s: %d training images of %d classes", config.data.name, len(train_source), classes)
    state = run.initial_state()
    if config.model.init_from:
        variables, source = hosts.together(run.pretrained)
        if not overwrite and (workdir / "config.json").exists():
            workdir_lib.remember(run.config, workdir)  # other weights are refused before their features are computed
        state = run.with_variables(state, variables)
        logger.info("starting from %s", source)
    views = heads.training_features(run, state.latest, workdir, stop.check)
    evaluation = run.evaluation(state.latest, stop.check)
    known = ((train_source, views.plain), *heads.evaluated_features(evaluation, workdir))
    fitted = _Fitted(run, views, heads.random_kernel(state))
    run, start = _with_width(run, state, fitted.width)
    state = heads.with_head(run, start, fitted.arrays(heads.random_kernel(start)))
    with together.claimed(workdir):
        _make_way(workdir, overwrite)
        together.prepare(workdir, run)
        result: dict[str, Any] = {}

        def evaluate() -> dict[str, np.ndarray]:
            result.update(_evaluated(run, state, start, known, stop))
            result.update(fitted.record(run, known))
            result["closed_form"]["image_digests"] = digests
            return {"metric": np.asarray(result["best"][config.eval.best_metric], np.float64)}

        metric = hosts.from_first(evaluate, {"metric": np.zeros((), np.float64)})["metric"]
        _save(run, state, workdir, result, float(metric))
        result |= {"seconds": time.monotonic() - started, "config": run.config.to_dict(), "versions": train.versions()}
        result = without_nan(result)
        if jax.process_index() == 0:
            write_json(workdir / "result.json", result)
    logger.info("all metrics      %s", workdir / "result.json")
    return result


def _stored(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """The result of the finished run with these settings in the folder; ``None`` if there is none yet."""
    if not (workdir / "config.json").exists():
        if has_checkpoints(workdir / "checkpoints"):
            raise UserError(f"{workdir} holds checkpoints but no config.json; use another --workdir")
        return None
    stored = workdir_lib.read(workdir)
    if not stored.fit.only:
        raise UserError(
            f"{workdir} holds a trained run; use another --workdir, or --overwrite, which moves its files to "
            f"{workdir / 'replaced'}"
        )
    if config.fit.widths:
        config.model.embedding_dim = stored.model.embedding_dim
    workdir_lib.remember(config, workdir)
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); without it the run is evaluated again") from error
    return result


def _images(run: Run) -> dict[str, Source]:
    """The images that a run is made from and evaluated on, by the names of the folders of their features."""
    names = Splits._fields if run.config.eval.split == "test" else ("train", "validation")
    return {name: source for name, source in run.splits._asdict().items() if name in names and source is not None}


def _stored_digest(result: dict[str, Any], workdir: Path, name: str) -> str | None:
    """Digest of the images of a finished run; ``None`` if it is not known."""
    with contextlib.suppress(KeyError, TypeError):
        return str(result["closed_form"]["image_digests"][name])
    # Results of earlier versions do not have it; the features do, unless their folder was deleted.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((workdir / heads.FOLDER / name / "about.json").read_text())["images"]).split()[-1]
    return None


def _check_finished(run: Run, workdir: Path, result: dict[str, Any]) -> None:
    """Refuses a finished run whose images or weights are not those that it was made from.

    Weights that are no longer here are not compared.
    """
    changed = data_record.check(run.splits, workdir)
    for name, source in _images(run).items():
        if _stored_digest(result, workdir, name) not in (None, images_digest(source)):
            changed.append(f"the {name} images have changed (sizes or times of their files)")
    stored = workdir_lib.read(workdir)
    located = None
    if stored.model.init_from:
        with contextlib.suppress(UserError):
            located = weights.locate(stored.model.init_from)
    try:
        if located is not None:
            auto.record_origin(stored, located)
    except UserError:
        changed.append("the weights are not those that the run was made from")
    if changed:
        raise UserError(
            f"{workdir}: this run is finished, and {changed[0]}; use another --workdir, or --overwrite, which moves "
            f"its files to {workdir / 'replaced'}"
        )


def _make_way(workdir: Path, overwrite: bool) -> None:
    """Moves the files of another run aside, or removes the checkpoint of a call that was stopped before its result."""
    problem = None
    if jax.process_index() == 0:
        found = [path for name in FILES if os.path.lexists(path := workdir / name)]
        try:
            if overwrite and found:
                aside, number = workdir / "replaced", 0
                while (aside / str(number)).exists():
                    number += 1
                (aside / str(number)).mkdir(parents=True)
                for path in found:
                    path.replace(aside / str(number) / path.name)
                logger.info("the files of the run that was here are in %s", aside / str(number))
            elif not overwrite:
                shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        except OSError as error:
            problem = UserError(f"{workdir}: cannot be used as --workdir ({error.strerror})")
            problem.__cause__ = error
    hosts.agree(problem)


def _with_width(run: Run, state: TrainState, width: int) -> tuple[Run, TrainState]:
    """The run and its fresh state with another width of the embedding."""
    if width == run.config.model.embedding_dim:
        return run, state
    config, task = ConfigDict(run.config.to_dict()), run.task
    config.model.embedding_dim = width
    classes = len(run.splits.train.class_names)
    objective = task.criterion(config, classes, run.sampler.steps_per_epoch, run.mesh)
    setup = dataclasses.replace(run.setup, model=task.model(config, classes), objective=objective)
    run = run._replace(config=config, setup=setup)
    trunk = {"params": {"trunk": state.params["trunk"]}, "batch_stats": state.batch_stats}
    return run, run.with_variables(run.initial_state(), trunk)


class _Fitted:
    """The closed forms of a run: chosen by the first process, which sends the head to the others.

    Args:
      run: parts of the run.
      views: features of the training images.
      random: kernel of a random head.
    """

    def __init__(self, run: Run, views: Views, random: np.ndarray):
        self._views, self._classes, self._method = views, len(run.splits.train.class_names), run.config.fit.method
        self._fixed = {"random": Projection(random, np.zeros(random.shape[1], np.float32), random.shape[1])}
        self._projections: dict[str, Projection] = {}

        def make() -> dict[str, np.ndarray]:
            started = time.monotonic()
            shrinkages = run.config.fit.shrinkage
            self._chosen = heads.choose(run.config, views, self._classes, METHODS, shrinkages, self._fixed, always=True)
            self._projections = {method: self._chosen.projection(method) for method in METHODS}
            logger.info("closed forms: %.1f s", time.monotonic() - started)
            return {"width": np.asarray(self._chosen.best[self._method].width)}

        self.width = int(hosts.from_first(make, {"width": np.asarray(0)})["width"])

    def arrays(self, random: np.ndarray) -> dict[str, np.ndarray]:
        """The head and the proxies; ``random`` is a random kernel of the same width."""

        def make() -> dict[str, np.ndarray]:
            projection = self._projections[self._method]
            return heads.head_arrays(projection, heads.class_means(self._views, projection, self._classes), random)

        means = np.zeros((self._classes, random.shape[1]), np.float32)
        return hosts.from_first(make, {"kernel": random, "bias": random[0], "proxies": means})

    def record(self, run: Run, known: Sequence[Known]) -> dict[str, Any]:
        """What was chosen and the table of peers, which is also logged."""
        config, chosen = run.config, self._chosen
        heads.tell_width(self._projections[self._method], config)
        evaluation = run.evaluation(None)
        features_of_source = lambda source: next((found for one, found in known if one is source), None)
        queries, gallery = features_of_source(evaluation.source), features_of_source(evaluation.gallery)
        assert queries is not None
        peers = []
        for method in SHOWN:
            best = chosen.best.get(method, {"zero_shot": heads.ZERO_SHOT, "random": heads.RANDOM}.get(method))
            assert best is not None
            projection = {**self._fixed, **self._projections}.get(method)
            near = None if gallery is None else _embedded(gallery, projection)
            labels = None if gallery is None else gallery.labels
            rows = _embedded(queries, projection)
            found = retrieval_metrics(rows, queries.labels, near, labels, ks=config.eval.ks)
            if config.eval.cluster:
                clusters = clustering.kmeans(rows, len(np.unique(queries.labels)), config.seed).labels
                found["NMI"] = clustering.nmi(queries.labels, clusters)
            peers.append(
                {
                    "method": method,
                    "shrinkage": best.shrinkage if method in METHODS else None,
                    "width": queries.width if projection is None else projection.used,
                    "held_out": chosen.scores.get(best),
                    config.eval.split: found,
                }
            )
        _show(peers, config)
        about = chosen.about(config, self._method) | {"images": len(run.splits.train), "classes": self._classes}
        return {"closed_form": about, "peers": peers, "uncertainty": NO_UNCERTAINTY}


def _embedded(features: Features, projection: Projection | None) -> np.ndarray:
    """Unit embeddings of all features; without a projection the features themselves at length 1."""
    embed = projection or unit_rows
    return np.concatenate([embed(np.asarray(part)) for part in features.parts])


def _show(peers: list[dict[str, Any]], config: ConfigDict) -> None:
    """Logs the table of peers, in percent."""
    cell = lambda found: "     -" if found is None else f"{100 * found['R@1']:5.1f} / {100 * found['MAP@R']:4.1f}"
    logger.info("%-24s %9s %6s   %-14s %s", "R@1 / MAP@R", "lambda", "width", "held-out", config.eval.split)
    for peer in peers:
        shrinkage = "" if peer["shrinkage"] is None else f"{peer['shrinkage']:g}"
        mark = "  <- this run" if peer["method"] == config.fit.method else ""
        shown = (SHOWN[peer["method"]], shrinkage, peer["width"], cell(peer["held_out"]), cell(peer[config.eval.split]))
        logger.info("%-24s %9s %6d   %-14s %s%s", *shown, mark)


def _evaluated(
    run: Run, state: TrainState, start: TrainState, known: tuple[Known, ...], stop: StopRequest
) -> dict[str, Any]:
    """The metrics of ``result.json``, from features alone; ``untrained`` are those of the random head."""
    task, config = run.task, run.config

    def over(some: TrainState) -> Evaluation:
        embedder = FeatureEmbedder.over(run.evaluation(some.variables, stop.check).embedder, known)
        return Evaluation(config, embedder, run.splits)

    untrained = task.measure(over(start)) if config.eval.untrained else None
    final, warnings = task.evaluate(over(state))
    for line in warnings:
        logger.warning("warning: %s", line)
    if untrained:
        logger.info("random head  %s", task.describe(untrained, config))
    logger.info("closed form  %s", task.describe(final, config))
    logger.info("uncertainty  %s", NO_UNCERTAINTY)
    best = {"step": 0, **final}
    none = {"seconds_to_first_step": None, "images_per_second": None}
    return {"untrained": untrained, "final": final, "best": best, "history": [], **none}


def _save(run: Run, state: TrainState, workdir: Path, result: dict[str, Any], metric: float) -> None:
    """Writes the row of ``metrics.jsonl`` and the checkpoint of step 0."""
    config = run.config
    writer = MetricWriter(
        workdir,
        active=jax.process_index() == 0,
        tensorboard=config.log.tensorboard,
        tracking=tracking_of(config),
    )
    try:
        row = {f"final/{name}": value for name, value in result.get("final", {}).items()}
        writer.write(0, row)
        writer.sync()
        checkpoints = Checkpoints(workdir / "checkpoints", config.eval.best_metric)
        try:
            record: dict[str, Any] = {"untrained": result.get("untrained"), "history": [], "rows": writer.rows}
            checkpoints.save(0, state, without_nan(record), {config.eval.best_metric: metric})
            checkpoints.wait()
        finally:
            checkpoints.close()
    finally:
        writer.close()
    logger.info("checkpoints      %s", workdir / "checkpoints")
