"""Runs training: from settings and a workdir to a trained embedding and its metrics."""

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
from idml_jax.data import pipeline
from idml_jax.errors import UserError, quiet_libraries
from idml_jax.metrics.names import shown
from idml_jax.runtime import hosts
from idml_jax.runtime.callable_module import make_callable
from idml_jax.runtime.checkpoint import Checkpoints, DamagedError, has_checkpoints
from idml_jax.runtime.files import user_path, without_nan, write_json
from idml_jax.runtime.interrupt import Stopped, StopRequest
from idml_jax.runtime.trackers import check_installed
from idml_jax.runtime.writers import MetricWriter
from idml_jax.training import auto, going_on, semantic_init, together
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.ahead import Ahead
from idml_jax.training.build import Run, build
from idml_jax.training.config import starts_whitened, tracking_of
from idml_jax.training.loop import Speed, Trainer
from idml_jax.training.settings import check_known
from idml_jax.training.tasks import terms
from idml_jax.training.tasks.task import Evaluation
from idml_jax.training.workdir import finding_images, remember

logger = logging.getLogger("idml_jax")

Build = Callable[[ConfigDict], Run]
_BUILD = build


def check_settings(config: Any, build: Build) -> None:
    """Checks names and types of settings, as the command line does; a ``build`` of one's own may read others.

    Raises:
      UserError: naming the first wrong one.
    """
    if build is _BUILD:
        check_known(config)


def full_evaluation(run: Run, evaluation: Evaluation) -> dict[str, float]:
    """Computes all metrics of a run's task for a network; warnings go to the log."""
    started = time.monotonic()
    report, warnings = run.task.evaluate(evaluation)
    for warning in warnings:
        logger.warning("warning: %s", warning)
    count = len(evaluation.source) + len(evaluation.gallery or ())
    logger.info("full evaluation of %d images: %.1f s", count, time.monotonic() - started)
    return report


def train_and_evaluate(
    config: ConfigDict, workdir: str | Path, build: Build = build, resume: str = "auto"
) -> dict[str, Any]:
    """Trains or resumes training in a workdir, and evaluates.

    The workdir gets ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and, at the end,
    ``result.json``. The same call on the same workdir resumes from the newest checkpoint with the same batches; for
    a finished run it returns the stored result.

    Args:
      config: settings, see ``idml_jax.default_config``.
      workdir: folder of the run.
      build: builds the run; a custom function may change what ``training.build.build`` returns, for instance its
        objective.
      resume: what to do with a run in the workdir: ``auto`` resumes one with the same settings, ``longer`` also goes on
        with a finished one for more epochs, ``never`` refuses it.

    Returns:
      The content of ``result.json``: metrics ``untrained``, ``final`` and ``best`` (``None`` for undefined ones), the
      settings, versions and speed.

    Raises:
      UserError: for settings or data that cannot work, and if the loss is no longer finite.
      Stopped: on SIGTERM or SIGUSR1, after saving; the same call resumes and gives the same result.
    """
    pipeline.refuse_in_a_starting_process()
    with StopRequest() as stop, quiet_libraries():
        return _train_and_evaluate(config, user_path(workdir), stop, build, resume)


def _train_and_evaluate(
    config: ConfigDict, workdir: Path, stop: StopRequest, build: Build, resume: str
) -> dict[str, Any]:
    speed = Speed(time.monotonic())
    check_settings(config, build)
    going_on.check(resume, config, workdir)
    if config.fit.only:
        raise UserError(
            "config.fit.only is set by python -m idml_jax.fit, which makes such runs; leave it out to train"
        )
    run = together.build_same(build, auto.resolved(config, workdir))
    check_installed(tracking_of(run.config).names)
    if stop.requested:
        raise Stopped(f"stopped by {stop.requested} before the first step; nothing was changed in {workdir}")
    finished = workdir / "result.json"
    # Read before anything is written, and only while the run has no checkpoint.
    pretrained = None
    if config.model.init_from and not finished.exists() and not has_checkpoints(workdir / "checkpoints"):
        pretrained = hosts.together(run.pretrained)
    with together.claimed(workdir):
        together.prepare(workdir, run, resume)
        return _go_on(run, workdir, pretrained, stop, speed)


