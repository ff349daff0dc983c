"""Images that are parts of pictures, and images with several labels: in searches, sheets, audits and reports."""

import dataclasses
import json
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import idml_jax
from idml_jax import audit as door
from idml_jax import search as searching
from idml_jax.data import lists
from idml_jax.data.given import images_of
from idml_jax.data.sources import FolderSource
from idml_jax.errors import UserError
from idml_jax.inference import own, store
from idml_jax.inference.audit import _named, audit
from idml_jax.inference.index import Index
from idml_jax.inference.measure import Measured
from idml_jax.inference.search import is_stored
from idml_jax.inference.sureness import held_out_beside, outcome
from idml_jax.metrics import calibration, relevance
from idml_jax.metrics.embedded import Embedded
from idml_jax.reporting import answers, maps, sections
from idml_jax.reporting.seen import Seen

RNG = np.random.default_rng(0)


def of_pictures(folder, count=6):
    """Two images from each picture, left black and right white; image 2n and 2n + 1 share the label n // 2."""
    halves = np.zeros((8, 16, 3), np.uint8)
    halves[:, 8:] = 255
    files = [str(folder / f"{i // 2}.png") for i in range(2 * count)]
    for file in files:
        cv2.imwrite(file, halves)
    boxes = np.asarray([[0, 0, 8, 8] if i % 2 == 0 else [8, 0, 16, 8] for i in range(2 * count)], np.int32)
    first = np.arange(2 * count) // 4
    sets = np.stack([first, np.where(np.arange(2 * count) % 2, (first + 1) % 3, -1)], axis=1)
    vectors = RNG.normal(size=(2 * count, 4)).astype(np.float32)
    return Index(Embedded(vectors, first, sets=sets), np.asarray(files), ["a", "b", "c"], {}, boxes=boxes)


def test_sheets_show_the_part_of_a_picture_that_is_the_image(tmp_path, monkeypatch):
    index = of_pictures(tmp_path)
    read = answers.picture_reader(index, "")
    assert (
        read(str(index.files[0]), index.box_of(0)).max() == 0
        and read(str(index.files[1]), index.box_of(1)).min() == 255
    )
    assert read(str(index.files[0])).shape == (8, 16, 3)
    store.save(index, tmp_path / "x.npz")
    shown = []
    monkeypatch.setattr(answers, "thumbnail", lambda data, within: shown.append(within))
    for out in ("a.html", "a.png", "a.jsonl"):
        words = [f"--index={tmp_path / 'x.npz'}", f"--query={tmp_path / 'x.npz'}", "-k2", f"--out={tmp_path / out}"]
        searching.main(words)
    assert len(shown) == 2 * 3 * len(index) and set(shown) == {(0, 0, 8, 8), (8, 0, 16, 8)}
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1])
    assert row["box"] == [8, 0, 16, 8] and row["classes"] == ["a", "b"] and row["class"] == "a"
    shown.clear()
    door.main([f"--index={tmp_path / 'x.npz'}", f"--out={tmp_path / 'audited'}", "--unusual=0.5", "--pixels"])
    assert len(shown) > len(index) and None not in shown
    found = [json.loads(line) for line in (tmp_path / "audited" / "findings.jsonl").read_text().splitlines()]
    assert found[0]["beside"][0]["box"] in ("0,0,8,8", "8,0,16,8")


def test_an_empty_part_of_a_picture_is_found(tmp_path):
    index = of_pictures(tmp_path)
    half = Index(index.embedded, index.files, index.class_names, {}, boxes=np.where(index.boxes == 8, 4, index.boxes))
    found = audit(half, picture=answers.picture_reader(half, ""), unusual=0)
    assert [finding.row for finding in found.findings if finding.kind == "blank"] == list(range(0, 12, 2))
    assert "(box 4,0,16,4)" in half.name_of(1)


def test_images_in_a_table_are_shown(tmp_path):
    encoded = [cv2.imencode(".png", np.full((4, 4), value, np.uint8))[1].tobytes() for value in (10, 200, 30)]
    images = pa.array([{"bytes": data, "path": name} for data, name in zip(encoded, ("a", "b", "b"), strict=True)])
    parquet.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
    index = Index(
        Embedded(np.eye(3), np.zeros(3, int)),
        np.asarray(["a", "b", "b"]),
        None,
        {"images": str(tmp_path / "t.parquet")},
    )
    read = answers.picture_reader(index, "")
    assert read("a").max() == 10 and read("b") is None  # two have this name


