"""A run: from settings and a workdir to a trained embedding and its figures."""

import json
import logging
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import idml_jax
from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.metrics.summary import Embedded, HeldOut, full_report, retrieval_report
from idml_jax.runtime import hosts
from idml_jax.runtime.checkpoint import Checkpoints, DamagedError, has_checkpoints
from idml_jax.runtime.files import without_nan, write_json
from idml_jax.runtime.interrupt import Stopped, StopRequest
from idml_jax.runtime.writers import MetricWriter
from idml_jax.training import config as config_lib
from idml_jax.training import evaluation as evaluate
from idml_jax.training import loop
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import Run, build
from idml_jax.training.state import TrainState
from idml_jax.training.tasks import classification_summary as classify
from idml_jax.training.tasks.objective import metric_of
from idml_jax.training.workdir import remember

logger = logging.getLogger("idml_jax")

# Of the many figures of the last evaluation, those told on the console; all are in result.json.
SHOWN = (
    "NMI", "P(u_mixed>u)", "P(u_occlusion>u)", "spearman(u,ambiguity)", "R-AUROC(uncertainty)",
    "R-AUROC(nearest_distance)", "R-AUROC(margin_20)", "R-AUROC(ratio_20)", "R-AUROC(confidence)", "answered",
    "answered_precision",
    "AUROC_error(u)", "AUROC_error(max_softmax)", "mean_u",
)  # fmt: skip


Check = Callable[[], None]
Build = Callable[[ConfigDict], Run]


def _embed_options(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "batch_size": config.eval.batch_size,
        "channels": config.data.channels,
        "threads": config.data.threads,
    }


def _embed(run: Run, state: TrainState, check: Check, source: Source | None = None) -> Embedded:
    source = run.eval_source if source is None else source
    embedded = evaluate.embed(
        state.variables, source, run.test_transform, run.setup, run.mesh, check=check, **_embed_options(run)
    )
    # In a plain run nothing has taught the uncertainty head anything.
    return embedded if config_lib.learns_uncertainty(run.config) else embedded._replace(uncertainty=None)


def _gallery(run: Run, state: TrainState, check: Check) -> Embedded | None:
    return None if run.eval_gallery is None else _embed(run, state, check, run.eval_gallery)


def _measure(run: Run, state: TrainState, check: Check) -> dict[str, float]:
    if run.config.task == "classification":
        return classify.report(run, state, full=False, check=check)
    return retrieval_report(_embed(run, state, check), run.config.eval.ks, _gallery(run, state, check))


def held_out_queries(run: Run, variables: Any, check: Check = lambda: None) -> HeldOut | None:
    """Held-out classes that teach how sure answers are; ``None`` without any, or where they are what is evaluated."""
    validation = run.splits.validation
    if validation is None or run.config.eval.split != "test":
        return None
    held_out = evaluate.held_out_queries(
        variables,
        validation,
        run.splits.train,
        run.test_transform,
        run.setup,
        run.mesh,
        searched=len(run.eval_gallery or run.eval_source),
        images=run.config.eval.ambiguity_images,
        seed=run.config.seed,
        check=check,
        **_embed_options(run),
    )
    return held_out if config_lib.learns_uncertainty(run.config) else held_out.without_uncertainty()


def full_evaluation(run: Run, state: TrainState, check: Check = lambda: None) -> dict[str, float]:
    """Retrieval, clustering and what the uncertainty knows; see ``metrics.report``; of a classifier ``classify``.

    ``check`` may raise to stop.
    """
    if run.config.task == "classification":
        return classify.report(run, state, full=True, check=check)
    started, config, source = time.monotonic(), run.config, run.eval_source
    metric, embedded = metric_of(config), _embed(run, state, check)
    truth = source.fields.get("ambiguity") if config_lib.learns_uncertainty(config) else None
    gallery, held_out = _gallery(run, state, check), held_out_queries(run, state.variables, check)
    report, warnings = full_report(
        embedded,
        gallery,
        ks=config.eval.ks,
        seed=config.seed,
        ambiguity=truth,
        metric=metric,
        precision=config.eval.precision,
        held_out=held_out,
        cluster=config.eval.cluster,
    )
    if config.eval.ambiguity_images:
        report |= evaluate.ambiguity(
            state.variables,
            source,
            run.test_transform,
            run.setup,
            run.mesh,
            seed=config.seed,
            images=config.eval.ambiguity_images,
            gallery=embedded,
            metric=metric,
            held_out=held_out,
            check=check,
            **_embed_options(run),
        )
    for warning in warnings:
        logger.warning("warning: %s", warning)
    count = len(source) + len(run.eval_gallery or ())
    logger.info("full evaluation of %d images: %.1f s", count, time.monotonic() - started)
    return report


