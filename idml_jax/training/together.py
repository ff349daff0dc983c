"""One run in several processes, which must train the same, and one command at a time in the folder of a run."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import idml_jax
from idml_jax.errors import UserError
from idml_jax.runtime import files, hosts
from idml_jax.training import data_record, going_on
from idml_jax.training.build import Run
from idml_jax.training.workdir import flatten, remember, remember_places

logger = logging.getLogger("idml_jax")

# Settings that each host may have for itself: where its images are, how they are read, and what only the first logs.
OF_A_HOST = (
    "data.root", "data.image_root", "data.data_dir", "data.threads", "data.prefetch", "data.workers",
    "log.tensorboard", "log.trackers", "log.project", "log.name",
)  # fmt: skip
Facts = dict[str, dict[str, Any]]


def build_same(build: Callable[[ConfigDict], Run], config: ConfigDict) -> Run:
    """Builds a run in all of its processes.

    Raises:
      UserError: in all of them, if one cannot build it, or has other settings, images or versions than the first.
    """
    run = hosts.together(lambda: build(config))
    if jax.process_count() > 1:
        own = facts(run)
        first: Facts = json.loads(hosts.text_of_first(json.dumps(own, sort_keys=True)))
        other = differing(first, json.loads(json.dumps(own)))
        problem = None
        if other:
            problem = UserError(
                f"process {jax.process_index()} would train something else than process 0: {'; '.join(other[:3])}"
                f"{f' and {len(other) - 3} more' if len(other) > 3 else ''}. Give all processes the same"
            )
        hosts.agree(problem)
    return run


def facts(run: Run) -> Facts:
    """What all processes of a run must agree on, as JSON."""
    settings = {k: v for k, v in flatten(run.config.to_dict()).items() if k not in OF_A_HOST}
    parts = {
        name: {key: value for key, value in part.items() if key != "classes"}  # of which there is a digest
        for name, part in data_record.record_of(run.splits).items()
    }
    versions = {"idml_jax": idml_jax.__version__, "jax": jax.__version__}
    return {"config": settings, "images": parts, "classes": {"relation": run.relation}, "version": versions}


def differing(first: Facts, own: Facts) -> list[str]:
    """A phrase for each fact in which a process differs from the first."""
    found = []
    for kind, values in first.items():
        for name in sorted(values.keys() | own[kind].keys()):
            there, here = values.get(name), own[kind].get(name)
            if there == here:
                continue
            if kind == "images":
                count = lambda part: f"{part['images']}" if part else "none"
                found.append(f"other {name} images ({count(there)} there, {count(here)} here)")
            else:
                found.append(f"{kind}.{name} = {there!r} there, {here!r} here")
    return found


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Creates the folder of a run and holds it while it is trained in.

    Raises:
      UserError: in all processes, if it cannot be created or another command trains in it.
    """
    with contextlib.ExitStack() as held:

        def claim() -> None:
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.claimed(workdir, "is training in this folder; use another --workdir"))

        _by_first(claim, workdir)
        yield


def _by_first(write: Callable[[], None], workdir: Path) -> None:
    """Lets the first process write into the workdir; if it cannot, all raise ``UserError``."""

    def written() -> None:
        if jax.process_index() == 0:
            try:
                write()
            except OSError as error:
                raise UserError(f"{workdir}: cannot be used as --workdir ({error.strerror})") from error

    hosts.together(written)


def prepare(workdir: Path, run: Run, resume: str = "auto") -> None:
    """Records settings and data in the workdir, or compares them with those of an existing run.

    With ``resume="longer"`` an existing run gets its new number of epochs. The first host does this; all hosts raise if
    it fails.
    """

    def record() -> None:
        if resume == "longer":
            going_on.lengthen(run.config, workdir)
        remember(run.config, workdir)
        check_data(run, workdir)
        data_record.remember(run.splits, workdir, run.relation)

    _by_first(record, workdir)


def check_data(run: Run, workdir: Path) -> None:
    """Compares the images with those that the run was started with; where the same have moved to is written down."""
    changed = data_record.check(run.splits, workdir, relation=run.relation)
    for line in changed:
        logger.warning("warning: %s: %s", workdir, line)
    if not changed and jax.process_index() == 0:
        for line in remember_places(run.config, workdir):
            logger.info("the images of the run have moved: %s", line)
