"""The audit finds planted mistakes; decisions about them make a corrected list or folder."""

import csv
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from idml_jax import audit as door
from idml_jax import search
from idml_jax.data.lists import list_images
from idml_jax.errors import UserError
from idml_jax.inference import corrections
from idml_jax.inference.audit import audit, count_of
from idml_jax.inference.index import Index
from idml_jax.inference.store import save
from idml_jax.metrics import duplicates, label_errors, retrieval
from idml_jax.metrics.embedded import Embedded
from idml_jax.reporting import audit_sheet

CLASSES, EACH = 6, 20


def make(folder=None, seed=0):
    """Vectors of 120 images in 6 classes; images 3 and 47 have a wrong label, 90 is a copy of 11, and 119 is blank."""
    rng = np.random.default_rng(seed)
    labels = np.arange(CLASSES * EACH) // EACH
    vectors = rng.normal(size=(CLASSES, 8))[labels] + 0.35 * rng.normal(size=(len(labels), 8))
    vectors[90], vectors[119] = vectors[11] + 0.01, 4 * rng.normal(size=8)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    labels[3], labels[47] = 4, 0
    u = np.full((len(labels), 2), 0.1, np.float32)
    u[119] = 3.0
    files = [f"/none/{row:03d}.png" for row in range(len(labels))]
    if folder is not None:
        folder.mkdir()
        files = [str(folder / f'{row:03d}, "{"é" * (row % 2)}".png') for row in range(len(labels))]
        for row, file in enumerate(files):
            pixels = np.full((12, 12), 7, np.uint8) if row == 119 else rng.integers(0, 255, (12, 12)).astype(np.uint8)
            cv2.imwrite(file, pixels)
    names = [f"class {label}" for label in range(CLASSES - 1)] + ["<script>5"]
    return Index(Embedded(vectors, labels, u), np.asarray(files), names, {"weights": "abc"})


def rows_of(found, kind):
    return [finding.row for finding in found.findings if finding.kind == kind]


def test_planted_mistakes_are_found():
    index = make()
    found = audit(index)
    first = [finding for finding in found.findings if finding.kind == "label" and finding.row != 119][:2]
    assert {(finding.row, finding.proposed) for finding in first} == {(3, 0), (47, 2)}
    assert set(rows_of(found, "label")[:3]) == {3, 47, 119}
    assert all(index.embedded.labels[beside.row] == one.proposed for one in first for beside in one.beside)
    assert rows_of(found, "duplicate")[0] == 90 and [group.tolist() for group in found.groups if 90 in group] == [
        [11, 90]
    ]
    assert "their classes differ: class 4 and class 0" in found.findings[len(rows_of(found, "label"))].reason
    assert set(rows_of(audit(index, unusual=0.025), "unusual")) == {3, 47, 119}  # unlike their class, all three
    assert "cosine to the mean of its class" in found.findings[-1].reason
    unlabelled = audit(dataclasses.replace(index, class_names=None))
    assert rows_of(unlabelled, "unusual")[0] == 119 and "length of u 4.24" in unlabelled.findings[-2].reason


def test_junk_that_repeats_itself_is_unusual():
    index, junk = make(), np.random.default_rng(1).normal(size=8)
    rows = np.arange(0, 120, 17)  # of several classes, and all alike: the nearest of each is junk
    vectors = index.semantic.copy()
    vectors[rows] = junk / np.linalg.norm(junk) + 1e-3 * np.random.default_rng(2).normal(size=(len(rows), 8))
    index = dataclasses.replace(index, embedded=index.embedded._replace(semantic=vectors.astype(np.float32)))
    found = rows_of(audit(index, unusual=(len(rows) + 3) / 120), "unusual")
    assert set(rows) <= set(found)
    own = label_errors.own_class_cosines(index.semantic, index.embedded.labels)
    assert own[rows].max() < np.median(own)
    lone = label_errors.own_class_cosines(index.semantic[:3], np.array([5, 5, 9]))
    np.testing.assert_allclose(lone[:2], float(index.semantic[0] @ index.semantic[1]), rtol=0.01)
    assert np.isnan(lone[2])


