"""Checkpoints: the latest and the best, through Orbax. The only importer of it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from idml_jax.errors import UserError


class Checkpoints:
    """The checkpoints of a run, each a state and a JSON-able record of the run so far.

    Args:
      folder: where they lie.
      metric: what ``best`` goes by; higher is better.
      keep_latest: how many of the newest to keep.
      keep_best: how many of the best to keep.
      read_only: for evaluation; nothing is created.
    """

    def __init__(
        self, folder: Path, metric: str, *, keep_latest: int = 1, keep_best: int = 1, read_only: bool = False
    ):
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
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "record": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest metric, the newest if none was measured."""
        measured = [s for s in self._manager.all_steps() if self._manager.metrics(s)]
        if not measured:
            return self.latest
        return max(measured, key=lambda s: (float(self._manager.metrics(s)[self.metric]), s))

    def save(self, step: int, state: Any, record: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Saves in the background; a file is there whole or not at all."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), record=ocp.args.JsonSave(record)),
            metrics=metrics,
            force=True,
        )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and record of a step.

        Args:
          step: of an existing checkpoint.
          like: a state of the same structure, whose shapes, types and placement the restored one gets.

        Returns:
          The state and the record.

        Raises:
          UserError: if the checkpoint is of another architecture or cannot be read.
        """
        where = f"{self.folder}, step {step}"
        try:
            stored = self._manager.item_metadata(step)["state"]
        except Exception as error:
            raise UserError(f"checkpoint {where}: cannot be read ({_first_line(error)})") from error
        problems = _differences(_shapes(getattr(stored, "tree", stored)), _shapes(like))
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(f"checkpoint {where} is of another architecture: {'; '.join(problems[:3])}{more}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
                    ),
                    record=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:
            raise UserError(f"checkpoint {where}: cannot be read ({_first_line(error)})") from error
        return restored["state"], restored["record"]

    def wait(self) -> None:
        """Until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and lets go."""
        self._manager.close()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
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
    """Whether the folder of a run's checkpoints has any."""
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def save_variables(folder: Path, variables: dict[str, Any]) -> None:
    """Writes ``params`` and ``batch_stats`` alone, without optimizer or record, whole or not at all.

    Args:
      folder: new.
      variables: nested dictionaries of arrays.
    """
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), variables)


def find_state(path: Path, metric: str) -> Path:
    """The folder of a stored tree.

    Args:
      path: what ``save_variables`` wrote, one checkpoint of a run, its folder ``checkpoints``, or the run's folder.
      metric: what the best of a run goes by.

    Returns:
      The folder to read; of a run, that of its best checkpoint.

    Raises:
      UserError: if there is none.
    """
    path = Path(path).absolute()
    if (path / "_METADATA").is_file():
        return path
    if (path / "state").is_dir():
        return path / "state"
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not has_checkpoints(folder):
        raise UserError(f"{path}: neither weights of this package nor the folder of a run with checkpoints")
    checkpoints = Checkpoints(folder, metric, read_only=True)
    try:
        return folder / str(checkpoints.best) / "state"
    finally:
        checkpoints.close()


def read_variables(folder: Path) -> dict[str, Any]:
    """``params`` (of ``trunk`` and ``heads``) and ``batch_stats`` of a stored tree, as numpy arrays.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            params = {k: v for k, v in stored["params"].items() if k in ("trunk", "heads")}
            wanted = {"params": params, "batch_stats": stored.get("batch_stats", {})}
            item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), wanted)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            return checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            )
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({_first_line(error)})") from error