def describe(metrics: dict[str, float], ks: tuple[int, ...]) -> str:
    """One line: ``R@1 71.2  R@2 80.1  RP 35.0  MAP@R 30.4`` in percent; of a classifier its accuracy."""
    if "top1" in metrics:
        return classify.describe(metrics)
    return "  ".join(f"{name} {100 * metrics[name]:.1f}" for name in (*(f"R@{k}" for k in ks), "RP", "MAP@R"))


def train_and_evaluate(config: ConfigDict, workdir: str | Path, build: Build = build) -> dict[str, Any]:
    """Trains, or goes on training, in a workdir and evaluates.

    The workdir gets ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and, at the end,
    ``result.json``. The same call on the same workdir goes on from the newest checkpoint with the same batches, and
    returns the result of a run that is finished.

    Args:
      config: settings, see ``idml_jax.default_config``.
      workdir: folder of the run.
      build: puts the run together; one of your own may change what ``run.build`` gives, for instance its objective.

    Returns:
      The content of ``result.json``: metrics ``untrained``, ``final`` and ``best`` (``None`` where one is undefined),
      the settings, versions and speed.

    Raises:
      UserError: for settings or data that cannot work, and if the loss is no longer a number.
      Stopped: on SIGTERM or SIGUSR1, after saving; the same call goes on, to the same result.
    """
    with StopRequest() as stop:
        return _train_and_evaluate(config, Path(workdir).absolute(), stop, build)


def _train_and_evaluate(config: ConfigDict, workdir: Path, stop: StopRequest, build: Build) -> dict[str, Any]:
    started = time.monotonic()
    run = build(config)
    if stop.requested:
        raise Stopped(f"stopped by {stop.requested} before the first step; nothing was changed in {workdir}")
    first_host = jax.process_index() == 0
    finished = workdir / "result.json"
    # Read before anything is written, and not at all once the run has a checkpoint of its own.
    pretrained = None
    if config.model.init_from and not finished.exists() and not has_checkpoints(workdir / "checkpoints"):
        pretrained = run.pretrained()
    _prepare(workdir, config, first_host)

    if finished.exists():
        logger.info("this run is finished: %s; --mode=eval evaluates its best checkpoint again", finished)
        try:
            return json.loads(finished.read_text())
        except ValueError as error:
            raise UserError(f"{finished} is not valid JSON ({error}); without it the run is evaluated again") from error

    train, test = run.splits.train, run.eval_source
    logger.info(
        "%s: %d training images of %d classes, %d %s images of %d classes%s",
        config.data.name,
        len(train),
        len(train.class_names),
        len(test),
        config.eval.split,
        len(test.class_names),
        "" if run.eval_gallery is None else f", searching {len(run.eval_gallery)} gallery images",
    )
    state = run.initial_state()
    logger.info(
        "%s with %.1f M parameters on %d %s device(s); %s%s; %d epochs of %d steps",
        config.model.name,
        sum(x.size for k in ("trunk", "heads") for x in jax.tree.leaves(state.params[k])) / 1e6,
        run.mesh.size,
        jax.default_backend(),
        "introspective " if config.ism.enabled else "plain ",
        run.setup.objective.loss,
        config.epochs,
        run.sampler.steps_per_epoch,
    )
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        config.eval.best_metric,
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
    )
    record: dict[str, Any] = {"untrained": None, "history": [], "rows": 0}
    resumed = checkpoints.resume(state)
    if resumed is not None:
        state, record = resumed
        logger.info("going on from step %d in %s", int(state.step), workdir)
    elif pretrained is not None:
        variables, told = pretrained
        state = run.with_variables(state, variables)
        logger.info("starting from %s", told)
    step = int(state.step)
    writer = MetricWriter(workdir, active=first_host, tensorboard=config.log.tensorboard, rows=record["rows"])
    try:
        if step == 0 and config.eval.untrained and record["untrained"] is None:
            untrained = record["untrained"] = _measure(run, state, stop.check)
            writer.write(0, {f"eval/{k}": v for k, v in untrained.items()})
            logger.info("untrained: %s", describe(untrained, config.eval.ks))
        speed = loop.Speed(started)

        def end_epoch(state: TrainState, step: int) -> None:
            _end_epoch(run, state, step, record, checkpoints, writer, stop.check)

        state = loop.train(run, state, step, record, checkpoints, writer, speed, stop, end_epoch)
        checkpoints.wait()
        result = without_nan(_finish(run, state, record, checkpoints, speed, stop.check))
        # Before the result, which says that the run is finished.
        writer.write(run.total_steps, {f"final/{k}": v for k, v in result["final"].items() if v is not None})
        writer.sync()
        if first_host:
            write_json(workdir / "result.json", result)
        logger.info("checkpoints      %s", workdir / "checkpoints")
        logger.info("TensorBoard logs %s", workdir / "tensorboard" if writer.tensorboard else "none")
        logger.info("all figures      %s", workdir / "result.json")
    except Stopped as stopped:
        raise _told(stopped, workdir, checkpoints) from None
    finally:
        writer.close()
        checkpoints.close()
    return result


