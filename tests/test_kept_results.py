"""Results of studies in files: kept, found again, told apart by their settings; published tables are made of them."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "benchmarks" / "experiments"


@pytest.fixture(scope="module")
def kept():
    spec = importlib.util.spec_from_file_location("kept", EXPERIMENTS / "kept.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Kept


def result_of(folder, **final):
    path = folder / "result.json"
    path.write_text(json.dumps({"final": final}))
    return path


def test_a_finished_run_is_kept_once_and_found_by_row_and_seed(kept, tmp_path):
    file = tmp_path / "new" / "runs.jsonl"
    first = kept(file, [])
    first.add("noise/set/plain/seed0", result_of(tmp_path, **{"R@1": 0.1234567, "AURC(uncertainty)": 0.5}))
    first.add("noise/set/plain/seed0", result_of(tmp_path, **{"R@1": 0.9}))
    first.add("noise/set/plain/seed10", result_of(tmp_path, **{"R@1": 0.25}))
    first.add("noise/set/plain+mixup/seed0", result_of(tmp_path, **{"R@1": 0.75}))
    again = kept(file, [])
    assert again.of("noise/set/plain") == {"0": {"R@1": 0.123457}, "10": {"R@1": 0.25}}
    assert "noise/set/plain/seed0" in again and "noise/set/plain/seed1" not in again
    assert len(file.read_text().splitlines()) == 3


def test_runs_with_other_settings_are_other_runs(kept, tmp_path):
    file = tmp_path / "runs.jsonl"
    kept(file, ["b=2", "a=1"]).add("row/seed0", result_of(tmp_path, **{"R@1": 0.5}))
    assert kept(file, ["a=1", "b=2"]).of("row") == {"0": {"R@1": 0.5}}
    assert kept(file, []).of("row") == {}


@pytest.fixture(scope="module")
def label_noise():
    sys.path.insert(0, str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location("label_noise", EXPERIMENTS / "label_noise.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_counts_only_for_the_settings_that_it_had(label_noise, tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"config": {"optim": {"learning_rate": 0.002}, "eval": {"ks": [1, 2]}, "task": "x"}}))
    for wanted in ([], ["optim.learning_rate=0.002", "task=x"], ["eval.ks=(1, 2)"], ["optim.learning_rate=2e-3"]):
        assert label_noise.made_with(result, wanted)
    for wanted in (["optim.learning_rate=0.004"], ["task=x", "eval.ks=(1,)"]):
        assert not label_noise.made_with(result, wanted)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("plain+mixup", None),
        ("ism+mixup", "plain+mixup"),
        ("plain", "plain+mixup"),  # without Mixup
        ("ism", "plain"),
        ("contrastive/plain+mixup", None),
        ("contrastive/ism+mixup", "contrastive/plain+mixup"),
        ("contrastive/ism+mixup, negatives stopped", "contrastive/plain+mixup"),
        ("plain, prism", "plain+mixup"),
        ("ism, prism", "plain, prism"),
        ("plain, rate x 0.5", "plain+mixup"),
        ("released", "plain+mixup"),
    ],
)
def test_which_row_a_row_is_compared_with(label_noise, name, expected):
    rows = ("plain+mixup", "ism+mixup", "plain", "ism", "contrastive/plain+mixup", "plain, prism", "plain, rate x 0.5")
    assert label_noise.peer(name, {row: {} for row in rows}) == expected


@pytest.mark.parametrize(
    "words", [("damage", "omniglot"), ("rates", "birds_imagenet"), ("controls", "omniglot_classes")]
)
def test_tables_that_cannot_be_are_refused(label_noise, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["label_noise.py", f"--table={words[0]}", f"--data={words[1]}", "--list"])
    with pytest.raises(SystemExit):
        label_noise.main()
    assert f"--table={words[0]} is for --data=" in capsys.readouterr().err


def test_without_a_file_or_a_result_nothing_is_written(kept, tmp_path):
    kept(None, []).add("row/seed0", result_of(tmp_path, **{"R@1": 0.5}))
    kept(tmp_path / "runs.jsonl", []).add("row/seed0", tmp_path / "missing.json")
    assert not (tmp_path / "runs.jsonl").exists()


@pytest.mark.parametrize(
    "row",
    [
        *(f"Omniglot | {share} %" for share in (0, 20, 40, 60)),
        "glyphs | 20 %",
        "glyphs | 60 %",
        "birds | 0 %",
        "birds | 40 %",
    ],
)
def test_the_table_of_wrong_labels_is_that_of_the_kept_runs(kept, row):
    runs = kept(EXPERIMENTS / "results" / "label_noise.jsonl", [])
    line = next(
        line for line in (ROOT / "docs" / "wrong_labels.md").read_text().splitlines() if line.startswith(f"| {row}")
    )
    name, noise, seeds, *cells = [cell.strip("* ") for cell in line.strip("| ").split("|")]
    data = {"Omniglot": "omniglot", "glyphs": "glyphs", "birds": "birds_lite"}[name]
    plain, ism = (runs.of(f"noise/{data}/noise{noise.split()[0]}/{metric}+mixup") for metric in ("plain", "ism"))
    assert len(plain) == len(ism) == int(seeds)

    def cell(found, metric):
        values = [100 * run[metric] for run in found.values()]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    gains = [100 * (ism[seed]["R@1"] - plain[seed]["R@1"]) for seed in plain]
    gain = f"{statistics.mean(gains):+.1f} ({statistics.stdev(gains) / len(gains) ** 0.5:.1f})".replace("+0.0", "0.0")
    length = statistics.mean(run["uncertainty_mean"] for run in ism.values())
    expected = [cell(plain, "R@1"), cell(ism, "R@1"), gain, cell(plain, "MAP@R"), cell(ism, "MAP@R"), f"{length:.2f}"]
    assert cells == expected