def test_an_image_that_a_table_holds_does_not_find_itself(tmp_path):
    """Its place is a row of the table, through links and other forms of the path, too; of another table it is not."""
    encoded = [cv2.imencode(".png", np.full((4, 4), value, np.uint8))[1].tobytes() for value in (10, 200, 30)]
    images = pa.array([{"bytes": data, "path": None} for data in encoded])
    for name in ("t.parquet", "other.parquet"):
        parquet.write_table(pa.table({"image": images, "label": ["a", "b", "a"]}), tmp_path / name)
    (tmp_path / "linked").symlink_to(tmp_path)
    source = lambda place: lists.list_images(place)[0]
    index, linked, other = (
        Index(Embedded(np.eye(3), np.zeros(3, int)), np.asarray([found.name(row) for row in range(3)]), None, {})
        for found in (source(tmp_path / place) for place in ("t.parquet", "linked/t.parquet", "other.parquet"))
    )
    assert str(index.files[0]).endswith("t.parquet, row 1")
    some = dataclasses.replace(
        linked, embedded=Embedded(np.eye(3)[[2, 0]], np.zeros(2, int)), files=linked.files[[2, 0]]
    )
    assert own.own_rows(index, index).tolist() == [0, 1, 2]
    assert own.own_rows(some, index).tolist() == [2, 0]
    assert own.own_rows(other, index) is None


def test_copies_with_the_same_labels_in_another_order_differ_in_no_class():
    sets = np.asarray([[0, 1], [1, 0], [0, 2]])
    index = Index(Embedded(np.eye(3), sets[:, 0], sets=sets), np.asarray(["a", "b", "c"]), ("x", "y", "z"), {})
    assert _named(index, 0, index, 1) == "" and _named(index, 0, index, 2) == "; their classes differ: x, y and x, z"


def test_a_tile_shows_how_sure_an_answer_is_before_many_classes(tmp_path):
    names = [f"a class with a long name {number}" for number in range(6)]
    near = {"file": "n.png", "class": names[0], "classes": names, "distance": 0.1, "introspective_distance": None}
    row = {
        "query": "q.png", "class": names[0], "classes": names, "answered": True, "answer": names[0], "sure": 0.9,
        "known": 0.8, "uncertainty": 1.0, "margin": 0.5, "neighbours": [near],
    }  # fmt: skip
    page = answers.as_html([row], lambda *_: None, lambda *_: None, "")
    caption = re.search("<figcaption>(.*?)</figcaption>", page)[1].replace("<wbr>", "")
    assert "answer a class with a long name 0, a class with a long name 1 and 4 more<br>sure 90%" in caption
    assert caption.index("margin") < caption.index(", ".join(names))
    one = answers.as_html([{**row, "classes": names[:1]}], lambda *_: None, lambda *_: None, "")
    assert one.index("a class with a long name 0") < one.index("90%")


def test_a_parquet_file_is_a_table_of_images_or_of_vectors_by_its_columns(tmp_path):
    parquet.write_table(pa.table({"Path": ["x.png"], "label": ["a"]}), tmp_path / "images.parquet")
    parquet.write_table(pa.table({"path": ["x.png"], "embeddings": [[1.0]]}), tmp_path / "vectors.parquet")
    (tmp_path / "damaged.parquet").write_text("x")
    assert not is_stored(tmp_path / "images.parquet") and is_stored(tmp_path / "vectors.parquet")
    assert is_stored(tmp_path / "damaged.parquet") and is_stored("none.npz") and not is_stored("x.jpg")


def test_an_answer_of_several_labels_is_right_if_it_shares_one(tmp_path):
    index = of_pictures(tmp_path)
    found = searching.search(index.embedded, index.embedded, 11, own=np.arange(12))
    sets = [set(index.classes_of(row)) for row in range(12)]
    for query, row in enumerate(answers.records(index, index, found, np.arange(12))):
        for near, place in zip(row["neighbours"], found.index[query].tolist(), strict=True):
            assert answers._kind(row, near) == ("right" if sets[query] & sets[place] else "wrong")
    right = np.mean([bool(sets[query] & sets[place]) for query, place in enumerate(found.index[:, 0].tolist())])
    assert f"{right:.1%} rightly" in outcome(index, index, np.arange(12), found.index[:, 0], np.ones(12, bool))
    known = calibration.answer(calibration.HeldOut(index.embedded), index.metric)
    assert known.correct.mean() == right and known.strangers is None
    (first, *_) = idml_jax.search(index, index, 2)
    assert first.labels == index.classes_of(found.index[0, 0]) and first[0].box == index.box_of(first[0].row)
    assert first.query.endswith("0.png (box 0,0,8,8)")


