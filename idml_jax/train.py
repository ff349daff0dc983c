"""A run: from settings and a workdir to a trained embedding and its figures."""

import json
import logging
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import idml_jax
from idml_jax import classify, evaluate, sharding, steps
from idml_jax import config as config_lib
from idml_jax.checkpoint import Checkpoints, has_checkpoints
from idml_jax.data import pipeline
from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.metrics.report import Embedded, Ism, full_report, retrieval_report
from idml_jax.run import Run, build
from idml_jax.state import TrainState
from idml_jax.writers import MetricWriter, format_seconds

logger = logging.getLogger("idml_jax")

# Of the many figures of the last evaluation, those told on the console; all are in result.json.
SHOWN = (
    "NMI", "P(u_mixed>u)", "P(u_occlusion>u)", "spearman(u,ambiguity)", "R-AUROC(uncertainty)",
    "R-AUROC(nearest_distance)", "R-AUROC(margin_10)", "answered", "answered_precision",
    "AUROC_error(u)", "AUROC_error(max_softmax)", "mean_u",
)  # fmt: skip


def _embed_options(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "batch_size": config.eval.batch_size, "channels": config.data.channels, "threads": config.data.threads,
    }  # fmt: skip


def _embed(run: Run, state: TrainState, source: Source | None = None) -> Embedded:
    source = run.eval_source if source is None else source
    embedded = evaluate.embed(
        state.variables, source, run.test_transform, run.setup, run.mesh, **_embed_options(run)
    )
    # In a plain run nothing has taught the uncertainty head anything.
    return embedded if run.config.ism.enabled else embedded._replace(uncertainty=None)


def _gallery(run: Run, state: TrainState) -> Embedded | None:
    return None if run.eval_gallery is None else _embed(run, state, run.eval_gallery)


def _measure(run: Run, state: TrainState) -> dict[str, float]:
    if run.config.task == "classification":
        return classify.report(run, state, full=False)
    return retrieval_report(_embed(run, state), run.config.eval.ks, _gallery(run, state))


