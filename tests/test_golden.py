"""Compares steps, results, run folders, exported programs and settings with those of version 0.1.0.

On the processor and compiler of the golden numbers the comparison is exact; elsewhere values may differ by rounding,
which training amplifies.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from golden import golden

import idml_jax
from idml_jax import embed, report, search
from idml_jax.inference import store as embeddings
from idml_jax.runtime.files import without_nan
from idml_jax.training import config as config_lib
from idml_jax.training import train
from idml_jax.training.workdir import flatten

GOLDEN = json.loads(golden.file_of(os.environ["IDML_JAX_TESTS"]).read_text())
OLD = json.loads((golden.HERE / "fields_0_1_0.json").read_text())
EXACT = GOLDEN["machine"] == golden.machine()
# The run folders of version 0.1.0 were written with the other options of the compiler.
EXACT_RUNS = EXACT and os.environ["IDML_JAX_TESTS"] == "compiled"
# On another machine: of the metrics of three steps, of the parameters after them, and of the metrics of a short run.
STEP_TOLERANCE, STATE_TOLERANCE, RUN_TOLERANCE = 1e-2, 5e-2, 0.1


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    return {shared: golden.folder(root / str(shared), shared) for shared in (False, True)}


def root_of(roots, changes):
    return roots[changes.get("task") == "classification"]


def assert_same(got, expected, tolerance, exact=EXACT):
    """Nested dictionaries and lists of numbers."""
    if isinstance(expected, dict):
        assert set(got) == set(expected)
        for key in expected:
            assert_same(got[key], expected[key], tolerance, exact)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, tolerance, exact)
    elif exact or expected is None or isinstance(expected, str):
        assert got == expected
    else:
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)


# Beginnings of the names of metrics that came after version 0.1.0; they are tested where they are made.
ADDED = ("verification/",)


def without_added(metrics):
    """Metrics, or parts of a result that hold such, without those that came later."""
    if isinstance(metrics, list):
        return [without_added(row) for row in metrics]
    return {
        name: without_added(value) if isinstance(value, dict | list) else value
        for name, value in metrics.items()
        if not name.startswith(ADDED)
    }


RARE = ("retrieval_released", "margin_learned", "contrastive_plain", "retrieval_ranking")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in RARE else n for n in sorted(golden.STEPS)]
)
def test_three_steps_of_training(name, roots):
    found, expected = golden.three_steps(name, root_of(roots, golden.STEPS[name])), GOLDEN["steps"][name]
    found = json.loads(json.dumps(found))
    # That version also computed the gradient of frozen normalisation layers, which moved nothing.
    frozen = golden.config_of("", **golden.STEPS[name]).model.batchnorm == "frozen"
    if frozen:
        for metrics in (*found["metrics"], *expected["metrics"]):
            metrics.pop("gradient_norm")
    assert_same(found["metrics"], expected["metrics"], STEP_TOLERANCE)
    assert set(found["state"]) == set(expected["state"])
    for leaf, wanted in expected["state"].items():
        got = found["state"][leaf]
        if EXACT and not (frozen and "opt_state" in leaf and "bn" in leaf):
            assert got["sha256"] == wanted["sha256"], leaf
        elif leaf.startswith("['params']"):
            assert got["norm"] == pytest.approx(wanted["norm"], rel=STATE_TOLERANCE, abs=0.05), leaf


@pytest.mark.parametrize("name", sorted(golden.RUNS))
def test_every_metric_of_a_run(name, roots, tmp_path):
    changes = golden.RUNS[name]
    result = train.train_and_evaluate(golden.config_of(str(root_of(roots, changes)), **changes), tmp_path)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert_same(without_added(golden.metrics_of(stored)), without_added(GOLDEN["results"][name]), RUN_TOLERANCE)
    assert set(stored) == set(json.loads((golden.HERE / "runs" / name / "result.json").read_text()))
    assert result["config"]["task"] == stored["config"]["task"]


@pytest.mark.parametrize("name", sorted(golden.RUNS))
def test_a_run_folder_of_version_0_1_0_works_in_every_door(name, roots, tmp_path):
    root = root_of(roots, golden.RUNS[name])
    workdir = golden.copied(name, root, tmp_path / "run")
    written = json.loads((workdir / "result.json").read_text())
    metrics = json.loads(json.dumps(without_nan(train.evaluate_checkpoint(workdir))))
    # Of that version's metrics all are there, and the same but for the confidence, which uses more scores today.
    assert set(written["best"]) <= set(metrics)
    same = [name for name in written["best"] if not golden.REFITTED.fullmatch(name)]
    assert len(same) > len(written["best"]) - 8
    found, expected = ({name: of[name] for name in same} for of in (metrics, written["best"]))
    assert_same(found, expected, RUN_TOLERANCE, EXACT_RUNS)
    # The same settings: the run is finished and stays as it is.
    again = train.train_and_evaluate(golden.config_of(str(root), **golden.RUNS[name]), workdir)
    assert again["final"] == written["final"]
    vectors = golden.vectors(workdir, tmp_path / "program")
    assert_same(vectors, GOLDEN["vectors"][name], RUN_TOLERANCE)
    out = tmp_path / "x.npz"
    embed.main([f"--workdir={workdir}", f"--images={root / 'test'}", f"--out={out}"])
    index = embeddings.read(out)
    assert len(index.files) == golden.CLASSES * golden.PER_CLASS and index.embedded.uncertainty is not None
    np.testing.assert_allclose(np.linalg.norm(index.embedded.semantic, axis=1), 1, rtol=1e-5)
    search.main([f"--index={out}", f"--query={root / 'test'}", "-k", "2", f"--out={tmp_path / 'answers.jsonl'}"])
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(index.files)
    assert "<h2>" in report.make(workdir, tmp_path / "page.html").read_text()


def test_a_run_stopped_by_version_0_1_0_goes_on_to_the_same_result(roots, tmp_path):
    workdir = golden.copied("stopped", roots[False], tmp_path / "run")
    assert not (workdir / "result.json").exists() and (workdir / "stopped").is_dir()
    assert_same(without_added(golden.resumed(workdir, roots[False])), without_added(GOLDEN["resumed"]), RUN_TOLERANCE)


def test_settings_of_version_0_1_0_are_there_with_their_defaults():
    fields = json.loads(json.dumps(flatten(config_lib.default_config().to_dict())))
    assert {name: fields.get(name, "missing") for name in OLD["fields"]} == OLD["fields"]


def test_public_names_of_version_0_1_0_are_there():
    assert set(OLD["public"]) <= set(idml_jax.__all__)
    assert [name for name in OLD["public"] if getattr(idml_jax, name) is None] == []


@pytest.mark.parametrize("door", sorted(OLD["options"]))
def test_options_of_version_0_1_0_are_there(door):
    words = [*door.split(), "--help"]
    done = subprocess.run([sys.executable, "-m", f"idml_jax.{words[0]}", *words[1:]], capture_output=True, text=True)
    names = set(re.findall(r"-{1,2}(?:\[no\])?([a-zA-Z]\w*)", done.stdout))
    assert {option.lstrip("-") for option in OLD["options"][door]} <= names