def test_copies_in_another_set_are_named():
    index, other = make(), make(seed=1)
    other.embedded.semantic[5] = index.semantic[70]
    other.embedded.semantic[6] = index.semantic[70]
    found = audit(index, other)
    (leak, *_) = [finding for finding in found.findings if finding.kind == "leak"]
    assert leak.row == 70 and {b.row for b in leak.beside if b.other} == {5, 6}
    assert leak.score == 1.0 and "like /none/005.png of the other set (ratio 0.00)" in leak.reason


def test_probabilities_agree_with_a_naive_computation():
    index = make()
    rows, labels = index.semantic.astype(np.float64), index.embedded.labels
    near = retrieval.neighbours(index.semantic, k=50)
    seen = label_errors.evidence(index.semantic, labels, near)
    expected = {}
    for temperature in label_errors.TEMPERATURES:
        p = np.zeros((len(rows), CLASSES))
        for i in range(len(rows)):
            vote = np.zeros(CLASSES)
            for j in near.index[i]:
                vote[labels[j]] += np.exp(10 * rows[i] @ rows[j])
            cosine = np.empty(CLASSES)
            for c in range(CLASSES):
                mean = rows[(labels == c) & (np.arange(len(rows)) != i)].sum(axis=0)
                cosine[c] = rows[i] @ mean / np.linalg.norm(mean)
            soft = np.exp(temperature * cosine)
            spread = lambda x: 0.99 * x / x.sum() + 0.01 / CLASSES
            p[i] = (spread(vote) + spread(soft)) / 2
        expected[temperature] = p[np.arange(len(rows)), labels], np.argmax(p, axis=1)
    given, best = min(expected.values(), key=lambda one: np.abs(one[0] - seen.given).max())
    np.testing.assert_allclose(seen.given, given, atol=1e-5)
    np.testing.assert_array_equal(seen.proposed[seen.wrong], best[seen.wrong])
    assert seen.wrong[[3, 47]].all() and seen.disagreement[3] > 0.5


def test_lone_images_are_not_judged():
    index = make()
    index.embedded.labels[20] = CLASSES
    found = audit(Index(index.embedded, index.files, [*index.class_names, "lone"], {}))
    assert 20 not in rows_of(found, "label") and "1 images are the only one of their class" in found.notes[0]
    unnamed = audit(Index(index.embedded, index.files, None, {}))
    assert "wrong labels were not looked for" in unnamed.notes[0] and count_of(unnamed.findings)["label"] == 0
    with pytest.raises(UserError, match="here are 2"):
        audit(Index(Embedded(index.semantic[:2], np.zeros(2, int)), index.files[:2], None, {}))


def test_groups_are_those_of_connected_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        pairs = [tuple(sorted(pair)) for pair in rng.integers(0, 15, (8, 2)).tolist()]
        label = list(range(15))  # naive: spread the smallest number
        for _ in range(15):
            for one, two in pairs:
                label[one] = label[two] = min(label[one], label[two])
        touched = {row for pair in pairs for row in pair}
        naive = sorted([r for r in sorted(touched) if label[r] == value] for value in {label[r] for r in touched})
        assert sorted(group.tolist() for group in duplicates.groups(pairs, 15)) == naive


def decide(table, decisions):
    """The table with decisions by id."""
    rows = list(csv.DictReader(io.StringIO(table)))
    for row in rows:
        row["decision"] = decisions.get(row["id"], "")
    return corrections.as_csv(rows)