def _go_on(
    run: Run, workdir: Path, pretrained: tuple[dict[str, Any], str] | None, stop: StopRequest, speed: Speed
) -> dict[str, Any]:
    """Trains from where the run in the workdir is to its end; a finished one only gives its result."""
    finished = workdir / "result.json"
    if finished.exists():
        logger.info(
            "this run is finished: %s; --mode=eval evaluates its best checkpoint again, --resume=longer with more "
            "config.epochs goes on",
            finished,
        )
        try:
            return json.loads(finished.read_text())
        except ValueError as error:
            raise UserError(f"{finished} is not valid JSON ({error}); without it the run is evaluated again") from error
    ahead = Ahead()
    if not has_checkpoints(workdir / "checkpoints"):
        ahead.start(run)
    trainer = _started(run, workdir, pretrained, stop, speed)
    trainer.ahead = ahead
    complete = False
    try:
        _start_whitened(trainer, workdir)
        _measure_untrained(trainer)
        trainer.train()
        trainer.checkpoints.wait()
        result = without_nan(_finish(trainer))
        _write_result(trainer, workdir, result)
        complete = True
    except Stopped as stopped:
        raise _told(stopped, workdir, trainer.checkpoints) from None
    finally:
        trainer.writer.close(complete)
        trainer.checkpoints.close()
    return result


