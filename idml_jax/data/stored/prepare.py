"""Stores a downloaded data set as a tfds set of array_record files, which allow random access in training."""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from idml_jax.data.datasets import default_data_dir
from idml_jax.data.files import expand, shown
from idml_jax.data.stored import layouts, layouts_classification, layouts_retrieval, layouts_tfds, shards
from idml_jax.data.stored.benchmarks import BENCHMARKS, differences
from idml_jax.data.stored.layouts import Listed, Plan
from idml_jax.data.stored.prepared import PREFIX
from idml_jax.errors import UserError
from idml_jax.runtime.progress import Ticker

LAYOUTS: dict[str, Callable[[Path], Plan]] = {
    "cub": layouts_retrieval.cub,
    "cars": layouts_retrieval.cars,
    "sop": layouts_retrieval.sop,
    "inshop": layouts_retrieval.inshop,
    "market": layouts_retrieval.market,
    "inaturalist": layouts_retrieval.inaturalist,
    "cifar10": layouts_classification.cifar10,
    "cifar100": layouts_classification.cifar100,
    "imagenet": layouts_classification.imagenet,
    "folder": layouts.folder,
}


def prepare(
    dataset: str,
    source: str | Path,
    data_dir: str | Path = "",
    *,
    name: str = "",
    allow_incomplete: bool = False,
    on_corrupt: str = "refuse",
    shard_megabytes: int = 256,
    say: Callable[[str], None] = print,
) -> Path:
    """Stores a data set, or resumes storing it.

    Args:
      dataset: key of ``LAYOUTS``.
      source: folder or archive.
      data_dir: folder of data sets; empty: ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.
      name: name of the set, for image folders; by default that of the source.
      allow_incomplete: store the set even if its counts are not the benchmark's.
      on_corrupt: ``refuse`` or ``skip`` files that are not complete images.
      shard_megabytes: size of a record file in MB; a stopped run loses at most one per split.
      say: receives lines about the progress.

    Returns:
      Folder of the stored set.

    Raises:
      UserError: if the source has no known layout, is damaged or incomplete, or the disk is too small.
    """
    if dataset not in LAYOUTS:
        raise UserError(f"--dataset={dataset}; known: {', '.join(LAYOUTS)}")
    if on_corrupt not in ("refuse", "skip"):
        raise UserError(f"--on_corrupt={on_corrupt}; known: refuse, skip")
    if shard_megabytes < 1:
        raise UserError(f"--shard_megabytes={shard_megabytes} must be at least 1")
    source = expand(source).resolve()
    root = expand(data_dir or default_data_dir())
    home = root / (PREFIX + dataset)
    if dataset == "folder":
        name = name or re.sub(r"\W+", "_", source.name.split(".")[0]).strip("_")
        if not re.fullmatch(r"\w+", name):
            raise UserError(f"--name={name!r}: letters, digits and _ only")
        home /= name
    elif name:
        raise UserError(f"--name={name} is for --dataset=folder only")
    final = home / shards.VERSION
    if final.exists():
        say(f"{final} is already prepared; delete that folder to prepare it again")
        return final
    title = BENCHMARKS[dataset].title if dataset in BENCHMARKS else f"image folder {name}"
    if not source.exists():
        raise UserError(f"{source}: no such file or folder (--source)")
    tell = lambda line: say(shown(line))
    tell(f"{title}: looking at {source}")
    plan = layouts_tfds.plan(dataset, source) if layouts_tfds.is_tfds(source) else LAYOUTS[dataset](source)
    for line in plan.notes:
        tell(line)
    tell(f"found {plan.layout}: {len(plan.class_names):,} classes{_listed(plan)}")
    _check_room(source, root)
    job = _Job(dataset, title, source, home, allow_incomplete, on_corrupt, shard_megabytes * 2**20)
    try:
        with shards.locked(home):
            return _store(job, plan, tell)
    except OSError as error:
        where = error.filename or home
        raise UserError(
            f"{where}: cannot be written ({error.strerror or error}); rerun the same command to resume"
        ) from error


class _Job(NamedTuple):
    """What to store, and how.

    Attributes:
      dataset: key of ``LAYOUTS``.
      title: full name of the data set.
      source: folder or archive.
      home: folder of the set.
      allow_incomplete: store the set even if its counts are not the benchmark's.
      on_corrupt: ``refuse`` or ``skip`` files that are not complete images.
      shard_bytes: size of a record file in bytes.
    """

    dataset: str
    title: str
    source: Path
    home: Path
    allow_incomplete: bool
    on_corrupt: str
    shard_bytes: int


