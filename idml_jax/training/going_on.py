"""Going on with a run: which settings may differ from those it was started with, and training for more epochs."""

import itertools
import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.runtime.files import write_json
from idml_jax.training import workdir as workdir_lib

logger = logging.getLogger("idml_jax")

RESUME = ("auto", "longer", "never")
LENGTH = ("epochs", "max_steps")


def check(resume: str, config: ConfigDict, workdir: Path) -> None:
    """Checks how to treat a run that the workdir holds.

    Args:
      resume: ``auto`` goes on with a stopped run of the same settings; ``longer`` also allows more epochs, for stopped
        and for finished runs; ``never`` refuses a workdir with a run.
      config: settings as wanted now.
      workdir: folder of the run.

    Raises:
      UserError: for another value, and if the workdir does not hold what is wanted.
    """
    if resume not in RESUME:
        raise UserError(f"--resume={resume}; known: {', '.join(RESUME)}")
    there = (workdir / "config.json").exists()
    if resume == "never" and there:
        raise UserError(f"{workdir} holds a run (--resume=never); use another --workdir")
    if resume != "longer":
        return
    if not there:
        raise UserError(f"{workdir} holds no run that could go on (--resume=longer)")
    stored = workdir_lib.read(workdir)
    if config.epochs < stored.epochs or _steps(config) < _steps(stored):
        raise UserError(
            f"--resume=longer: config.epochs = {config.epochs} and config.max_steps = {config.max_steps} ask for "
            f"less than the run had, {stored.epochs} and {stored.max_steps}"
        )


def _steps(config: ConfigDict) -> float:
    return config.max_steps or float("inf")


def lengthen(config: ConfigDict, workdir: Path) -> None:
    """Gives a run in a workdir its new length; the result of the shorter one is kept beside it.

    Raises:
      UserError: if other settings differ.
    """
    stored = workdir_lib.read(workdir)
    differing = workdir_lib.differences(config, workdir)
    if not differing:
        return
    workdir_lib.refuse([line for field, line in differing.items() if field not in LENGTH], workdir)
    finished = workdir / "result.json"
    if finished.exists():
        kept = _unused(workdir, _length(stored).replace(" ", "_"))
        finished.replace(kept)
        logger.info("the result of %s is kept in %s", _length(stored), kept)
    values: dict[str, Any] = {**stored.to_dict(), **{field: config[field] for field in LENGTH}}
    write_json(workdir / "config.json", values)
    logger.info("going on with %s in place of %s: %s", _length(config), _length(stored), _schedule(config))


def _length(config: ConfigDict) -> str:
    """The length of a run in words: its steps where their number is limited."""
    return f"{config.max_steps} steps" if config.max_steps else f"{config.epochs} epochs"


def _unused(workdir: Path, length: str) -> Path:
    """A name for an earlier result that no other one has."""
    path = workdir / f"result_{length}.json"
    for number in itertools.count(2):
        if not path.exists():
            break
        path = workdir / f"result_{length}_{number}.json"
    return path


def _schedule(config: ConfigDict) -> str:
    name = config.optim.schedule
    if name == "cosine":
        return "the learning rate now follows the cosine over all of them, so it rises where the shorter run had ended"
    return f"the schedule {name} of the learning rate goes on as it was"
