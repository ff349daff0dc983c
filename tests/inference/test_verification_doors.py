"""The doors of verification and of metrics of the whole ranking."""

import json

import numpy as np
import pytest

from idml_jax import evaluate


def stored(path, rows, labels, **more):
    np.savez(path, semantic=rows, labels=labels, **more)
    return path


@pytest.fixture
def two_files(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 8)
    rows = (rng.normal(size=(6, 5))[labels] + rng.normal(size=(48, 5))).astype(np.float32)
    names, camera = np.asarray([f"bird {c}" for c in "abcdef"]), rng.integers(0, 2, 48)
    stored(tmp_path / "x.npz", rows[::2], labels[::2], class_names=names, camera=camera[::2])
    stored(tmp_path / "y.npz", rows[1::2], labels[1::2], class_names=names, camera=camera[1::2])
    return tmp_path / "x.npz", tmp_path / "y.npz"


def one_line(capsys, main, words, *parts):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    told = capsys.readouterr().err
    assert stop.value.code == 1 and told.startswith("error: ") and told.count("\n") == 1, told
    assert all(part in told for part in parts), told


def test_evaluate_ranks_all_and_lists_the_worst_classes(two_files, capsys, tmp_path):
    x, y = two_files
    out = tmp_path / "m.json"
    words = [f"--embeddings={x}", f"--gallery={y}", "--no_clustering"]
    evaluate.main([*words, "--ranked", "--exclude=camera", "--worst=2", f"--out={out}"])
    report = json.loads(out.read_text())
    assert {"P@4", "mAP", "CMC@1", "CMC_queries", "verification/EER"} <= set(report)
    told = capsys.readouterr().out
    assert told.count(" queries of bird ") == 2
    evaluate.main([*words, f"--out={out}"])
    assert not {"P@4", "mAP", "CMC@1"} & set(json.loads(out.read_text()))
    one_line(capsys, evaluate.main, [*words, "--exclude=city"], "x.npz", "city", "camera")
    one_line(capsys, evaluate.main, [*words, "--exclude=semantic"], "semantic has the shape (24, 5)")
    one_line(capsys, evaluate.main, [*words, "--worst=-1"], "--worst=-1")