def test_from_findings_to_a_corrected_list_and_folder(tmp_path, capsys):
    index = make(tmp_path / "photos")
    save(index, tmp_path / "x.npz")
    words = [f"--index={tmp_path / 'x.npz'}", "--most=5"]
    door.main([*words, f"--out={tmp_path / 'audited'}", "--pixels", f"--against={tmp_path / 'x.npz'}"])
    told = capsys.readouterr().out
    assert "1  blank: the picture is empty" in told and "leak: the first 5 of 120 are listed" in told
    page = (tmp_path / "audited" / "sheet.html").read_text()
    assert page.count("data-row=") == page.count('class="finding"') > 10 and page.count("data:image/") > 20
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "script-src 'sha256-" in policy and "unsafe" not in policy and page.count("<script>") == 1
    found = [json.loads(line) for line in (tmp_path / "audited" / "findings.jsonl").read_text().splitlines()]
    (copy,) = [row for row in found if row["kind"] == "duplicate" and "090" in row["path"]]
    assert copy["beside"][0]["path"] == str(index.files[11]) and not copy["beside"][0]["other_set"]

    changes = (tmp_path / "audited" / "changes.csv").read_text()
    labels = {row["path"]: row["id"] for row in found if row["kind"] == "label"}
    accepted = {labels[str(index.files[3])]: "accept", copy["id"]: "Accept", labels[str(index.files[47])]: "reject"}
    (tmp_path / "decisions.csv").write_text(decide(changes, accepted))
    for out in ("corrected.csv", "corrected.tsv", "corrected"):
        door.main([*words, f"--apply={tmp_path / 'decisions.csv'}", f"--out={tmp_path / out}"])
        told = capsys.readouterr().out
        assert "2 changes accepted, 1 rejected" in told and "1 image has another class, 1 is removed" in told
        source, labelled = list_images(tmp_path / out)
        assert labelled and len(source) == 119
        classes = dict(zip(source.paths, source.labels.tolist(), strict=True))
        if out == "corrected":
            assert source.class_names[classes[str(next((tmp_path / out).rglob("000003_*")))]] == "class 0"
        else:
            assert source.class_names[classes[str(index.files[3])]] == "class 0"
            assert (
                str(index.files[90]) not in classes and source.class_names[classes[str(index.files[47])]] == "class 0"
            )
    # The list of removed images serves a search, too.
    (tmp_path / "removed.txt").write_text(f"{index.files[90]}\n{index.files[3]}\n")
    search.main(
        [
            f"--index={tmp_path / 'x.npz'}",
            f"--query={tmp_path / 'x.npz'}",
            f"--exclude={tmp_path / 'removed.txt'}",
            "-k1",
            f"--out={tmp_path / 'a.jsonl'}",
        ]
    )
    assert "2 images are left out" in capsys.readouterr().out
    near = [json.loads(line)["neighbours"][0]["file"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert str(index.files[90]) not in near and all(name != own for name, own in zip(near, index.files, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(decision="yes"), "row 2: the decision 'yes' is none of accept, reject and empty"),
        (lambda row: row.update(decision="accept", action="move"), "the action is relabel, with a class in proposed"),
        (lambda row: row.update(decision="accept", path="/other.png"), "/other.png: is not an image of the index"),
        (lambda row: row.pop("decision"), "needs the columns action, path, proposed, decision"),
        (lambda row: row.update(decision="accept", proposed=""), "relabel, with a class in proposed"),
    ],
)  # fmt: skip
def test_wrong_decisions_are_refused_in_a_line(tmp_path, change, message):
    index = make()
    rows = corrections.as_rows(index, audit(index).findings)[:1]
    change(rows[0])
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    (tmp_path / "d.csv").write_text(text.getvalue())
    with pytest.raises(UserError, match=re.escape(message)):
        corrections.apply(index, corrections.read_decisions(tmp_path / "d.csv")[0])


def written(folder, *rows, columns=("id", "action", "path", "class", "proposed", "box", "decision")):
    """A table of decisions, by id, action, row of the index, proposed class and decision."""
    values = ((k, action, f"/p/{row}.png", "", new, "", decision) for k, action, row, new, decision in rows)
    lines = [
        dict(zip(("id", "action", "path", "class", "proposed", "box", "decision"), v, strict=True)) for v in values
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore")
    table.writeheader()
    table.writerows(lines)
    (folder / "d.csv").write_text(text.getvalue())
    return folder / "d.csv"


@pytest.mark.parametrize("columns", [("id", *corrections._NEEDED), corrections._NEEDED], ids=["id", "no id"])
def test_contradictory_decisions_are_refused_with_their_rows(tmp_path, capsys, columns):
    one, two = (1, "relabel", 0, "b", "accept"), (2, "remove", 1, "", "reject")
    path = written(tmp_path, one, two, (1, "relabel", 0, "b", "reject"), columns=columns)
    message = (
        f"{path}, rows 2 and 4: the same finding (relabel /p/0.png) is accepted and rejected; keep one of the rows"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        corrections.read_decisions(path)
    # Undecided and then decided, or the same once more: counted once.
    path = written(tmp_path, (2, "remove", 1, "", ""), one, two, one, (1, "relabel", 0, "b", ""), columns=columns)
    assert corrections.read_decisions(path) == ([corrections.Change("/p/0.png", "relabel", "b")], 1, 0)
    assert capsys.readouterr().err == (
        f"warning: {path}: 3 rows, the first row 4, are about the finding of another row and counted with it\n"
    )
    # Several findings of one image are no contradiction.
    path = written(tmp_path, one, (3, "remove", 0, "", "reject"), (4, "relabel", 2, "b", ""), columns=columns)
    assert corrections.read_decisions(path)[1:] == (1, 1) and not capsys.readouterr().err


def test_accepted_changes_that_make_no_difference_are_told(tmp_path, capsys):
    files = np.asarray([f"/p/{row}.png" for row in range(6)])
    index = Index(Embedded(np.eye(6, dtype=np.float32), np.array([0, 0, 0, 1, 1, 1])), files, ["a", "b"], {})
    save(index, tmp_path / "x.npz")
    relabel, remove = (
        lambda k, row, new: (k, "relabel", row, new, "accept"),
        lambda k, row: (k, "remove", row, "", "accept"),
    )
    path = written(tmp_path, relabel(1, 0, "b"), relabel(2, 1, "b"), remove(3, 1), relabel(4, 2, "a"), remove(5, 3),
                   remove(6, 3), relabel(7, 0, "b"))  # fmt: skip
    door.main([f"--index={tmp_path / 'x.npz'}", f"--apply={path}", f"--out={tmp_path / 'new.csv'}"])
    assert capsys.readouterr().out.splitlines() == [
        "7 changes accepted, 0 rejected, 0 undecided (not made): 1 image has another class, 2 are removed",
        "1 image is removed and not relabelled, /p/1.png",
        "1 image has the accepted class already, /p/2.png",
        "1 removal is of an image that is removed anyway, /p/3.png",
        "1 change of class is accepted already, /p/0.png",
        f"4 images in {tmp_path / 'new.csv'}",
    ]


def test_of_an_image_that_is_listed_twice_one_stays():
    index = make()
    twice = index.take(np.asarray([0, *range(len(index))]))
    name = str(twice.files[0])
    remove, count = corrections.Change(name, "remove", ""), lambda found: found.paths.count(name)
    once = corrections.apply(twice, [remove])
    assert count(once) == 1 and once.removed == [name] and once.paths == [str(file) for file in index.files]
    assert count(corrections.apply(twice, [remove, remove])) == 0
    relabelled = corrections.apply(twice, [remove, corrections.Change(name, "relabel", "another")])
    assert relabelled.classes[relabelled.paths.index(name)] == "another" and relabelled.relabelled == 1


def test_sets_that_a_list_cannot_name_are_refused(tmp_path):
    split = corrections.Corrected(["cub/test/1"], ["a"], 0, [])
    with pytest.raises(UserError, match="is not the path of a file"):
        corrections.write(split, tmp_path / "x.csv")
    odd = corrections.Corrected(["/a\tb.png"], ["a/b"], 0, [])
    with pytest.raises(UserError, match="cannot hold a name with a tab"):
        corrections.write(odd, tmp_path / "x.tsv")
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        corrections.write(odd, tmp_path / "folder")
    with pytest.raises(UserError, match="two classes are accepted"):
        index = make()
        corrections.apply(index, [corrections.Change(str(index.files[0]), "relabel", name) for name in "ab"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["x.csv", "x.tsv", "x.txt", "folder"])
def test_every_class_keeps_its_name(tmp_path, out):
    names = [" a b", "a b ", "a b", 'a;"b', "a, b", "Path", "é|x", "split"]
    paths = [str(tmp_path / f"{row} .png") for row in range(len(names))]
    for path in paths:
        (tmp_path / path).write_bytes(b"x")
    more = {} if out == "folder" else {"group": [" g" if row % 2 else "g" for row in range(len(names))]}
    source, known = list_images(
        corrections.write(corrections.Corrected(paths, names, 0, [], more=more), tmp_path / "new" / out)
    )
    found = {
        os.path.basename(file)[-6:]: source.class_names[k] for file, k in zip(source.paths, source.labels, strict=True)
    }
    assert known and found == {os.path.basename(path): name for path, name in zip(paths, names, strict=True)}
    assert not more or source.fields["group"].tolist() == more["group"]


def test_names_that_would_be_read_otherwise_are_refused(tmp_path):
    made = lambda *names, **options: corrections.Corrected(["/x.png"] * len(names), list(names), 0, [], **options)
    for name in ("@tmp", "Thumbs.db", "lost+found", ".a", "__MACOSX"):
        with pytest.raises(UserError, match=f"the class '{re.escape(name)}' cannot .* hidden and system folders"):
            corrections.write(made("a", name), tmp_path / "folder")
    with pytest.raises(UserError, match="folders of the classes Test, train would be read as those of splits"):
        corrections.write(made("train", "Test", "b"), tmp_path / "folder")
    with pytest.raises(UserError, match="/x: without the extension of an image it is not read in a folder"):
        corrections.write(corrections.Corrected(["/x"], ["a"], 0, []), tmp_path / "folder")
    with pytest.raises(UserError, match="the class ' a' begins or ends with a space"):
        corrections.write(made("b| a", several=True), tmp_path / "x.csv")
    with pytest.raises(UserError, match="the class ' ' is blank"):
        corrections.write(made("b", " "), tmp_path / "x.csv")
    assert not list(tmp_path.iterdir())


def browser():
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_the_keys_of_the_page(tmp_path, monkeypatch):
    presses = """
    const make = URL.createObjectURL;
    URL.createObjectURL = blob => { blob.text().then(text => { document.title = text; }); return make(blob); };
    for (const key of ['a', 'r', 'j', 'a', 'k', 'u', 'n', 'ArrowRight', 'r', 's'])
      document.dispatchEvent(new KeyboardEvent('keydown', {key}));
    """
    monkeypatch.setattr(audit_sheet, "SCRIPT", audit_sheet.SCRIPT + presses)
    index = make()
    found, nothing = audit(index), lambda name: None
    (tmp_path / "x.html").write_text(audit_sheet.sheet(index, None, found, (nothing, nothing), 'x "<b>.npz'))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    words = [browser(), *flags, "--virtual-time-budget=3000", (tmp_path / "x.html").as_uri()]
    page = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
    assert re.findall('id="state">([^<]*)', page) == [f"1 accepted, 2 rejected, {len(found.findings) - 3} undecided"]
    (saved,) = re.findall("<title>(.*?)</title>", page, re.S)
    (tmp_path / "decisions.csv").write_text(html.unescape(saved))
    accepted, rejected, undecided = corrections.read_decisions(tmp_path / "decisions.csv")
    first = corrections.as_rows(index, found.findings)[0]
    assert accepted == [corrections.Change(first["path"], first["action"], first["proposed"])]
    assert rejected == 2 and undecided == len(found.findings) - 3


def test_the_command_line_knows_the_defaults():
    from idml_jax.inference import audit, choices
    from idml_jax.metrics import duplicates, label_errors

    assert choices.SCORES == label_errors.SCORES
    assert (choices.NEAR, choices.MOST) == (duplicates.NEAR, audit.MOST)
