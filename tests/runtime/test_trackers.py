"""TensorBoard's files with and without TensorFlow, and trackers: stubs in place of their packages."""

import json
import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest

from idml_jax.errors import UserError
from idml_jax.reporting import html as pages
from idml_jax.runtime import tensorboard, trackers
from idml_jax.runtime.background import Background
from idml_jax.runtime.trackers import Tracking
from idml_jax.runtime.writers import MetricWriter
from idml_jax.training.config import default_config, tracking_of
from idml_jax.training.config_checks import validate

ROOT = Path(__file__).resolve().parent.parent.parent
# Written by ``open_events``: the rows of steps 1 and 2, and the report of the speed at the last step.
WRITE = (
    "from idml_jax.runtime.tensorboard import open_events; from pathlib import Path\n"
    "w = open_events(Path(OUT)); w.scalars(1, {'eval/R@1': 0.25, 'nan': float('nan')})\n"
    "w.scalars(2, {'eval/R@1': 0.5})\n"
    "s = w.speed(3, w.scalars); s(1); s(3); w.close(True)\n"
)


def events(folder):
    """Tag, step, value and kind of every row of the event files in a folder."""
    from tensorboard.compat.proto import event_pb2
    from tensorboard.util.tensor_util import make_ndarray

    rows = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            for value in event.summary.value:
                tensor, about = value.tensor, value.metadata
                number = make_ndarray(tensor)  # in float_val or, by TensorFlow, also in tensor_content
                assert number.shape == ()
                kind = tensor.dtype, about.plugin_data.plugin_name, about.data_class
                rows.append((value.tag, event.step, number.item(), kind))
    return rows


def without_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


class TestEventFiles:
    def test_without_tensorflow_they_are_written_without_a_word(self, tmp_path, monkeypatch, caplog):
        without_tensorflow(monkeypatch)
        writer = MetricWriter(tmp_path)
        writer.write(1, {"a": 1.0, "b": 2.0})
        progress = writer.progress(2, 0)
        assert not writer._tensorboard.writer  # opened after the first step
        writer.begin()
        while not writer._tensorboard.writer:
            assert writer.tensorboard
        progress.tick(1)
        progress.tick(2)
        assert writer.tensorboard and progress.measure(2)[0] > 0
        writer.close()
        found = events(tmp_path / "tensorboard")
        assert [row[:2] for row in found] == [("a", 1), ("b", 1), ("steps_per_sec", 2), ("uptime", 2)]
        assert {row[3] for row in found} == {(1, "scalars", 1)}  # float, as TensorFlow's scalar summaries
        assert not caplog.records
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": 1.0, "b": 2.0}

    @pytest.mark.slow
    def test_both_writers_write_the_same(self, tmp_path):
        pytest.importorskip("tensorflow", reason="TensorFlow is not installed (extra 'clu')")
        for name, before in (("clu", ""), ("own", "import sys; sys.modules['tensorflow'] = None\n")):
            code = f"{before}OUT = {str(tmp_path / name)!r}\n{WRITE}"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        # Some versions of TensorFlow leave the class of the data to the reader.
        clu, own = (
            [(tag, step, kind[:2]) for tag, step, _, kind in events(tmp_path / name)] for name in ("clu", "own")
        )
        assert clu == own and len(own) == 5
        values = [[row[2] for row in events(tmp_path / name) if row[0] == "eval/R@1"] for name in ("clu", "own")]
        assert values == [[0.25, 0.5]] * 2

    def test_a_writer_that_fails_does_not_end_the_run(self, tmp_path, monkeypatch, caplog):
        without_tensorflow(monkeypatch)
        (tmp_path / "tensorboard").write_text("a file where the folder should be")
        writer = MetricWriter(tmp_path)
        writer.write(1, {"a": 1.0})
        writer.close()
        assert not writer.tensorboard and len(caplog.records) == 1
        assert caplog.text.count("TensorBoard logs: ") == 1 and "the run goes on without it" in caplog.text

    def test_only_the_first_process_writes(self, tmp_path, stubs):
        writer = MetricWriter(tmp_path, active=False, tracking=Tracking(("wandb",)))
        writer.write(1, {"a": 1.0})
        writer.close()
        assert not list(tmp_path.iterdir()) and not stubs


class Recorder:
    """Stands for an object of a tracker's package; notes every call of its methods."""

    def __init__(self, calls, **values):
        self._calls = calls
        self.__dict__.update(values)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: self._calls.append((name, args, options))


@pytest.fixture
def stubs(monkeypatch):
    """The packages of the trackers, replaced by ones that note what they are asked for."""
    calls = []

    def init(**options):
        calls.append(("init", (), options))
        run = Recorder(calls, id=options.get("id"), name=options["name"], step=0)
        run.log = lambda values, step=None: calls.append(("log", values, step))
        return run

    wandb = types.ModuleType("wandb")
    wandb.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))
    wandb.login, wandb.init, wandb.Settings = lambda prompt: True, init, dict
    wandb.Image = lambda image, caption: (image.size, caption)
    wandb.Html = lambda file, inject: file.read()
    trackio = types.ModuleType("trackio")
    trackio.init, trackio.Image = init, lambda image, caption: (image.size, caption)
    trackio.save = lambda path, project: calls.append(("save", path.name, project))
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    entities.Metric = lambda *words: words
    entities.Param = lambda *words: words

    def client():
        made = Recorder(calls)
        made.get_experiment_by_name = lambda name: None
        made.create_experiment = lambda name: f"number of {name}"
        info = types.SimpleNamespace(run_id="r1")
        made.create_run = lambda number, run_name: (
            calls.append(("create_run", number, run_name)) or types.SimpleNamespace(info=info)
        )
        return made

    mlflow.MlflowClient = client
    for name, module in {"wandb": wandb, "trackio": trackio, "mlflow": mlflow, "mlflow.entities": entities}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def write(folder, names, step, finished=True):
    tracking = Tracking(names, "birds", "", {"optim": {"name": "adamw"}})
    writer = MetricWriter(folder, tensorboard=False, tracking=tracking)
    writer.write(step, {"eval/R@1": 0.5})
    writer.close(finished)