def _prepare(workdir: Path, config: ConfigDict, first_host: bool) -> None:
    problem = None
    try:
        if first_host:
            workdir.mkdir(parents=True, exist_ok=True)
            remember(config, workdir)
    except OSError as error:
        problem = UserError(f"{workdir}: cannot be used as --workdir ({error.strerror})")
        problem.__cause__ = error
    except UserError as error:
        problem = error
    hosts.agree(problem)


def _told(stopped: Stopped, workdir: Path, checkpoints: Checkpoints) -> Stopped:
    checkpoints.wait()
    newest = checkpoints.newest
    kept = "nothing is saved yet" if newest is None else f"saved at step {newest} in {workdir}"
    return Stopped(f"stopped by {stopped}; {kept}; the same command goes on from there")


def _end_epoch(
    run: Run,
    state: TrainState,
    step: int,
    record: dict[str, Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    check: Check,
) -> None:
    config, started = run.config, time.monotonic()
    epoch, last = -(-step // run.sampler.steps_per_epoch), step == run.total_steps
    metrics = None
    if epoch % config.eval.every_epochs == 0 or last:
        metrics = _measure(run, state, check)
        record["history"].append({"step": step, **without_nan(metrics)})
        writer.write(step, {f"eval/{k}": v for k, v in metrics.items()})
        took = time.monotonic() - started
        logger.info("epoch %d  %s  (%.1f s)", epoch, describe(metrics, config.eval.ks), took)
    if last or metrics is not None or epoch % config.checkpoint.every_epochs == 0:
        writer.sync()
        whole = without_nan({**record, "rows": writer.rows})
        checkpoints.save(step, state, whole, without_nan(metrics))


def _finish(
    run: Run, state: TrainState, record: dict[str, Any], checkpoints: Checkpoints, speed: loop.Speed, check: Check
) -> dict[str, Any]:
    ks = run.config.eval.ks
    final = full_evaluation(run, state, check)
    best, best_step = dict(final), run.total_steps
    for step in checkpoints.by_metric:
        if step == run.total_steps:
            break
        try:
            restored, _ = checkpoints.restore(step, state)
        except DamagedError as error:
            logger.warning("warning: %s; taking the next best", error)
            continue
        best, best_step = full_evaluation(run, restored, check), step
        break
    if record["untrained"]:
        logger.info("untrained  %s", describe(record["untrained"], ks))
    logger.info("trained    %s", describe(final, ks))
    if best_step != run.total_steps:
        logger.info("best       %s  (step %d by %s)", describe(best, ks), best_step, run.config.eval.best_metric)
    for name in SHOWN:
        if name in final:
            logger.info("%-26s %.3f", name, final[name])
    return {
        "untrained": record["untrained"],
        "final": final,
        "best": {"step": best_step, **best},
        "history": record["history"],
        **speed.summary(),
        "config": run.config.to_dict(),
        "versions": versions(),
    }


def evaluate_checkpoint(
    workdir: str | Path, overrides: ConfigDict | None = None, build: Build = build
) -> dict[str, Any]:
    """Evaluates the best checkpoint of a workdir.

    Args:
      workdir: folder of the run.
      overrides: settings to hold the workdir's against, as in training; by default the workdir's own.
      build: as of ``train_and_evaluate``.

    Returns:
      The metrics, and the ``step`` of the checkpoint; also written to ``eval.json``.

    Raises:
      UserError: if there is no checkpoint, or one of another architecture.
      Stopped: on SIGTERM or SIGUSR1; nothing is written.
    """
    with StopRequest() as stop:
        try:
            return _evaluate_checkpoint(Path(workdir).absolute(), overrides, stop, build)
        except Stopped as stopped:
            raise Stopped(f"stopped by {stopped}; nothing was written; the same command starts again") from None


def _evaluate_checkpoint(
    workdir: Path, overrides: ConfigDict | None, stop: StopRequest, build: Build
) -> dict[str, Any]:
    stored = workdir_lib.read(workdir)
    if overrides is not None:
        remember(overrides, workdir)
    run = build(stored if overrides is None else overrides)
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder}: no checkpoints")
    checkpoints = Checkpoints(folder, run.config.eval.best_metric, read_only=True)
    try:
        step = checkpoints.best
        if step is None:
            raise UserError(f"{folder}: no checkpoints")
        state, _ = checkpoints.restore(step, run.initial_state())
    finally:
        checkpoints.close()
    metrics = {"step": step, **full_evaluation(run, state, stop.check)}
    logger.info("step %d: %s", step, describe(metrics, run.config.eval.ks))
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", without_nan(metrics))
    return metrics


def versions() -> dict[str, str]:
    """Versions of what a figure may depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "opencv-python-headless")
    found = {"idml_jax": idml_jax.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