def _store(job: _Job, plan: Plan, say: Callable[[str], None]) -> Path:
    final = job.home / shards.VERSION
    if final.exists():  # another process was faster
        return final
    state = job.source.stat()
    identity = {
        "dataset": job.dataset,
        "source": str(job.source),
        "on_corrupt": job.on_corrupt,
        "file": [state.st_size, int(state.st_mtime)] if job.source.is_file() else None,
    }
    options = (job.home, PREFIX + job.dataset, plan, identity, job.shard_bytes)
    writer = shards.SetWriter(*options)
    if writer.started_over:
        say("the source or the settings are not those of the stopped run; starting over")
    if writer.resumed:
        say(f"resuming after {writer.resumed:,} images")
    try:
        with contextlib.closing(_Report(plan, writer.resumed, say)) as report:
            stored = writer.write(job.on_corrupt, report)
    except shards.SourceChangedError:
        say("the source has changed since the stopped run; starting over")
        writer = shards.SetWriter(*options, start_over=True)
        with contextlib.closing(_Report(plan, 0, say)) as report:
            stored = writer.write(job.on_corrupt, report)
    wrong = _shortcomings(job.dataset, plan, stored)
    if wrong and not job.allow_incomplete:
        raise UserError(
            f"{job.source} is not the complete {job.title}: {'; '.join(wrong)}. Nothing is published; rerun "
            "the same command to resume once the missing files are there, or with --allow_incomplete"
        )
    empty = [s for s in plan.splits if not stored.counts[s].images]
    if empty:
        raise UserError(f"{job.source}: no readable images for {', '.join(empty)}")
    for phrase in wrong:
        say(f"incomplete: {phrase}")
    about = {
        "dataset": job.dataset,
        "layout": plan.layout,
        "complete": not wrong,
        "counts": {split: count._asdict() for split, count in stored.counts.items()},
        "skipped": stored.skipped,
    }
    folder = writer.publish(f"{job.title}, prepared from {plan.layout}", about)
    say(", ".join(f"{s}: {c.images:,} images of {c.classes:,} classes" for s, c in stored.counts.items()))
    say(f"{'complete; ' if job.dataset in BENCHMARKS and not wrong else ''}stored in {folder}")
    return folder


def _listed(plan: Plan) -> str:
    if plan.listed is None:
        return ""
    return ", " + ", ".join(f"{split} {count:,}" for split, count in plan.listed.items()) + " images"


def _shortcomings(dataset: str, plan: Plan, stored: shards.Stored) -> list[str]:
    """The reasons why a stored set is incomplete, one phrase each."""
    wrong = differences(dataset, stored.counts)
    for split, count in (plan.listed or {}).items():
        if stored.counts[split].images != count and dataset not in BENCHMARKS:
            wrong.append(f"{split}: {stored.counts[split].images:,} of {count:,} images")
    if isinstance(plan.records, Listed) and plan.records.missing:
        missing = plan.records.missing
        wrong.append(f"{len(missing):,} listed images are missing, the first {missing[0]}")
    if stored.skipped:
        wrong.append(f"{len(stored.skipped):,} files are not complete images, the first {stored.skipped[0]}")
    return wrong


def _check_room(source: Path, root: Path) -> None:
    """Raises if the disk is too small: the set needs about as much space as an archive of its images."""
    if not source.is_file():
        return
    above = root
    while not above.exists():
        above = above.parent
    free, needed = shutil.disk_usage(above).free, source.stat().st_size
    if free < needed:
        raise UserError(f"{root}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed (--data_dir)")


class _Report:
    """Reports progress every few seconds."""

    def __init__(self, plan: Plan, resumed: int, say: Callable[[str], None], seconds: float = 5.0):
        self._total = sum(plan.listed.values()) if plan.listed else None
        self._listed: Mapping[str, int] = plan.listed or {}
        self._resumed, self._ticker = resumed, Ticker(say, seconds)
        self._start = time.monotonic()

    def close(self) -> None:
        """Ends the line of the progress."""
        self._ticker.close()

    def __call__(self, progress: shards.Progress) -> None:
        if not self._ticker.due():
            return
        rate = progress.fresh / (time.monotonic() - self._start)
        of = lambda split: f" of {self._listed[split]:,}" if split in self._listed else ""
        line = ", ".join(f"{split} {done:,}{of(split)}" for split, done in progress.done.items())
        left = ""
        if self._total is not None:
            left = f", {max(self._total - self._resumed - progress.fresh, 0) / rate:.0f} s to go"
        self._ticker.show(f"{line} ({rate:,.0f} images/s{left})")