def test_sets_with_other_classes_are_compared_by_name(tmp_path):
    one = of_pictures(tmp_path)
    other = Index(
        Embedded(one.semantic[:4] + 1, np.asarray([0, 1, 2, 0])), np.asarray(list("abcd")), ["c", "x", "a"], {}
    )
    beside = held_out_beside(one, other)
    names = ["a", "b", "c", "x"]
    mine = [[names[label] for label in row if label >= 0] for row in beside.gallery.sets.tolist()]
    assert mine[:12] == [list(one.classes_of(row)) for row in range(12)] and mine[12:] == [["c"], ["x"], ["a"], ["c"]]
    told = outcome(other, one, None, np.asarray([11, 0, 0, 0]), np.ones(4, bool))
    assert "4 of 4 answered, 50.0% rightly; 1 are of classes that the index lacks" in told


def test_neighbours_of_the_same_class_and_group_are_passed_over():
    vectors, labels = np.arange(8, dtype=np.float32)[:, None] * [[1, 0]], np.asarray([0, 0, 0, 1] * 2)
    embedded = Embedded(vectors.astype(np.float32), labels, groups=np.asarray(["x", "x", "y", "x"] * 2))
    found = relevance.nearest_found(embedded, embedded, 3, np.arange(8))
    assert found.index[0].tolist() == [2, 3, 6] and found.index[3].tolist() == [2, 4, 1]
    plain = relevance.nearest_found(embedded._replace(groups=None), embedded, 3, np.arange(8))
    assert plain.index[0].tolist() == [1, 2, 3]


def test_a_report_marks_answers_and_pairs_by_shared_labels(tmp_path):
    index = of_pictures(tmp_path)
    source = FolderSource(index.files, index.embedded.labels, index.class_names, {"labels": index.embedded.sets})
    found = searching.search(index.embedded, index.embedded, 5, own=np.arange(12))
    correct = relevance.relevant(index.embedded, index.embedded, found.index[:, 0])
    seen = Seen(
        SimpleNamespace(), source, source, index.embedded, index.embedded, found.index, found.distance, correct,
        {"nearest_distance": found.distance[:, 0]}, [], {}, {},
    )  # fmt: skip
    images = SimpleNamespace(query=lambda row: b"x", found=lambda row: b"x")
    made = sections.answers(seen, images, rows=12)  # twice: from the sure end and from the unsure one
    sets = [set(index.classes_of(row)) for row in range(12)]
    wrong = sum(not sets[query] & sets[row] for query in range(12) for row in found.index[query].tolist())
    assert made.count('<figure class="wrong"') == 2 * wrong and "a, b" in made and "it shares one" in made
    both, queries = maps._confused(*(index.embedded.every_label[rows] for rows in ([1, 4], [8, 1])), np.asarray([0, 1]))
    assert both.tolist() == [[0, 2], [1, 2], [0, 1], [1, 1]] and queries.tolist() == [0, 0, 1, 1]


def test_numbers_of_an_audit_are_checked_before_it_reads(tmp_path, capsys):
    with pytest.raises(SystemExit):
        door.main([f"--index={tmp_path / 'none.npz'}", "--near=nan", f"--out={tmp_path / 'x'}"])
    assert "--near=nan must not be below 0" in capsys.readouterr().err
    with pytest.raises(UserError, match="label_sets go up to 7, but there are 3 class names"):
        index = of_pictures(tmp_path)
        wrong = index.embedded.sets.copy()
        wrong[3, 1] = 7
        told = Index(index.embedded._replace(sets=wrong), index.files, index.class_names, {})
        store.read(store.save(told, tmp_path / "x.npz"))


def test_wrong_arguments_in_python_are_refused_in_one_line(tmp_path):
    index = of_pictures(tmp_path)
    path = store.save(index, tmp_path / "x.npz")
    assert len(idml_jax.audit(path).findings) == len(audit(index).findings)
    for given, message in ((3, "the index is int; give one of model.embed"), ("", "'' is not a path")):
        with pytest.raises(UserError, match=message):
            idml_jax.audit(given)
    with pytest.raises(UserError, match="score = 'x'; known: odds, "):
        idml_jax.audit(index, score="x")
    for given in (None, 3):
        with pytest.raises(UserError, match=f"{given} is not a path, but "):
            idml_jax.load(given)
    with pytest.raises(UserError, match="the image is dict"):
        images_of({"a": np.zeros((4, 4), np.uint8)})
    assert repr(Measured({"R@1": 0.5}, [], 1200, [])) == (
        "Measured(1,200 queries, R@1 0.5000; 1 metrics in .report, 0 .warnings)"
    )
