"""The latest and the best checkpoints of a run, through Orbax. The only importer of Orbax.

A run that is stopped between two checkpoints saves an additional one in the folder ``stopped``, next to
``checkpoints``; it is removed once a later checkpoint is on disk. An unreadable checkpoint is moved to ``damaged``, and
the previous one is used. With several processes each one reads by itself; then all are told whether one of them failed.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree, Shaped
from orbax.checkpoint import checkpoint_managers

from idml_jax.errors import UserError
from idml_jax.runtime import hosts
from idml_jax.runtime.files import first_line

logger = logging.getLogger("idml_jax")

Record: TypeAlias = dict[str, Any]  # what JSON can express
Variables: TypeAlias = dict[str, PyTree[Shaped[jax.Array | np.ndarray, "..."]]]  # as ``model.apply`` takes them
State = TypeVar("State")  # a tree of arrays; a restored one has the structure of the given one

_HANDLERS = {"state": ocp.PyTreeCheckpointHandler, "record": ocp.JsonCheckpointHandler}


class DamagedError(UserError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of a run. Each holds a state and a JSON-serialisable record of the run so far.

    Args:
      folder: folder of the checkpoints.
      metric: name of the metric that decides which is best; higher is better.
      keep_latest: number of the newest checkpoints to keep.
      keep_best: number of the best checkpoints to keep.
      read_only: write nothing (for evaluation).
    """

    def __init__(self, folder: Path, metric: str, *, keep_latest: int = 1, keep_best: int = 1, read_only: bool = False):
        self.folder, self.metric = Path(folder).absolute(), metric
        score = lambda metrics: float(metrics[metric])
        # Not max_to_keep with best_fn: that deletes the newest checkpoint when it is not among the best.
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_latest),
                checkpoint_managers.BestN(get_metric_fn=score, n=keep_best, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else keep,
            best_fn=score,
            best_mode="max",
            create=not read_only,
            read_only=read_only,
        )
        self._tried: list[str] = []
        # One process moves damaged checkpoints before the others look.
        if read_only or jax.process_index() == 0:
            for step in steps_of(self.folder):
                self._check_metrics(step, read_only)
        hosts.wait("metrics of the checkpoints")
        self._manager = _manager(self.folder, options)
        self._stopped = self.folder.parent / "stopped"

    def _check_metrics(self, step: int, read_only: bool) -> None:
        """Sets a checkpoint with a damaged metrics file aside: Orbax reads these files of all checkpoints at once."""
        path = self.folder / str(step) / "metrics" / "metrics"
        try:
            json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            damage = DamagedError(f"checkpoint {self.folder}, step {step}: cannot be read ({path}: {error})")
            if read_only:
                raise damage from error
            self._set_aside(self.folder, step, damage)

    def _set_aside(self, folder: Path, step: int, damage: DamagedError) -> None:
        self._tried.append(str(damage))
        if jax.process_index() != 0:
            return
        aside = _move_aside(folder / str(step), self.folder.parent / "damaged")
        logger.warning("warning: %s; moved to %s, trying the previous one", damage, aside)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def newest(self) -> int | None:
        """Step of the newest state, including the one saved by a stopped run."""
        return max([*self._manager.all_steps(), *steps_of(self._stopped)], default=None)

    @property
    def by_metric(self) -> list[int]:
        """Steps in descending order of the metric; only the newest one if no metric was measured."""
        scores = {step: self._score(step) for step in self._manager.all_steps()}
        measured = sorted(((score, step) for step, score in scores.items() if score is not None), reverse=True)
        return [step for _, step in measured] or sorted(scores)[-1:]

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest metric; the newest if no metric was measured."""
        return next(iter(self.by_metric), None)

    def _score(self, step: int) -> float | None:
        try:
            return float(self._manager.metrics(step)[self.metric])
        except Exception:  # not measured, or the file is damaged
            return None

    def save(self, step: int, state: PyTree, record: Record, metrics: dict[str, float] | None) -> None:
        """Saves a checkpoint in the background; it is either complete or absent.

        Raises:
          UserError: if this checkpoint or the previous one cannot be written.
        """
        with self._writing(step):
            self._manager.wait_until_finished()
            self._forget_stopped()
            self._manager.save(step, args=_save_args(state, record), metrics=metrics, force=True)

    def save_stopped(self, step: int, state: PyTree, record: Record) -> None:
        """Saves the state of a run that is being stopped, and waits until it is on disk.

        Raises:
          UserError: if it cannot be written.
        """
        with self._writing(step):
            self._manager.wait_until_finished()
            manager = _manager(self._stopped, ocp.CheckpointManagerOptions(max_to_keep=1))
            try:
                manager.save(step, args=_save_args(state, record), force=True)
                manager.wait_until_finished()
            finally:
                manager.close()

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {self.folder} ({_reason(error)}); what was saved "
                "before is whole, and once that is fixed, rerun the same command to resume from there"
            ) from error

    def _forget_stopped(self) -> None:
        """Removes the state written by ``save_stopped`` once a later checkpoint exists."""
        stopped = steps_of(self._stopped)
        if stopped and jax.process_index() == 0 and (self.latest or 0) >= stopped[-1]:
            shutil.rmtree(self._stopped, ignore_errors=True)

    def resume(self, like: State) -> tuple[State, Record] | None:
        """The newest readable state and its record; ``None`` if nothing was saved yet.

        An unreadable checkpoint is moved to the folder ``damaged``, with a warning, and the previous one is tried.

        Args:
          like: as for ``restore``.

        Raises:
          UserError: if no checkpoint is readable, or the newest one has another architecture.
        """
        while True:
            regular, stopped = self.latest, next(iter(steps_of(self._stopped)[::-1]), None)
            if regular is None and stopped is None:
                break
            from_stopped = stopped is not None and stopped > (regular or -1)
            folder = self._stopped if from_stopped else self.folder
            step = max(-1 if s is None else s for s in (regular, stopped))
            try:
                return _restore(folder, step, like)
            except DamagedError as error:
                self._set_aside(folder, step, error)
            hosts.wait(f"the damaged checkpoint {step}")
            if not from_stopped:
                self._manager.reload()
        if self._tried:
            raise UserError(f"{self._tried[0]}, and there is no older one; use another --workdir to start a new run")
        return None

    def restore(self, step: int, like: State) -> tuple[State, Record]:
        """Reads the state and the record of one step.

        Args:
          step: of an existing checkpoint.
          like: a state of the same structure, whose shapes, types and placement the restored one gets.

        Returns:
          The state and the record.

        Raises:
          UserError: if the checkpoint has another architecture.
          DamagedError: if it cannot be read.
        """
        return _restore(self.folder, step, like)

    def wait(self) -> None:
        """Waits until everything saved is on disk.

        Raises:
          UserError: if it cannot be written.
        """
        with self._writing(self.latest or 0):
            self._manager.wait_until_finished()
            self._forget_stopped()

    def close(self) -> None:
        """Waits until everything is on disk and closes the manager.

        Raises:
          UserError: if what was saved cannot be written.
        """
        with self._writing(self.latest or 0):
            self._manager.close()


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    handlers = {name: handler() for name, handler in _HANDLERS.items()}
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


def _restore(folder: Path, step: int, like: State) -> tuple[State, Record]:
    """As ``Checkpoints.restore``; fails on all processes if one of them cannot read the checkpoint."""
    damage = None
    try:
        restored = _restore_alone(folder, step, like)
    except DamagedError as error:
        damage = error
    other = hosts.first_of(damage is not None)
    if damage is not None:
        raise damage
    if other is not None:
        raise DamagedError(f"checkpoint {folder}, step {step}: cannot be read by process {other}")
    return restored


def _restore_alone(folder: Path, step: int, like: State) -> tuple[State, Record]:
    # Orbax makes the processes wait for each other after reading, forever if one of them failed.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    where, path = f"{folder}, step {step}", folder / str(step)
    with contextlib.ExitStack() as stack:
        state, record = (
            stack.enter_context(
                ocp.Checkpointer(_HANDLERS[name](multiprocessing_options=alone), multiprocessing_options=alone)
            )
            for name in ("state", "record")
        )
        try:
            stored = state.metadata(path / "state").item_metadata
            if stored is None:
                raise ValueError("no metadata of the state")
        except Exception as error:
            raise DamagedError(f"checkpoint {where}: cannot be read ({_reason(error)})") from error
        problems = _differences(_shapes(getattr(stored, "tree", stored)), _shapes(like))
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"checkpoint {where} is of another architecture: {'; '.join(problems[:3])}{more}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        try:
            return (
                state.restore(path / "state", args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args)),
                record.restore(path / "record", args=ocp.args.JsonRestore()),
            )
        except Exception as error:
            raise DamagedError(f"checkpoint {where}: cannot be read ({_reason(error)})") from error


def _save_args(state: PyTree, record: Record) -> ocp.args.Composite:
    return ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record))


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder; unfinished ones have other names."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    # ASCII only: str.isdigit accepts a superscript 2, which int() rejects.
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def _move_aside(checkpoint: Path, folder: Path) -> Path:
    """Moves a checkpoint into a folder under an unused name."""
    folder.mkdir(exist_ok=True)
    target, count = folder / checkpoint.name, 1
    while target.exists():
        target, count = folder / f"{checkpoint.name}_{count}", count + 1
    return checkpoint.replace(target)


def _reason(error: Exception) -> str:
    """The message of an exception, or of its cause, as one short line."""
    text = str(error)
    for known in (
        "No space left on device",
        "Read-only file system",
        "File too large",
        "Permission denied",
        "Disk quota exceeded",
    ):
        if known in text:
            return known
    line = first_line(error)
    return line if len(line) <= 200 else line[:200] + " ..."


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of each array of a tree, by its path ``a/b/c``."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
        shapes[name] = tuple(leaf.shape)
    return shapes


def _differences(stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    both = sorted(set(stored) & set(wanted))
    problems = [f"{n} is {stored[n]} there, {wanted[n]} here" for n in both if stored[n] != wanted[n]]
    problems += [f"{n} is missing there" for n in sorted(set(wanted) - set(stored))]
    return problems + [f"{n} is only there" for n in sorted(set(stored) - set(wanted))]


def has_checkpoints(folder: Path) -> bool:
    """Whether a run's folder ``checkpoints``, or ``stopped`` next to it, holds a checkpoint."""
    return bool(steps_of(folder) or steps_of(folder.parent / "stopped"))


