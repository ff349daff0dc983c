"""The loop over the steps of a run: batches in, figures out, and what happens when it has to end early."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from idml_jax.data import pipeline
from idml_jax.errors import UserError
from idml_jax.runtime import sharding
from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.runtime.files import without_nan, write_json
from idml_jax.runtime.interrupt import Stopped, StopRequest
from idml_jax.runtime.writers import MetricWriter, format_seconds
from idml_jax.training import steps, watch
from idml_jax.training.build import Run
from idml_jax.training.state import TrainState

logger = logging.getLogger("idml_jax")


class Speed:
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


def train(
    run: Run,
    state: TrainState,
    step: int,
    record: dict[str, Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    speed: Speed,
    stop: StopRequest,
    end_epoch: Callable[[TrainState, int], None],
) -> TrainState:
    """Trains from a step to the end of the run.

    Args:
      run: what it is made of.
      state: before the first step.
      step: how many steps are done.
      record: of the run so far; ``unfinished`` is taken out of it, and put in where the run is stopped.
      checkpoints: gets the state of a run that is stopped; those at the end of an epoch are ``end_epoch``'s.
      writer: gets the figures of the steps.
      speed: gets the times.
      stop: asked after every step.
      end_epoch: called with state and step after every epoch; may raise ``Stopped``, and is then called again when the
        run goes on.

    Returns:
      The state after the last step.

    Raises:
      UserError: if loss or gradient are no longer numbers.
      Stopped: after saving.
    """
    config, per_epoch = run.config, run.sampler.steps_per_epoch
    data = config.data
    unfinished = record.pop("unfinished", {})  # of a run that was stopped
    batches = pipeline.train_batches(
        run.splits.train,
        run.sampler,
        run.train_transform,
        seed=config.seed,
        start=step,
        stop=run.total_steps,
        channels=data.channels,
        host=jax.process_index(),
        hosts=jax.process_count(),
        threads=data.threads,
        prefetch=data.prefetch,
        workers=data.workers,
    )
    progress = writer.progress(run.total_steps, step)

    def broken(found: watch.Broken) -> None:
        raise UserError(_broken(run, found, checkpoints))

    window = watch.Window(broken, unfinished.get("window"))
    checks = watch.debug_checks(config.debug)
    train_step = steps.jit_checked_train_step if {"nans", "infs"} & set(checks) else steps.jit_train_step
    warmup = config.optim.warmup_epochs * per_epoch
    pending = unfinished.get("end_epoch", False)
    try:
        if pending:
            end_epoch(state, step)
            pending = False
        for batch in batches:
            place = sharding.shard_batch({k: batch[k] for k in ("image", "label")}, run.mesh)
            try:
                with watch.debugging(checks):
                    state, metrics = train_step(state, place, setup=run.setup, train_trunk=step >= warmup)
            except FloatingPointError as error:  # of the checks
                text = " ".join(str(error).split("\n")[:1])
                broken(watch.Broken(step + 1, f"jax found: {text}", batch["index"]))
            step += 1
            window.add(step, metrics, batch["index"])
            if speed.first_step is None:
                jax.block_until_ready(metrics)
                speed.first_step = time.monotonic() - speed.started
                logger.info("first step done %.1f s after the start", speed.first_step)
                progress.measure(step)
            progress.tick(step)
            last = step == run.total_steps
            end_of_epoch = step % per_epoch == 0 or last
            if step % config.log.every_steps == 0 or end_of_epoch:
                means = window.flush()
                rate, remaining = progress.measure(step)
                if rate > 0 and math.isfinite(rate) and step > 1:
                    speed.rates.append(rate * config.batch_size)
                images = rate * config.batch_size
                writer.write(step, {**{f"train/{k}": v for k, v in means.items()}, "train/images_per_second": images})
                logger.info(
                    "epoch %d/%d  step %d/%d  loss %.4f  %.0f images/s  %s to go",
                    -(-step // per_epoch),
                    config.epochs,
                    step,
                    run.total_steps,
                    means["loss"],
                    images,
                    format_seconds(remaining),
                )
            if end_of_epoch:
                paused, pending = time.monotonic(), True
                end_epoch(state, step)
                pending = False
                progress.pause(time.monotonic() - paused)
            stop.check()
    except Stopped:
        if checkpoints.newest != step and step:
            record["unfinished"] = {"window": window.state(), "end_epoch": pending}
            writer.sync()
            checkpoints.save_stopped(step, state, without_nan({**record, "rows": writer.rows}))
        raise
    return state


def _broken(run: Run, found: watch.Broken, checkpoints: Checkpoints) -> str:
    """What to tell of a step that gave no numbers; its whole batch goes to ``broken_batch.json``."""
    names = [run.splits.train.name(int(record)) for record in found.records]
    path = checkpoints.folder.parent / "broken_batch.json"
    if jax.process_index() == 0:
        write_json(path, {"step": found.step, "what": found.what, "images": names})
    newest = checkpoints.newest
    kept = "there is no checkpoint" if newest is None else f"the last good checkpoint is of step {newest}"
    return (
        f"{found.what} at step {found.step}; its batch has {', '.join(names[:3])} and {len(names) - 3} more images, "
        f"see {path}; {kept} in {checkpoints.folder.parent}; a lower config.optim.learning_rate may help"
    )
