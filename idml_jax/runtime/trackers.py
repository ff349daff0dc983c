"""Trackers of experiments: Weights & Biases, MLflow and trackio. The only importer of them.

A tracker gets the settings, the metrics of ``metrics.jsonl``, and, from ``idml_jax.report``, the page and its plots.
``trackers.json`` in the folder of a run says under which name and identity each tracker knows it, so that a resumed
run goes on there. Servers and accounts are those that the packages' own environment variables and logins name.
"""

import io
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from idml_jax.errors import UserError, printable
from idml_jax.runtime.background import Background
from idml_jax.runtime.files import first_line, write_json
from idml_jax.runtime.tensorboard import installed

logger = logging.getLogger("idml_jax")
PATIENCE = 60.0  # seconds that the end of a run waits for a tracker
RECORD = "trackers.json"
_RECORDING = threading.Lock()  # of RECORD, which the thread of every tracker writes
Picture = tuple[str, bytes]  # a description and the bytes of a PNG


@dataclass(frozen=True)
class Tracking:
    """What trackers are told about a run.

    Attributes:
      names: names of the trackers.
      project: project (MLflow: experiment) that the run belongs to.
      name: name of the run; empty: that of its folder.
      settings: settings of the run, nested.
    """

    names: Sequence[str] = ()
    project: str = "idml_jax"
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """How a tracker knows a run: ``id`` is empty for a run that it has not seen."""

    project: str
    name: str
    id: str = ""


class Tracker(Protocol):
    """A connection to a tracker; ``known`` says how it knows the run."""

    known: Known

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""

    def page(self, path: Path, pictures: Sequence[Picture]) -> None:
        """Stores the page of a report, and its plots."""

    def close(self, finished: bool) -> None:
        """Sends what is left."""


