"""Searches whose queries are partly of classes that the index lacks, from files of embeddings alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

import idml_jax as api
from idml_jax import evaluate, search
from idml_jax.errors import UserError
from idml_jax.inference import index as embeddings
from idml_jax.inference import sureness
from idml_jax.metrics.embedded import Embedded
from idml_jax.reporting import open_set


def stored(folder, name, data, names):
    path = folder / f"{name}.npz"
    arrays = {key: value for key, value in data._asdict().items() if value is not None}
    np.savez(path, **arrays, class_names=np.asarray(names), files=np.asarray([f"{name}{i}" for i in data.labels]))
    return path


@pytest.fixture
def files(tmp_path):
    """An index of eight classes, queries of them, of others, and held-out classes, all by the same recipe."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(32, 8))

    def some(classes, seed, each=12):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(len(classes)), each)
        noise = 0.5 * rng.uniform(0.3, 1.5, (len(labels), 1)) * rng.normal(size=(len(labels), 8))
        return Embedded((centres[classes][labels] + noise).astype(np.float32), labels)

    kinds = {"index": (range(8), 1), "mated": (range(8), 2), "strange": (range(8, 12), 3), "held": (range(12, 32), 4)}
    return {
        kind: stored(tmp_path, kind, some(list(classes), seed), [f"c{i}" for i in classes])
        for kind, (classes, seed) in kinds.items()
    }


def answers(files, query, out, *words):
    search.main([f"--index={files['index']}", f"--query={files[query]}", "-k", "3", f"--out={out}", *words])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_queries_of_unknown_classes_get_no_answers(files, tmp_path, capsys):
    for words in ([f"--held_out={files['held']}"], []):
        out = tmp_path / "a.jsonl"
        rows = answers(files, "strange", out, "--abstain=0.5", *words)
        assert sum(row["answered"] for row in rows) <= 3 and all(row["known"] < 0.9 for row in rows)
        told = capsys.readouterr().out
        assert "no query's class (c8, c9, c10, ...) is in the index, so no answer can be right" in told
        assert "the share of queries of classes that the index lacks is taken as " in told
    rows = answers(files, "mated", out, "--abstain=0.8", f"--held_out={files['held']}")
    answered = [row for row in rows if row["answered"]]
    right = np.mean([row["answer"] == row["class"] for row in answered])
    assert len(answered) > 30 and right > 0.8
    assert f"these queries: {len(answered)} of 96 answered, {right:.1%} rightly" in capsys.readouterr().out
    for row in answered:
        assert row["answer"] == row["neighbours"][0]["class"] and 0 < row["sure"] <= row["known"] < 1
        assert [near["speaks"] for near in row["neighbours"]] == [
            n["class"] == row["answer"] for n in row["neighbours"]
        ]
        shares = [vote["share"] for vote in row["votes"]]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-9
    few = answers(files, "mated", out, "--strangers=0.05", "--balanced", f"--held_out={files['held']}")
    assert 0 < sum(row["answered"] for row in few) < 96
    assert "at most 0.05 of the strangers are to be answered" in capsys.readouterr().out
    search.main([f"--index={files['index']}", f"--query={files['mated']}", f"--out={tmp_path / 'a.html'}"])
    assert "these queries: 96 of 96 answered" in (tmp_path / "a.html").read_text()


def test_held_out_images_search_the_index_too(files):
    held, index = embeddings.read(files["held"]), embeddings.read(files["index"])
    found = sureness.held_out_beside(held, index)
    assert len(found.gallery.labels) == 240 + 96 and not set(found.gallery.labels[240:]) & set(found.queries.labels)
    assert sureness.held_out_beside(index, index).gallery is None
    # The same classes by name are the same, and an image is there once.
    mated = embeddings.read(files["mated"])
    both = sureness.held_out_beside(mated, index)
    assert both.gallery.labels[96:].tolist() == both.queries.labels.tolist()
    assert sureness.held_out_beside(embeddings.read(files["index"]), index).gallery is None
    numbered = replace(held, class_names=embeddings.Numbered(20))
    assert set(sureness.held_out_beside(numbered, index).gallery.labels[240:]) == set(range(20, 28))
    unknown = sureness.held_out_beside(held, replace(index, class_names=None))
    assert (unknown.gallery.labels[240:] == -1).all()