def _started(
    run: Run, workdir: Path, pretrained: tuple[dict[str, Any], str] | None, stop: StopRequest, speed: Speed
) -> Trainer:
    """The trainer at step 0, or at the newest checkpoint of the run in the workdir."""
    config, train = run.config, run.splits.train
    evaluation = run.evaluation(None)
    gallery = evaluation.gallery
    logger.info(
        "%s: %d training images of %d classes, %d %s images of %d classes%s",
        config.data.name,
        len(train),
        len(train.class_names),
        len(evaluation.source),
        config.eval.split,
        len(evaluation.source.class_names),
        "" if gallery is None else f", searching {len(gallery)} gallery images",
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
    learning = run.setup.optimizer.trunk
    if not learning.everything:
        trunk = state.params["trunk"]
        some, whole = (sum(x.size for x in jax.tree.leaves(t)) / 1e6 for t in (learning.learning(trunk), trunk))
        start = f", from {learning.start} on" if learning.anything else ""
        logger.info("%.1f M of the trunk's %.1f M parameters learn%s", some, whole, start)
    if advice := terms.advice(config):
        logger.warning("warning: %s (docs/losses.md)", advice)
    if told := terms.of_class_share(run.setup.objective, config.batch_size):
        logger.warning("warning: %s (docs/losses.md)", told)
    if unused := terms.without_effect(config):
        loss = f", the loss {config.loss.name}" if config.task == "retrieval" else ""
        logger.warning("warning: without effect under the task %s%s: %s", config.task, loss, ", ".join(unused))
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
        logger.info("resuming from step %d in %s", int(state.step), workdir)
    elif pretrained is not None:
        variables, source = pretrained
        state = run.with_variables(state, variables)
        logger.info("starting from %s", source)
    pipeline.load_reader()  # before the writers' threads
    writer = MetricWriter(
        workdir,
        active=jax.process_index() == 0,
        tensorboard=config.log.tensorboard,
        rows=record["rows"],
        tracking=tracking_of(config),
    )
    return Trainer(run, state, checkpoints, writer, stop, _end_epoch, speed, record)


def _start_whitened(trainer: Trainer, workdir: Path) -> None:
    """Gives a new run its semantic head in closed form, if the settings ask for it."""
    run = trainer.run
    if trainer.step == 0 and starts_whitened(run.config):
        trainer.state, about = semantic_init.start_whitened(run, trainer.state, workdir, trainer.stop.check)
        trainer.record["semantic_init"] = about


def _measure(trainer: Trainer) -> dict[str, float]:
    evaluation = trainer.run.evaluation(trainer.state.variables, trainer.stop.check)
    if trainer.last:
        trainer.evaluation = evaluation  # the full evaluation at the end uses its embeddings
    return trainer.run.task.measure(evaluation)


def _measure_untrained(trainer: Trainer) -> None:
    run, record = trainer.run, trainer.record
    if trainer.step == 0 and run.config.eval.untrained and record["untrained"] is None:
        untrained = record["untrained"] = _measure(trainer)
        trainer.writer.write(0, {f"eval/{k}": v for k, v in untrained.items()})
        logger.info("untrained: %s", run.task.describe(untrained, run.config))


def _end_epoch(trainer: Trainer) -> None:
    """Evaluates and saves a checkpoint, if the settings ask for it after this epoch."""
    run, config, started = trainer.run, trainer.run.config, time.monotonic()
    metrics = None
    if trainer.epoch % config.eval.every_epochs == 0 or trainer.last:
        metrics = _measure(trainer)
        trainer.record["history"].append({"step": trainer.step, **without_nan(metrics)})
        trainer.writer.write(trainer.step, {f"eval/{k}": v for k, v in metrics.items()})
        took = time.monotonic() - started
        logger.info("epoch %d  %s  (%.1f s)", trainer.epoch, run.task.describe(metrics, config), took)
    if trainer.last or metrics is not None or trainer.epoch % config.checkpoint.every_epochs == 0:
        trainer.writer.sync()
        trainer.checkpoints.save(trainer.step, trainer.state, trainer.kept, without_nan(metrics))


def _finish(trainer: Trainer) -> dict[str, Any]:
    """Evaluates the last and the best checkpoint in full; returns the content of ``result.json``."""
    run, record, checkpoints = trainer.run, trainer.record, trainer.checkpoints
    describe = lambda metrics: run.task.describe(metrics, run.config)
    final = full_evaluation(run, trainer.evaluation or run.evaluation(trainer.state.variables, trainer.stop.check))
    best, best_step = dict(final), run.total_steps
    for step in checkpoints.by_metric:
        if step == run.total_steps:
            break
        try:
            restored, _ = checkpoints.restore(step, trainer.state)
        except DamagedError as error:
            logger.warning("warning: %s; taking the next best", error)
            continue
        best, best_step = full_evaluation(run, run.evaluation(restored.variables, trainer.stop.check)), step
        break
    if record["untrained"]:
        logger.info("untrained  %s", describe(record["untrained"]))
    logger.info("trained    %s", describe(final))
    if best_step != run.total_steps:
        logger.info("best       %s  (step %d by %s)", describe(best), best_step, run.config.eval.best_metric)
    for name in shown():
        if name in final:
            logger.info("%-26s %.3f", name, final[name])
    return {
        "untrained": record["untrained"],
        "final": final,
        "best": {"step": best_step, **best},
        "history": record["history"],
        **({"semantic_init": record["semantic_init"]} if "semantic_init" in record else {}),
        **trainer.speed.summary(),
        "config": run.config.to_dict(),
        "versions": versions(),
    }


def _write_result(trainer: Trainer, workdir: Path, result: dict[str, Any]) -> None:
    writer = trainer.writer
    # Written before the result, which marks the run as finished.
    final = {f"final/{k}": v for k, v in result["final"].items() if v is not None}
    writer.write(trainer.run.total_steps, final)
    writer.sync()
    if jax.process_index() == 0:
        write_json(workdir / "result.json", result)
    logger.info("checkpoints      %s", workdir / "checkpoints")
    logger.info("TensorBoard logs %s", workdir / "tensorboard" if writer.tensorboard else "none")
    logger.info("all metrics      %s", workdir / "result.json")


def _told(stopped: Stopped, workdir: Path, checkpoints: Checkpoints) -> Stopped:
    """``stopped`` with a message that says what is saved."""
    checkpoints.wait()
    newest = checkpoints.newest
    kept = "nothing is saved yet" if newest is None else f"saved at step {newest} in {workdir}"
    return Stopped(f"stopped by {stopped}; {kept}; rerun the same command to resume from there")


def evaluate_checkpoint(
    workdir: str | Path, overrides: ConfigDict | None = None, build: Build = build
) -> dict[str, Any]:
    """Evaluates the best checkpoint of a workdir.

    Args:
      workdir: folder of the run.
      overrides: settings to compare with the workdir's, as in training, of which those of evaluation (``eval``) may
        differ; by default those of the workdir.
      build: as for ``train_and_evaluate``.

    Returns:
      The metrics, the ``step`` of the checkpoint and, if any differ, the ``settings``; also written to ``eval.json``.

    Raises:
      UserError: if there is no checkpoint, or it has another architecture.
      Stopped: on SIGTERM or SIGUSR1; nothing is written.
    """
    with StopRequest() as stop, quiet_libraries():
        try:
            return _evaluate_checkpoint(user_path(workdir), overrides, stop, build)
        except Stopped as stopped:
            raise Stopped(f"stopped by {stopped}; nothing was written; rerun the same command to start again") from None


def _evaluate_checkpoint(
    workdir: Path, overrides: ConfigDict | None, stop: StopRequest, build: Build
) -> dict[str, Any]:
    stored, changed = workdir_lib.read(workdir), []
    if overrides is not None:
        check_settings(overrides, build)
        overrides = auto.resolved(overrides, workdir)
        changed = remember(overrides, workdir, free=("eval.",))
    used = stored if overrides is None else overrides
    with finding_images(used, workdir):
        run = together.build_same(build, used)
    together.check_data(run, workdir)
    state, step = run.best_state(workdir)
    if changed:
        logger.info("evaluation differs from the run's: %s", "; ".join(changed))
    metrics: dict[str, Any] = {"step": step, **full_evaluation(run, run.evaluation(state.variables, stop.check))}
    if changed:
        metrics["settings"] = changed
    logger.info("step %d: %s", step, run.task.describe(metrics, run.config))
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", without_nan(metrics))
    return metrics


def versions() -> dict[str, str]:
    """Versions of the libraries and devices that metrics may depend on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "opencv-python-headless")
    found = {"idml_jax": idml_jax.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


make_callable(__name__, train_and_evaluate)  # idml_jax.train(config, "runs/mine")