class Wandb:
    """Weights & Biases; ``WANDB_MODE=offline`` writes to the folder of the run alone."""

    def __init__(self, known: Known, folder: Path, settings: Mapping[str, Any]):
        import wandb

        self._wandb: Any = wandb
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in; wandb login does that, WANDB_MODE=offline does without")
        self._run: Any = wandb.init(
            project=known.project,
            name=known.name,
            id=known.id or uuid.uuid4().hex[:8],
            resume="allow",
            dir=str(folder),
            config=dict(settings) or None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE),
        )
        self.known = replace(known, id=self._run.id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; steps that it has from before the run was resumed are the same again."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def page(self, path: Path, pictures: Sequence[Picture]) -> None:
        """Stores the page and its plots as panels."""
        from PIL import Image

        shown = [self._wandb.Image(Image.open(io.BytesIO(png)), caption=text) for text, png in pictures]
        with path.open() as file:
            self._run.log({"report": self._wandb.Html(file, inject=False), **({"plots": shown} if shown else {})})

    def close(self, finished: bool) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """MLflow, at ``MLFLOW_TRACKING_URI`` or where MLflow stores by default."""

    def __init__(self, known: Known, folder: Path, settings: Mapping[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric: Any = Metric
        self._client: Any = MlflowClient()
        if known.id:
            self._client.update_run(known.id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(known.project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(known.project)
            known = replace(known, id=self._client.create_run(number, run_name=known.name).info.run_id)
            params = [Param(name, str(value)[:500]) for name, value in _flat(settings).items()]
            for start in range(0, len(params), 100):  # MLflow's limit
                self._client.log_batch(known.id, params=params[start : start + 100])
        self.known = known

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; MLflow allows no ``@`` in names, so ``R@1`` becomes ``R_at_1``."""
        now = int(time.time() * 1000)
        rows = [self._metric(mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.known.id, metrics=rows)

    def page(self, path: Path, pictures: Sequence[Picture]) -> None:
        """Stores the page and its plots as artifacts."""
        self._client.log_artifact(self.known.id, str(path))
        from PIL import Image

        for number, (_, png) in enumerate(pictures):
            image = Image.open(io.BytesIO(png))
            self._client.log_image(self.known.id, image, artifact_file=f"plots/{number:02d}.png")

    def close(self, finished: bool) -> None:
        """Marks the run as finished, or as one that can be resumed."""
        self._client.set_terminated(self.known.id, "FINISHED" if finished else "KILLED")


class Trackio:
    """trackio, which stores in ``TRACKIO_DIR`` and is looked at with ``trackio show``."""

    def __init__(self, known: Known, folder: Path, settings: Mapping[str, Any]):
        import trackio

        self._trackio: Any = trackio
        self._run: Any = trackio.init(
            project=known.project,
            name=known.name,
            config=dict(settings) or None,
            resume="allow" if known.id else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        # Its runs are found by their names.
        self.known = replace(known, name=self._run.name, id=self._run.name)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        self._run.log(dict(values), step=step)

    def page(self, path: Path, pictures: Sequence[Picture]) -> None:
        """Stores the page among the project's files, and its plots as pictures of the run."""
        from PIL import Image

        self._trackio.save(path, project=self.known.project)
        opened = [self._trackio.Image(Image.open(io.BytesIO(png)), text) for text, png in pictures]
        shown = {f"plots/{number:02d}": image for number, image in enumerate(opened)}
        if shown:
            self._run.log(shown)

    def close(self, finished: bool) -> None:
        """Sends what is left."""
        self._run.finish()


TRACKERS: dict[str, type[Wandb] | type[Mlflow] | type[Trackio]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


def names_of(given: Sequence[str]) -> tuple[str, ...]:
    """The names of trackers in a setting; ``wandb,mlflow`` is two."""
    return tuple(dict.fromkeys(name.strip() for text in given for name in text.split(",") if name.strip()))


def check_installed(names: Sequence[str]) -> None:
    """Checks that the packages of trackers are installed.

    Raises:
      UserError: naming the first that is not.
    """
    for name in names:
        if not installed(name):
            raise UserError(
                f"config.log.trackers names {name!r}, which is not installed; pip install 'idml_jax[{name}]' does that"
            )


def start(tracking: Tracking, folder: Path) -> list[Background]:
    """Opens the trackers of a run, each in a thread of its own."""
    found = []
    for name in tracking.names:
        known = _known(folder).get(name) or Known(tracking.project, tracking.name or folder.resolve().name)
        opened = lambda name=name, known=known: _opened(name, known, folder, tracking.settings)
        found.append(Background(name, opened, PATIENCE))
    return found


def send_page(folder: Path, page: Path, pictures: Sequence[Picture]) -> None:
    """Sends the report of a run to the trackers that know the run; a failure is logged as a one-line warning.

    Args:
      folder: folder of the run.
      page: the page.
      pictures: its plots.
    """
    for name, known in _known(folder).items():
        try:
            tracker = TRACKERS[name](known, folder, {})
            tracker.page(page, pictures)
            tracker.close(True)
            logger.info("report sent to %s", name)
        except (Exception, SystemExit) as error:
            logger.warning("warning: %s: %s; the report is not there", name, printable(first_line(error)))


def mlflow_name(name: str) -> str:
    """The name of a metric as MLflow allows it."""
    return re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"))


def _opened(name: str, known: Known, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    tracker: Tracker = TRACKERS[name](known, folder, settings)
    with _RECORDING:
        record = {**_known(folder), name: tracker.known}
        write_json(folder / RECORD, {other: asdict(known) for other, known in record.items()})
    return tracker


def _known(folder: Path) -> dict[str, Known]:
    """How each tracker knows the run; what is damaged or of an unknown tracker is left out."""
    found = {}
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    for name, value in record.items() if isinstance(record, dict) else ():
        fits = isinstance(value, dict) and set(value) == set(Known.__annotations__)
        if name in TRACKERS and fits and all(isinstance(text, str) for text in value.values()):
            found[name] = Known(**value)
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"a.b": value}``."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