def test_held_out_images_search_distractors_too(files, tmp_path, capsys):
    held, index, strange = (embeddings.read(files[name]) for name in ("held", "index", "strange"))
    found = sureness.held_out_beside(held, index, strange)
    assert len(found.gallery.labels) == 240 + 96 + 48 and found.own.tolist() == list(range(240))
    assert len(set(found.gallery.labels[336:]) - set(found.gallery.labels[:336])) == 4
    np.testing.assert_array_equal(found.gallery.semantic[336:], strange.embedded.semantic)
    # Classes of the same name are the same; the images of the index, and held-out ones, are there once.
    mated = sureness.held_out_beside(held, index, embeddings.read(files["mated"]))
    assert mated.gallery.labels[336:].tolist() == mated.gallery.labels[240:336].tolist()
    for again in (held, index):
        assert len(sureness.held_out_beside(held, index, again).gallery.labels) == 336
    alone = sureness.held_out_beside(index, index, strange)
    assert len(alone.gallery.labels) == 96 + 48 and alone.own.tolist() == list(range(96))
    numbered = sureness.held_out_beside(held, index, replace(strange, class_names=embeddings.Numbered(4)))
    assert len(set(numbered.gallery.labels)) == 32
    several = replace(strange, embedded=strange.embedded._replace(sets=np.zeros((48, 2), int)))
    with pytest.raises(UserError, match="every image needs one class"):
        sureness.held_out_beside(held, index, several)

    out = tmp_path / "a.jsonl"
    plain = answers(files, "mated", out, f"--held_out={files['held']}")
    rows = answers(files, "mated", out, f"--held_out={files['held']}", f"--distractors={files['strange']}")
    assert f"{files['held']} among the images of {files['strange']}, too" in capsys.readouterr().out
    sure = [np.mean([row["sure"] for row in some]) for some in (plain, rows)]
    assert sure[1] != sure[0] and [row["answer"] for row in rows] == [row["answer"] for row in plain]
    # Classes close to the held-out ones make their answers wrong, and so answers less sure.
    noise = 0.5 * np.random.default_rng(5).normal(size=held.embedded.semantic.shape)
    close = held.embedded._replace(semantic=(held.embedded.semantic + noise).astype(np.float32))
    close = str(stored(tmp_path, "close", close, [f"d{i}" for i in range(20)]))
    rivals = answers(files, "mated", out, f"--held_out={files['held']}", f"--distractors={close}")
    assert np.mean([row["sure"] for row in rivals]) < sure[0] - 0.05
    by_hand = api.search(str(files["mated"]), str(files["index"]), 3, held_out=held, distractors=strange)
    assert [one.probability for one in by_hand] == pytest.approx([row["sure"] for row in rows], abs=1e-6)
    found = [f"--embeddings={files['index']}", "--no_clustering", f"--out={tmp_path / 'm.json'}"]
    wrong = []
    for more in ([], [f"--distractors={files['strange']}"]):
        evaluate.main([*found, f"--held_out={files['held']}", *more])
        wrong.append(json.loads((tmp_path / "m.json").read_text())["R-AUROC(confidence)"])
    assert wrong[0] != wrong[1]
    for main in (search.main, evaluate.main):
        capsys.readouterr()
        words = [f"--index={files['index']}", f"--query={files['mated']}"] if main is search.main else found
        with pytest.raises(SystemExit):
            main([*words, f"--distractors={files['strange']}"])
        assert "--distractors are for the images of --held_out" in capsys.readouterr().err


def test_wishes_out_of_range(files, capsys):
    with pytest.raises(SystemExit):
        search.main([f"--index={files['index']}", f"--query={files['mated']}", "--strangers=1.5"])
    assert "--strangers=1.5: a share of answered strangers" in capsys.readouterr().err


def test_evaluate_shows_deviations_behind_their_metrics(files, tmp_path, capsys):
    evaluate.main([f"--embeddings={files['index']}", f"--held_out={files['held']}", f"--out={tmp_path / 'm.json'}"])
    report, told = json.loads((tmp_path / "m.json").read_text()), capsys.readouterr().out
    assert {"vote/top1", "vote/nll", "open_set/TPIR@0.01(confidence)", "open_set/AUROC(vote_share)_std"} <= set(report)
    auroc, deviation = (report[f"open_set/AUROC(confidence){end}"] for end in ("", "_std"))
    assert f"{auroc:.4f} ± {deviation:.4f}" in told and "_std" not in told
    assert report["R-AUROC(vote_share)"] > report["R-AUROC(nearest_distance)"]
    page = open_set.table(report, {"confidence": "<joined>"})
    assert "&lt;joined&gt;" in page and f"{100 * auroc:.1f} %" in page and open_set.table({"R@1": 0.5}, {}) == ""
