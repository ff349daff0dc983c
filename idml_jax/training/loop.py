"""The loop over the steps of a run: batches in, metrics out, early stops and non-finite losses."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from idml_jax.data import pipeline
from idml_jax.errors import UserError, enough_memory
from idml_jax.runtime import sharding
from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.runtime.compiled import compiling
from idml_jax.runtime.files import without_nan, write_json
from idml_jax.runtime.interrupt import Stopped, StopRequest
from idml_jax.runtime.progress import Progress, Ticker, erase, format_seconds, is_shown
from idml_jax.runtime.writers import MetricWriter
from idml_jax.training import semantic_init, steps, watch
from idml_jax.training.ahead import Ahead
from idml_jax.training.build import Run
from idml_jax.training.state import TrainState
from idml_jax.training.tasks.task import Evaluation

logger = logging.getLogger("idml_jax")


class Speed:
    """Measures times of a run for its result."""

    def __init__(self, started: float):
        self.started = started
        self.compiling = compiling()
        self.first_step: float | None = None
        self.rates: list[float] = []

    def summary(self) -> dict[str, float | None]:
        rate = float(np.median(self.rates)) if self.rates else None
        return {
            "seconds_to_first_step": self.first_step,
            "images_per_second": rate,
            "seconds": time.monotonic() - self.started,
        }


@dataclass
class Trainer:
    """A run in progress: its parts, its state, and where its metrics and checkpoints go.

    Attributes:
      run: parts of the run.
      state: state after the steps done so far.
      checkpoints: used to save the state of a stopped run; ``end_epoch`` saves the regular checkpoints.
      writer: writes the metrics of the steps.
      stop: checked after every step.
      end_epoch: called with the trainer after every epoch; may raise ``Stopped``, and is then called again when the
        run resumes.
      speed: records the times.
      record: record of the run so far, saved with every checkpoint: ``untrained`` metrics, ``history`` of the epochs,
        number of ``rows`` of the log, and ``unfinished`` if the run was stopped within an epoch.
      step: steps done so far.
      ahead: the next step, if it is being compiled.
      evaluation: of the network after the last step, once it is measured.
    """

    run: Run
    state: TrainState
    checkpoints: Checkpoints
    writer: MetricWriter
    stop: StopRequest
    end_epoch: Callable[["Trainer"], None]
    speed: Speed
    record: dict[str, Any] = field(default_factory=lambda: {"untrained": None, "history": [], "rows": 0})
    step: int = 0
    ahead: Ahead = field(default_factory=Ahead)
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        self.step = int(self.state.step)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last step belongs to, from 1."""
        return -(-self.step // self.run.sampler.steps_per_epoch)

    @property
    def last(self) -> bool:
        """Whether the last step of the run is done."""
        return self.step == self.run.total_steps

    @property
    def kept(self) -> dict[str, Any]:
        """The record as stored in a checkpoint."""
        return without_nan({**self.record, "rows": self.writer.rows})

    def train(self) -> TrainState:
        """Trains from the current state to the end of the run.

        Returns:
          The state after the last step.

        Raises:
          UserError: if loss or gradient are no longer finite, or if the memory of the device does not suffice.
          Stopped: after saving, if a stop was requested.
        """
        size, devices = self.run.config.batch_size, self.run.mesh.size
        with enough_memory(
            f"config.batch_size = {size} ({size // devices} images a device); a smaller one needs less, and so do "
            "config.optim.accumulate=2 (or more: the same loss, the images in parts), config.model.dtype=bfloat16 and "
            "config.model.remat=True"
        ):
            return self._train()

    def _train(self) -> TrainState:
        config, per_epoch = self.run.config, self.run.sampler.steps_per_epoch
        unfinished = self.record.pop("unfinished", {})  # present if the run was stopped
        window = watch.Window(self._broken, unfinished.get("window"))
        checks = watch.debug_checks(config.debug)
        train_step = steps.jit_checked_train_step if {"nans", "infs"} & set(checks) else steps.jit_train_step
        progress = self.writer.progress(self.run.total_steps, self.step)
        shown = self._shown()
        pending = unfinished.get("end_epoch", False)
        waiting = watch.Waiting(config.data.threads, max(1, config.data.workers))
        try:
            if pending:
                self.end_epoch(self)
                pending = False
            shown.note("compiling")
            for batch in waiting.over(self._batches()):
                placed = sharding.shard_batch({k: batch[k] for k in ("image", "label")}, self.run.mesh)
                self.ahead.wait(self.stop.check)
                try:
                    with watch.debugging(checks):
                        self.state, metrics = train_step(
                            self.state, placed, setup=self.run.setup, train_trunk=self.run.trains_trunk(self.step)
                        )
                except FloatingPointError as error:  # raised by JAX's checks
                    found = " ".join(str(error).split("\n")[:1])
                    self._broken(watch.Broken(self.step + 1, f"jax found: {found}", batch["index"]))
                self.step += 1
                window.add(self.step, metrics, batch["index"])
                if self.speed.first_step is None:
                    jax.block_until_ready(metrics)
                    self.speed.first_step = time.monotonic() - self.speed.started
                    told = "first step done %.1f s after the start; %s"
                    logger.info(told, self.speed.first_step, compiling().since(self.speed.compiling))
                    self.writer.begin()
                    waiting.restart()
                    progress.measure(self.step)
                    shown.restart(self.step)
                else:
                    shown.add(1)
                progress.tick(self.step)
                end_of_epoch = self.step % per_epoch == 0 or self.last
                if self.step % config.log.every_steps == 0 or end_of_epoch:
                    before = time.monotonic()
                    means = window.flush()
                    waiting.computed(time.monotonic() - before)
                    self._log(means, *progress.measure(self.step))
                    if told := waiting.told():
                        logger.warning("warning: %s", told)
                if end_of_epoch:
                    paused, pending = time.monotonic(), True
                    shown.note("evaluating")
                    self.end_epoch(self)
                    pending = False
                    for clock in (progress, shown, waiting):
                        clock.pause(time.monotonic() - paused)
                self.stop.check()
        except Stopped:
            if self.checkpoints.newest != self.step and self.step:
                self.record["unfinished"] = {"window": window.state(), "end_epoch": pending}
                self.writer.sync()
                self.checkpoints.save_stopped(self.step, self.state, self.kept)
            raise
        finally:
            erase()
        return self.state

    def _shown(self) -> Progress:
        """The progress in a terminal or a notebook; a log has the lines of ``_log``."""
        config, total = self.run.config, self.run.total_steps
        ticker = Ticker(lambda line: None, live=jax.process_index() == 0 and is_shown())

        def words(step: int, rate: float) -> str:
            speed = f"{rate * config.batch_size:,.0f} images/s"
            return f"step {step:,} of {total:,}, epoch {self.epoch} of {config.epochs}, {speed}"

        return Progress(total, self.step, ticker, words)

    def _batches(self) -> Iterator[pipeline.Batch]:
        config, run = self.run.config, self.run
        if config.optim.cached_features:
            folder = self.checkpoints.folder.parent
            views = semantic_init.training_features(run, self.state.latest, folder, self.stop.check)
            return views.batches(run.sampler, seed=config.seed, start=self.step, stop=run.total_steps)
        reading = pipeline.Reading(
            run.train_transform,
            channels=config.data.channels,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
            workers=config.data.workers,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
        return pipeline.train_batches(
            run.splits.train, run.sampler, reading, seed=config.seed, start=self.step, stop=run.total_steps
        )

    def _log(self, means: dict[str, float], rate: float, remaining: float) -> None:
        """Writes and logs the mean metrics of the last steps; the speed, if it is not NaN."""
        metrics, told = {f"train/{k}": v for k, v in means.items()}, ""
        if math.isfinite(rate):
            metrics["train/images_per_second"] = images = rate * self.run.config.batch_size
            told = f"  {images:.0f} images/s  {format_seconds(remaining)} to go"
            self.speed.rates.append(images)
        self.writer.write(self.step, metrics)
        logger.info(
            "epoch %d/%d  step %d/%d  loss %.4f%s",
            self.epoch,
            self.run.config.epochs,
            self.step,
            self.run.total_steps,
            means["loss"],
            told,
        )

    def _broken(self, found: watch.Broken) -> None:
        """Raises ``UserError`` about a step with non-finite values; its whole batch goes to ``broken_batch.json``."""
        names = [self.run.splits.train.name(int(record)) for record in found.records]
        workdir = self.checkpoints.folder.parent
        path = workdir / "broken_batch.json"
        if jax.process_index() == 0:
            write_json(path, {"step": found.step, "what": found.what, "images": names})
        newest = self.checkpoints.newest
        kept = "there is no checkpoint" if newest is None else f"the last good checkpoint is at step {newest}"
        raise UserError(
            f"{found.what} at step {found.step}; its batch has {', '.join(names[:3])} and {len(names) - 3} more "
            f"images, see {path}; {kept} in {workdir}; a lower config.optim.learning_rate in another --workdir may help"
        )