def save_variables(folder: Path, variables: Variables) -> None:
    """Writes ``params`` and ``batch_stats`` only, without optimizer state or record, completely or not at all.

    Args:
      folder: folder to create.
      variables: nested dictionaries of arrays.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), variables)


def find_state(path: Path, metric: str) -> Path:
    """Finds the folder of a stored tree of variables.

    Args:
      path: what ``save_variables`` wrote, one checkpoint of a run, its folder ``checkpoints``, or the run's folder.
      metric: name of the metric that decides which checkpoint of a run is best.

    Returns:
      The folder to read; for a run, the folder of its best checkpoint.

    Raises:
      UserError: if there is none.
    """
    path = Path(path).absolute()
    if (path / "_METADATA").is_file():
        return path
    if (path / "state").is_dir():
        return path / "state"
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not steps_of(folder):
        raise UserError(f"{path}: neither weights of this package nor the folder of a run with checkpoints")
    checkpoints = Checkpoints(folder, metric, read_only=True)
    try:
        return folder / str(checkpoints.best) / "state"
    finally:
        checkpoints.close()


def read_variables(folder: Path) -> Variables:
    """``params`` (of ``trunk`` and ``heads``) and ``batch_stats`` of a stored tree, as numpy arrays.

    For a run that keeps moving averages, these are the averages, which evaluation uses.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            averages = (stored.get("opt_state") or {}).get("ema")
            params = {k: v for k, v in stored["params"].items() if k in ("trunk", "heads")}
            latest = {"params": params, "batch_stats": stored.get("batch_stats", {})}
            wanted = {"opt_state": {"ema": averages}} if averages else latest
            item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            found = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            )
            return found["opt_state"]["ema"] if averages else found
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({first_line(error)})") from error