class TestTrackers:
    def test_wandb_gets_settings_and_metrics_and_goes_on_when_the_run_resumes(self, tmp_path, stubs):
        write(tmp_path, ("wandb",), 3, finished=False)
        (_, _, first), logged, finish = stubs
        assert first["project"] == "birds" and first["name"] == tmp_path.name and first["dir"] == str(tmp_path)
        assert first["config"] == {"optim": {"name": "adamw"}}
        assert logged == ("log", {"eval/R@1": 0.5}, 3) and finish == ("finish", (), {"exit_code": 1})
        write(tmp_path, ("wandb",), 4)
        assert stubs[3][2]["id"] == first["id"] and stubs[3][2]["resume"] == "allow"
        assert stubs[-1][2] == {"exit_code": 0}

    def test_wandb_without_a_login_is_one_line_and_the_run_goes_on(self, tmp_path, stubs, caplog):
        sys.modules["wandb"].login = lambda prompt: False
        write(tmp_path, ("wandb",), 3)
        assert "warning: wandb: not logged in; wandb login does that" in caplog.text and len(caplog.records) == 1
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 3
        assert not (tmp_path / "trackers.json").exists()

    def test_mlflow_gets_names_that_it_allows(self, tmp_path, stubs):
        write(tmp_path, ("mlflow",), 3)
        created, params, metrics, ended = stubs
        assert created == ("create_run", "number of birds", tmp_path.name)
        assert params[2]["params"] == [("optim.name", "adamw")]
        ((name, value, _, step),) = metrics[2]["metrics"]
        assert (name, value, step) == ("eval/R_at_1", 0.5, 3) and ended[1] == ("r1", "FINISHED")
        write(tmp_path, ("mlflow",), 4, finished=False)
        assert stubs[4] == ("update_run", ("r1",), {"status": "RUNNING"}) and stubs[-1][1] == ("r1", "KILLED")

    def test_trackio_goes_on_by_the_name(self, tmp_path, stubs):
        write(tmp_path, ("trackio",), 3)
        write(tmp_path, ("trackio",), 4)
        assert [call[2]["resume"] for call in stubs if call[0] == "init"] == ["never", "allow"]

    def test_the_report_and_its_plots_go_to_those_that_know_the_run(self, tmp_path, stubs, caplog):
        import numpy as np

        from idml_jax.reporting.plots import encode

        write(tmp_path, ("wandb", "mlflow", "trackio"), 3)
        del stubs[:]
        png = encode(np.zeros((4, 6, 3), np.uint8))
        text = pages.page("t", [pages.plot(png, 'loss & "more"'), pages.tile(png, ["a tile"])])
        page = tmp_path / "report.html"
        page.write_text(text)
        plots = pages.plots_of(text)
        assert plots == [('loss & "more"', png)]
        sys.modules["mlflow"].MlflowClient = lambda: 1 / 0
        trackers.send_page(tmp_path, page, plots)
        logged = [call[1] for call in stubs if call[0] == "log"]
        assert {"report": text, "plots": [((6, 4), 'loss & "more"')]} in logged
        assert {"plots/00": ((6, 4), 'loss & "more"')} in logged and ("save", "report.html", "birds") in stubs
        assert "warning: mlflow: division by zero; the report is not there" in caplog.text

    def test_a_damaged_record_is_left_out(self, tmp_path):
        for text in ("", "[]", '{"wandb": 7}', '{"wandb": {"id": 7, "project": "p", "name": "n"}}', '{"other": {}}'):
            (tmp_path / "trackers.json").write_text(text)
            assert trackers._known(tmp_path) == {}

    def test_one_that_does_not_answer_is_not_waited_for(self, caplog):
        import threading

        held = threading.Event()
        writer = Background("slow", held.wait, patience=0.05)
        writer.scalars(1, {"a": 1.0})
        writer.close()
        held.set()
        assert "slow: does not answer; waited 0 s" in caplog.text


class TestSettings:
    @pytest.mark.parametrize(
        "field,value,message",
        [
            ("trackers", ("wanbd",), r"'wanbd' is unknown; did you mean 'wandb'\? known: wandb, mlflow, trackio"),
            ("trackers", (7,), "must be names"),
            ("name", "mine", r"config.log.name = 'mine' is for trackers, but config.log.trackers is empty"),
            ("project", "birds", "is for trackers, but"),
            ("project", "", "config.log.project is empty"),
        ],
    )
    def test_wrong_ones_are_refused(self, field, value, message):
        config = default_config()
        config.log[field] = value
        with pytest.raises(UserError, match=message):
            validate(config)

    def test_several_may_be_given_in_one_word(self):
        config = default_config()
        config.log.trackers = ("wandb,mlflow", "wandb")
        validate(config)
        assert tracking_of(config).names == ("wandb", "mlflow")

    def test_one_that_is_not_installed_is_refused(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "trackio", None)
        with pytest.raises(UserError, match=r"'trackio', which is not installed; pip install 'idml_jax\[trackio\]'"):
            trackers.check_installed(("trackio",))
        assert not tensorboard.installed("no_such_package_here")


def test_the_report_of_a_finished_run_is_unchanged_without_trackers(caplog, tmp_path):
    caplog.set_level(logging.INFO)
    trackers.send_page(tmp_path, tmp_path / "none.html", [])
    assert not caplog.records
