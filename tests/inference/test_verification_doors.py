"""The doors of verification and of metrics of the whole ranking."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from idml_jax import compare, embed, evaluate, search
from idml_jax.errors import UserError
from idml_jax.inference import reranking
from idml_jax.inference.index import read
from idml_jax.inference.measure import Options, measure
from idml_jax.metrics.retrieval import retrieval_metrics
from idml_jax.metrics.same_class import fit_judge


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


def test_metrics_that_are_undefined_say_why(two_files, capsys, tmp_path):
    x = two_files[0]
    evaluate.main([f"--embeddings={x}", "--no_clustering", "--ks=1,2", "--exclude=labels"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: mAP, CMC@1, CMC@2: undefined (nan), as no query has an image of its class with another value of "
        "labels (--exclude) to find"
    ]
    rows = read(x).semantic
    alone = measure(str(stored(tmp_path / "a.npz", rows, np.arange(24))), options=Options(cluster=False))
    assert "RP, MAP@R: undefined (nan), as no query has an image of its class to find" in alone.warnings
    groups = measure(str(stored(tmp_path / "g.npz", rows, np.arange(24) // 2, group=np.arange(24) // 2)))
    assert any("no query has an image of its class in another group to find" in line for line in groups.warnings)


def test_options_are_checked_and_not_ignored(two_files, capsys):
    x, y = two_files
    words = [f"--embeddings={x}"]
    for value in ("1.5", "0", "nan"):
        for more in ([], [f"--held_out={y}"]):
            told = f"--precision={float(value)}: a share of right answers, above 0 and at most 1"
            one_line(capsys, evaluate.main, [*words, *more, f"--precision={value}"], told)
    one_line(capsys, evaluate.main, [*words, "--precision=0.9"], "--precision is for the threshold", "--held_out")
    one_line(capsys, evaluate.main, [*words, f"--distractors={y}"], "--distractors are for the images of --held_out")
    with pytest.raises(UserError, match="--worst=-1"):
        measure(str(x), options=Options(worst=-1))
    said = []
    measure(str(x), options=Options(temperature=2.0, cluster=False), warn=said.append)
    assert said == [f"{x}: holds no uncertainty, so --temperature and --absolute change nothing"]
    with pytest.raises(UserError, match="--share=1.5: a share above 0 and below 1"):
        compare.compare(None, None, [], 1.5)
    labels = np.arange(24) % 4
    judge = fit_judge(np.eye(4)[labels] + np.random.default_rng(0).normal(size=(24, 4)), labels)
    with pytest.raises(ValueError, match="share: expected a share above 0 and below 1, got 0"):
        judge.probability(np.zeros(2), 0)


UNUSED = {
    "split": (
        dict(split=np.tile(["query", "gallery"], 12)),
        "split is not used, .* is_query and is_gallery .n., true or",
    ),
    "label": (dict(label=np.arange(24)), "label is not used; is it meant as labels. Then rename it"),
    "file_names": (dict(file_names=np.arange(24).astype(str)), "file_names is not used; is it meant as files"),
    "uncertanty": (dict(uncertanty=np.ones((24, 2))), "uncertanty is not used; is it meant as uncertainty"),
    "embeddings": (dict(embeddings=np.ones((24, 5))), "embeddings is not used, as there is semantic"),
    "is_query": (dict(is_query=np.ones(24, bool)), "is_query is not used, as there is no is_gallery"),
    "camera": (dict(camera=np.arange(24), uncertainty_norm=np.ones(24), notes=np.arange(24)), ""),
}


@pytest.mark.parametrize("ending", ["npz", "parquet"])
@pytest.mark.parametrize("name", UNUSED)
def test_arrays_that_are_not_used_are_named(tmp_path, capsys, name, ending):
    more, message = UNUSED[name]
    path, rows = tmp_path / f"x.{ending}", np.random.default_rng(0).normal(size=(24, 5))
    if ending == "npz":
        np.savez(path, semantic=rows, **more)
    else:
        pa.parquet.write_table(pa.table({k: v.tolist() for k, v in {"semantic": rows, **more}.items()}), path)
    read(path)
    told = capsys.readouterr().err
    assert re.search(f"^warning: {path}: {message}", told) and told.count("\n") == 1 if message else not told


def test_marks_of_queries_and_gallery_may_be_numbers(tmp_path):
    rows, query = np.random.default_rng(0).normal(size=(24, 5)), np.arange(24) % 2
    labels = np.arange(24) // 4
    for dtype in (bool, np.int64, np.uint8):
        path = stored(tmp_path / "x.npz", rows, labels, is_query=query.astype(dtype), is_gallery=1 - query)
        assert read(path).marked.tolist() == [[bool(x), not x] for x in query]
        assert measure(str(path), options=Options(cluster=False), warn=lambda line: None).queries == 12
    for wrong, message in ((query * 2, "holds 2 in row 1"), (query.astype(float), r"holds float64 \[24\]")):
        path = stored(tmp_path / "x.npz", rows, labels, is_query=wrong, is_gallery=query)
        with pytest.raises(UserError, match=f"is_query {message}; it should be true or false, or 1 or 0"):
            read(path)


def test_several_labels_of_embeddings_name_the_array_for_them(tmp_path):
    rows, both = np.eye(4), np.asarray([[0, 1], [0, 2], [1, 2], [2, 0]])
    with pytest.raises(
        UserError, match=r"labels has the shape \(4, 2\), .* should be \[n\]; several .* label_sets \[n, l\]"
    ):
        read(stored(tmp_path / "x.npz", rows, both))
    for labels in ([["a", "b"]] * 4, [["a"]] * 3 + [["a", "b"]]):
        pa.parquet.write_table(pa.table({"semantic": rows.tolist(), "labels": labels}), tmp_path / "x.parquet")
        with pytest.raises(UserError, match=r"several labels of an image are label_sets \[n, l\], numbers of class_na"):
            read(tmp_path / "x.parquet")
    found = read(stored(tmp_path / "x.npz", rows, both[:, 0], label_sets=both))
    np.testing.assert_array_equal(found.embedded.sets, both)


def test_two_images_and_a_table_of_pairs_are_compared(finished, image_folder, tmp_path, capsys):
    run, test = f"--workdir={finished[0]}", image_folder / "test"
    one, other = test / "class_05" / "00.png", test / "class_05" / "01.png"
    held_out = tmp_path / "held_out.npz"
    embed.main([run, "--split=test", f"--out={held_out}"])
    capsys.readouterr()
    compare.main([str(one), str(one), run])  # the held-out images are those of the run
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("same: probability 1.000, score ") and "96 test images of the run" in told[1]
    (tmp_path / "bad.png").write_bytes(b"no image")
    cells = [(one, one), (one, other), (one, test / "class_08" / "00.png"), (one, "bad.png"), ("none.png", one)]
    lines = "".join(f"{a},{b},row {i}\n" for i, (a, b) in enumerate(cells))
    (tmp_path / "pairs.csv").write_text("left,right,note\n" + lines)
    words = [f"--pairs={tmp_path / 'pairs.csv'}", run, f"--held_out={held_out}", "--fmr=0.05"]
    compare.main([*words, f"--out={tmp_path / 'a.tsv'}"])
    assert "2 cannot be compared, the first " in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "a.tsv").open(), delimiter="\t"))
    assert [row["note"] for row in rows] == [f"row {i}" for i in range(5)]
    assert [bool(row["problem"]) for row in rows] == [False, False, False, True, True]
    assert (rows[0]["same"], float(rows[0]["probability"]), rows[3]["same"]) == ("yes", 1.0, "")
    assert "bad.png: not an image" in rows[3]["problem"] and "none.png: no such file" in rows[4]["problem"]
    likely, scores = ([float(row[name]) for row in rows[1:3]] for name in ("probability", "score"))
    assert (likely[0] > likely[1]) is (scores[0] > scores[1])
    compare.main([*words, "--share=0.01"])
    told = capsys.readouterr().out
    assert told.count("probability") == 4 and f"{likely[0]:.3f}" not in told.splitlines()[1]
    one_line(capsys, compare.main, [run, one], "two images or --pairs")
    one_line(capsys, compare.main, [run, one, other, "--fmr=2"], "--fmr=2.0")
    one_line(capsys, compare.main, [run, one, tmp_path / "bad.png", f"--held_out={held_out}"], "bad.png")
    one_line(capsys, compare.main, [run, one, one, f"--held_out={held_out}", "--fmr=1e-6"], "1,000,000 are needed")
    one_line(capsys, compare.main, [run, one, one, f"--held_out={tmp_path / 'no.npz'}"], "no.npz")
    for name, text, parts in (
        ("a.csv", f"{one},{other}\n", ["must name at least two columns"]),
        ("b.csv", "left,right\n", ["lists no pairs"]),
        ("c.csv", f"left,right\n{one}\n", ["c.csv, line 2", "2 values"]),
        ("d.csv", "left,right,same\n1,2,3\n", ["column 'same'"]),
        ("e.csv", 'left,right\n"x,y\n', ["e.csv, line 2"]),
        ("f.csv", "left\0,right\n", ["not UTF-8"]),
        ("g.png", "", [".csv or .tsv"]),
    ):
        (tmp_path / name).write_text(text)
        one_line(capsys, compare.main, [run, f"--pairs={tmp_path / name}"], *parts)


def test_evaluate_and_search_re_rank(two_files, capsys, tmp_path):
    x, y = two_files
    out = tmp_path / "m.json"
    words = [f"--embeddings={x}", f"--gallery={y}", "--no_clustering", "--ks=1,3", f"--out={out}"]
    evaluate.main([*words, "--rerank=reciprocal:k1=6,k2=2"])
    report = json.loads(out.read_text())
    assert {"reranked/R@1", "reranked/P@3", "reranked/MAP@R"} <= set(report)
    # With nothing but the original distance the order is the original one.
    one = read(x).embedded
    plain = reranking.report(reranking.parse("reciprocal:weight=1"), one, None, (1, 3))
    unit = one.semantic / np.linalg.norm(one.semantic, axis=1, keepdims=True)
    wanted = retrieval_metrics(unit, one.labels, ks=(1, 3))
    for name in ("R@1", "R@3", "MAP@R"):
        assert plain[f"reranked/{name}"] == pytest.approx(wanted[name])
    for steps in ("augment:k=3+expand:k=2,alpha=0", "reciprocal"):
        answers = tmp_path / "a.jsonl"
        search.main([f"--index={x}", f"--query={x}", "-k", "3", f"--rerank={steps}", f"--out={answers}"])
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        assert len(rows) == 24 and all(len(row["neighbours"]) == 3 and row["answered"] for row in rows)
        assert all(row["query"] not in [near["file"] for near in row["neighbours"]] for row in rows)
        assert f"re-ranked by {steps}" in capsys.readouterr().out
    for steps, part in (
        ("better", "unknown 'better'"),
        ("expand:z=1", "k, alpha, not 'z'"),
        ("expand:k=2.5", "a whole number"),
        ("reciprocal:weight=2", "weight=2"),
        ("reciprocal:k2=99", "k2 is at most"),
        ("expand+expand", "twice"),
        ("reciprocal+expand", "stands alone"),
        ("expand:alpha=nan", "alpha=nan"),
    ):
        one_line(capsys, evaluate.main, [*words, f"--rerank={steps}"], "--rerank=", part)
    one_line(capsys, search.main, [f"--index={x}", f"--query={y}", "--rerank=expand", "--abstain=0.9"], "--rerank")