def full_evaluation(run: Run, state: TrainState) -> dict[str, float]:
    """Retrieval, clustering and what the uncertainty knows; see ``metrics.report``; of a classifier ``classify``."""
    if run.config.task == "classification":
        return classify.report(run, state, full=True)
    started, config, source = time.monotonic(), run.config, run.eval_source
    # Held-out classes choose the threshold of answers, unless they are what is evaluated.
    validation = run.splits.validation if config.eval.split == "test" else None
    truth = source.fields.get("ambiguity")
    settings, embedded = Ism(config.ism.temperature, config.ism.variant != "absolute"), _embed(run, state)
    report, warnings = full_report(
        embedded, _gallery(run, state), ks=config.eval.ks, seed=config.seed,
        ambiguity=truth if config.ism.enabled else None, settings=settings, precision=config.eval.precision,
        held_out=None if validation is None else _embed(run, state, validation), cluster=config.eval.cluster,
    )  # fmt: skip
    if config.eval.ambiguity_images:
        report |= evaluate.ambiguity(
            state.variables, source, run.test_transform, run.setup, run.mesh, seed=config.seed,
            images=config.eval.ambiguity_images, gallery=embedded, settings=settings, **_embed_options(run),
        )  # fmt: skip
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


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, or goes on training, in a workdir and evaluates.

    The workdir gets ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/`` and, at the end,
    ``result.json``. The same call on the same workdir goes on from the newest checkpoint with the same batches, and
    returns the result of a run that is finished.

    Args:
      config: settings, see ``idml_jax.config.default_config``.
      workdir: folder of the run.

    Returns:
      The content of ``result.json``: metrics ``untrained``, ``final`` and ``best`` (``None`` where one is undefined),
      the settings, versions and speed.

    Raises:
      UserError: for settings or data that cannot work, and if the loss is no longer a number.
    """
    started = time.monotonic()
    workdir = Path(workdir).absolute()
    run = build(config)
    first_host = jax.process_index() == 0
    finished = workdir / "result.json"
    # Read before anything is written, and not at all once the run has a checkpoint of its own.
    pretrained = None
    if config.model.init_from and not finished.exists() and not has_checkpoints(workdir / "checkpoints"):
        pretrained = run.pretrained()
    _prepare(workdir, config, first_host)

    if finished.exists():
        logger.info("this run is finished: %s; --mode=eval evaluates its best checkpoint again", finished)
        return json.loads(finished.read_text())

    train, test = run.splits.train, run.eval_source
    logger.info(
        "%s: %d training images of %d classes, %d %s images of %d classes%s",
        config.data.name, len(train), len(train.class_names), len(test), config.eval.split, len(test.class_names),
        "" if run.eval_gallery is None else f", searching {len(run.eval_gallery)} gallery images",
    )  # fmt: skip
    state = run.initial_state()
    logger.info(
        "%s with %.1f M parameters on %d %s device(s); %s%s; %d epochs of %d steps",
        config.model.name,
        sum(x.size for k in ("trunk", "heads") for x in jax.tree.leaves(state.params[k])) / 1e6,
        run.mesh.size, jax.default_backend(), "introspective " if config.ism.enabled else "plain ",
        run.setup.objective.loss,
        config.epochs, run.sampler.steps_per_epoch,
    )  # fmt: skip
    checkpoints = Checkpoints(
        workdir / "checkpoints", config.eval.best_metric,
        keep_latest=config.checkpoint.keep_latest, keep_best=config.checkpoint.keep_best,
    )  # fmt: skip
    record: dict[str, Any] = {"untrained": None, "history": []}
    if checkpoints.latest is not None:
        state, record = checkpoints.restore(checkpoints.latest, state)
        logger.info("going on from step %d in %s", checkpoints.latest, workdir)
    elif pretrained is not None:
        variables, told = pretrained
        state = run.with_variables(state, variables)
        logger.info("starting from %s", told)
    step = int(state.step)
    writer = MetricWriter(workdir, active=first_host, tensorboard=config.log.tensorboard, resume_step=step)
    try:
        if step == 0 and config.eval.untrained and record["untrained"] is None:
            record["untrained"] = _measure(run, state)
            writer.write(0, {f"eval/{k}": v for k, v in record["untrained"].items()})
            logger.info("untrained: %s", describe(record["untrained"], config.eval.ks))
        speed = _Speed(started)
        state = _train(run, state, step, record, checkpoints, writer, speed)
        checkpoints.wait()
        result = config_lib.without_nan(_finish(run, state, record, checkpoints, speed))
        if first_host:
            config_lib.write_json(workdir / "result.json", result)
        writer.write(run.total_steps, {f"final/{k}": v for k, v in result["final"].items() if v is not None})
        logger.info("checkpoints      %s", workdir / "checkpoints")
        logger.info("TensorBoard logs %s", workdir / "tensorboard" if writer.tensorboard else "none")
        logger.info("all figures      %s", workdir / "result.json")
    finally:
        writer.close()
        checkpoints.close()
    return result


def _prepare(workdir: Path, config: ConfigDict, first_host: bool) -> None:
    if not first_host:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        config_lib.remember(config, workdir)
    except OSError as error:
        raise UserError(f"{workdir}: cannot be used as --workdir ({error.strerror})") from error


class _Speed:
    """Times of a run for its result."""

    def __init__(self, started: float):
        self.started = started
        self.first_step: float | None = None
        self.rates: list[float] = []

    def summary(self) -> dict[str, float | None]:
        rate = float(np.median(self.rates)) if self.rates else None
        return {
            "seconds_to_first_step": self.first_step,
            "images_per_second": rate,
            "seconds": time.monotonic() - self.started,
        }


def _train(
    run: Run,
    state: TrainState,
    step: int,
    record: dict[str, Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    speed: _Speed,
) -> TrainState:
    config, per_epoch = run.config, run.sampler.steps_per_epoch
    data = config.data
    batches = pipeline.train_batches(
        run.splits.train, run.sampler, run.train_transform, seed=config.seed, start=step, stop=run.total_steps,
        channels=data.channels, host=jax.process_index(), hosts=jax.process_count(), threads=data.threads,
        prefetch=data.prefetch, workers=data.workers,
    )  # fmt: skip
    progress = writer.progress(run.total_steps, step)
    window = _Window()
    warmup = config.optim.warmup_epochs * per_epoch
    for batch in batches:
        place = sharding.shard_batch({k: batch[k] for k in ("image", "label")}, run.mesh)
        state, metrics = steps.jit_train_step(state, place, setup=run.setup, train_trunk=step >= warmup)
        step += 1
        # The figures of a step are fetched after the next is under way, so the device never waits for the host.
        window.add(step, metrics)
        if speed.first_step is None:
            jax.block_until_ready(metrics)
            speed.first_step = time.monotonic() - speed.started
            logger.info("first step done %.1f s after the start", speed.first_step)
            progress.measure(step)
        progress.tick(step)
        last = step == run.total_steps
        end_of_epoch = step % per_epoch == 0 or last
        epoch = -(-step // per_epoch)
        if step % config.log.every_steps == 0 or end_of_epoch:
            means = window.flush()
            rate, remaining = progress.measure(step)
            if rate > 0 and math.isfinite(rate) and step > 1:
                speed.rates.append(rate * config.batch_size)
            images = rate * config.batch_size
            writer.write(step, {**{f"train/{k}": v for k, v in means.items()}, "train/images_per_second": images})
            logger.info(
                "epoch %d/%d  step %d/%d  loss %.4f  %.0f images/s  %s to go",
                epoch, config.epochs, step, run.total_steps, means["loss"], images,
                format_seconds(remaining),
            )  # fmt: skip
        if not end_of_epoch:
            continue
        paused = time.monotonic()
        metrics = None
        if epoch % config.eval.every_epochs == 0 or last:
            metrics = _measure(run, state)
            record["history"].append({"step": step, **config_lib.without_nan(metrics)})
            writer.write(step, {f"eval/{k}": v for k, v in metrics.items()})
            took = time.monotonic() - paused
            logger.info("epoch %d  %s  (%.1f s)", epoch, describe(metrics, config.eval.ks), took)
        if last or metrics is not None or epoch % config.checkpoint.every_epochs == 0:
            checkpoints.save(step, state, config_lib.without_nan(record), config_lib.without_nan(metrics))
        progress.pause(time.monotonic() - paused)
    return state


class _Window:
    """Averages the figures of the steps since the last log row and stops a run whose loss is no number."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending.append((step, metrics))
        if len(self._pending) > 1:
            self._fetch(*self._pending.pop(0))

    def _fetch(self, step: int, metrics: dict[str, jax.Array]) -> None:
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            raise UserError(f"the loss is {values['loss']} at step {step}; a lower config.optim.learning_rate may help")
        for k, v in values.items():
            self._sums[k] = self._sums.get(k, 0.0) + v
        self._count += 1

    def flush(self) -> dict[str, float]:
        while self._pending:
            self._fetch(*self._pending.pop(0))
        means = {k: v / self._count for k, v in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


def _finish(
    run: Run, state: TrainState, record: dict[str, Any], checkpoints: Checkpoints, speed: _Speed
) -> dict[str, Any]:
    ks = run.config.eval.ks
    final = full_evaluation(run, state)
    best_step = checkpoints.best
    best = dict(final)
    if best_step not in (None, run.total_steps):
        restored, _ = checkpoints.restore(best_step, state)
        best = full_evaluation(run, restored)
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


def evaluate_checkpoint(workdir: str | Path, overrides: ConfigDict | None = None) -> dict[str, Any]:
    """Evaluates the best checkpoint of a workdir.

    Args:
      workdir: folder of the run.
      overrides: settings to hold the workdir's against, as in training; by default the workdir's own.

    Returns:
      The metrics, and the ``step`` of the checkpoint; also written to ``eval.json``.

    Raises:
      UserError: if there is no checkpoint, or one of another architecture.
    """
    workdir = Path(workdir).absolute()
    stored = config_lib.read(workdir)
    if overrides is not None:
        config_lib.remember(overrides, workdir)
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
    metrics = {"step": step, **full_evaluation(run, state)}
    logger.info("step %d: %s", step, describe(metrics, run.config.eval.ks))
    if jax.process_index() == 0:
        config_lib.write_json(workdir / "eval.json", config_lib.without_nan(metrics))
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
