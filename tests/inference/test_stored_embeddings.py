"""Files of embeddings are read correctly or refused in one line by every command; a query's own image is recognised."""

import contextlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from idml_jax import evaluate, export, search
from idml_jax.errors import UserError
from idml_jax.inference import arrays, faiss_index, gallery_parts, store
from idml_jax.inference.gallery import read_gallery
from idml_jax.inference.index import Index, labels_in_common, read
from idml_jax.inference.own import own_rows, own_rows_in
from idml_jax.ism import Metric
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.summary import full_report
from idml_jax.training.digests import weights_digest

ROOT = Path(__file__).resolve().parents[2]
ROWS = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
GOOD = {"semantic": ROWS, "labels": np.arange(12) // 3, "files": np.asarray([f"{i}.png" for i in range(12)])}

ABSOLUTE = Metric("absolute", 0.2)


def npz(path, **changes):
    """A good file with some arrays changed; ``None`` leaves one out."""
    np.savez(path, **{k: v for k, v in {**GOOD, **changes}.items() if v is not None})
    return path


def member(path, name, data, method=zipfile.ZIP_STORED):
    """A good file with one more member."""
    npz(path, **{name: None} if name in GOOD else {})
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(f"{name}.npy", data)


def header(shape, descr="<f4", extra=b""):
    out = io.BytesIO()
    np.lib.format.write_array_header_2_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue() + extra


def twice(path):
    npz(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("labels.npy", header((12,), "<i8", bytes(96)))


def parquet(path, metadata=None, **columns):
    given = {"semantic": pa.array(ROWS.tolist()), "labels": pa.array((np.arange(12) // 3).tolist()), **columns}
    table = pa.table({k: v for k, v in given.items() if v is not None}).replace_schema_metadata(metadata)
    pa.parquet.write_table(table, path)
    return path


nan = np.where(np.eye(12, 3) > 0, np.nan, ROWS)
CASES = {
    "empty": (lambda p: p.write_bytes(b""), "not an .npz"),
    "text": (lambda p: p.write_text("hello"), "not an .npz"),
    "a zip of text": (lambda p: member(p, "semantic", b"hello"), "not an .npz"),
    "an .npy": (lambda p: np.save(p.open("wb"), ROWS), "not an .npz"),
    "objects": (lambda p: npz(p, labels=np.asarray([None] * 12)), "labels holds objects"),
    "records": (lambda p: npz(p, labels=np.zeros(12, [("a", int)])), "labels holds .*, not numbers"),
    "dates": (lambda p: npz(p, labels=np.zeros(12, "datetime64[s]")), "labels holds datetime64.*, not numbers"),
    "complex": (lambda p: npz(p, semantic=ROWS.astype(complex)), "semantic holds complex128, not numbers"),
    "no vectors": (lambda p: npz(p, semantic=None), "needs the arrays semantic"),
    "a vector": (lambda p: npz(p, semantic=np.ones(12)), r"semantic has the shape \(12,\)"),
    "a scalar": (lambda p: npz(p, semantic=np.float32(1)), r"semantic has the shape \(\)"),
    "no rows": (lambda p: npz(p, semantic=np.ones((0, 3)), labels=np.arange(0), files=np.zeros(0, "U1")), "no rows"),
    "no width": (lambda p: npz(p, semantic=np.ones((12, 0))), "no dimensions"),
    "NaN": (lambda p: npz(p, semantic=nan), "semantic holds NaN or infinity, first in row 0"),
    "infinity": (lambda p: npz(p, semantic_norm=np.full(12, np.inf)), "semantic_norm holds NaN or infinity"),
    "uncertain NaN": (lambda p: npz(p, uncertainty=nan), "uncertainty holds NaN"),
    "too large": (lambda p: npz(p, semantic=ROWS.astype(float) * 1e30), "too large for float32"),
    "too small": (lambda p: npz(p, semantic=ROWS.astype(float) * 1e-20), "semantic: too small for float32, the larg"),
    "a row too small": (
        lambda p: npz(p, semantic=ROWS * np.where(np.arange(12) == 5, 1e-50, 1.0)[:, None]),
        "semantic: 1 rows are too small for float32 but not 0, the first is row 5",
    ),
    "text for numbers": (lambda p: npz(p, semantic=np.asarray([["a", "b"]] * 12)), "semantic holds <U1, not numbers"),
    "five labels": (lambda p: npz(p, labels=np.arange(5)), r"labels has the shape \(5,\)"),
    "eleven files": (lambda p: npz(p, files=GOOD["files"][:11]), r"files has the shape \(11,\)"),
    "a table of labels": (lambda p: npz(p, labels=np.ones((12, 2), int)), "labels has the shape"),
    "lengths for u": (lambda p: npz(p, uncertainty=np.ones(12)), r"uncertainty has the shape \(12,\)"),
    "label -1": (lambda p: npz(p, labels=np.arange(12) - 1), "labels are whole numbers from 0, or names; here is -1"),
    "label 0.5": (lambda p: npz(p, labels=np.arange(12) / 2), "here is 0.5"),
    "label NaN": (lambda p: npz(p, labels=np.full(12, np.nan)), "here is nan"),
    "label 2^64": (lambda p: npz(p, labels=np.full(12, 2**64 - 1, np.uint64)), "here is 18446744073709551615"),
    "a class too many": (lambda p: npz(p, class_names=np.asarray(["a", "b", "c"])), "labels go up to 3, but .* has 3"),
    "about a list": (lambda p: npz(p, about=np.asarray("[]")), "about is list, not a JSON object"),
    "about words": (lambda p: npz(p, about=np.asarray("{oops")), "about is not JSON"),
    "about deep": (lambda p: npz(p, about=np.asarray("[" * 100_000)), "about is not JSON"),
    "about nothing": (lambda p: npz(p, about=np.zeros(0, "U1")), "about is not JSON"),
    "temperature 0": (lambda p: npz(p, about=np.asarray('{"temperature": 0}')), "temperature = 0"),
    "temperature NaN": (lambda p: npz(p, about=np.asarray('{"temperature": NaN}')), "temperature = nan"),
    "temperature of words": (lambda p: npz(p, about=np.asarray('{"temperature": "hot"}')), "temperature = 'hot'"),
    "workdir 7": (lambda p: npz(p, about=np.asarray('{"workdir": 7}')), "workdir = 7"),
    "step true": (lambda p: npz(p, about=np.asarray('{"step": true}')), "step = True"),
    "labels twice": (twice, "holds labels 2 times"),
    "a promise": (lambda p: member(p, "semantic", header((10**12, 512))), "declares 2,048,0"),
    "a negative size": (lambda p: member(p, "semantic", header((-12, -3), extra=bytes(144))), "not an .npz|shape"),
    "too much": (lambda p: member(p, "semantic", header((12, 3), extra=bytes(1000))), "declares 144 .* has 1,000"),
    "a bomb": (
        lambda p: member(p, "semantic", header((12, 2**17), extra=bytes(12 * 2**19)), zipfile.ZIP_DEFLATED),
        "has .* bytes but declares",
    ),
    "a folder": (lambda p: p.mkdir(), "is not a file"),
    "a pipe": (os.mkfifo, "is not a file"),
    "parquet: text": (lambda p: p.write_text("hello"), "not a Parquet file"),
    "parquet: an npz": (lambda p: np.savez(p.open("wb"), **GOOD), "not a Parquet file"),
    "parquet: ragged": (lambda p: parquet(p, semantic=pa.array([[1.0]] * 11 + [[1.0, 2.0]])), "different widths: 1, 2"),
    "parquet: a gap": (lambda p: parquet(p, semantic=pa.array([[1.0]] * 11 + [None])), "semantic has 1 empty"),
    "parquet: a gap inside": (lambda p: parquet(p, semantic=pa.array([[1.0, 2]] * 11 + [[1, None]])), "1 empty"),
    "parquet: NaN": (lambda p: parquet(p, semantic=pa.array([[1.0]] * 11 + [[np.nan]])), "NaN or infinity, .* row 11"),
    "parquet: structs": (lambda p: parquet(p, semantic=pa.array([{"x": 1}] * 12)), "neither numbers nor text"),
    "parquet: words": (lambda p: parquet(p, semantic=pa.array([["a"]] * 12)), "semantic holds <U1, not numbers"),
    "parquet: lists of lists": (lambda p: parquet(p, semantic=pa.array([[[1.0]]] * 12)), "neither numbers nor text"),
    "parquet: no rows": (
        lambda p: parquet(p, semantic=pa.array([], pa.list_(pa.float32())), labels=pa.array([], pa.int64())), "no rows"
    ),
    "parquet: class names": (lambda p: parquet(p, {"class_names": "{}"}), "class_names is dict"),
    "parquet: about": (lambda p: parquet(p, {"idml_jax": "[]"}), "about is list"),
    "parquet: label -1": (lambda p: parquet(p, labels=pa.array([-1] * 12)), "here is -1"),
    "parquet: a bomb": (
        lambda p: parquet(p, semantic=pa.array([[0.0] * 2**9] * 2**12), labels=pa.array([0] * 2**12)),
        "bytes but declares",
    ),
}  # fmt: skip


def refused(capsys, door, words):
    """The one-line error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        door.main([str(word) for word in words])
    told = capsys.readouterr()
    assert stop.value.code == 1 and told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
    return told.err.strip()


@pytest.mark.parametrize("name", CASES)
def test_bad_files_are_refused_in_one_line_at_every_door(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(arrays, "_SMALL", 2**20)  # so that a small bomb is one
    make, message = CASES[name]
    suffix = ".parquet" if name.startswith("parquet") else ".npz"
    bad, good = tmp_path / f"bad{suffix}", npz(tmp_path / "good.npz")
    made = make(bad)
    if hasattr(made, "close"):
        made.close()
    before = sorted(p.name for p in tmp_path.iterdir())
    for door, words in (
        (evaluate, [f"--embeddings={bad}", f"--out={tmp_path}/m.json"]),
        (evaluate, [f"--embeddings={good}", f"--gallery={bad}"]),
        (evaluate, [f"--embeddings={good}", f"--held_out={bad}"]),
        (search, [f"--index={bad}", f"--query={good}", f"--out={tmp_path}/a.html"]),
        (search, [f"--index={good}", f"--query={bad}"]),
        (export, [f"--index={bad}", f"--faiss={tmp_path}/x.faiss"]),
    ):
        told = refused(capsys, door, words)
        assert re.search(message, told) and str(bad) in told, told
    with pytest.raises(UserError, match=message):  # the last door, behind a search
        read(bad, "--held_out")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def write(kind, path, values):
    """The same arrays in several kinds of files."""
    if kind == "npz":
        np.savez(path, **values)
    elif kind == "compressed":
        np.savez_compressed(path, **values)
    else:
        listed = pa.large_list if kind == "large lists" else pa.list_
        columns = {}
        for name, value in values.items():
            inner = pa.array(value.reshape(-1) if value.dtype.kind != "U" else value.tolist())
            width = (value.shape[1],) if kind == "fixed lists" and value.ndim == 2 else ()
            columns[name] = pa.array(value.tolist(), listed(inner.type, *width)) if value.ndim == 2 else inner
        pa.parquet.write_table(pa.table(columns), path, row_group_size=5)
    return path


@pytest.mark.parametrize("kind", ["npz", "compressed", "lists", "large lists", "fixed lists"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8])
def test_numbers_of_any_kind_are_read(tmp_path, kind, dtype):
    arrays = {"embeddings": (ROWS * 10).astype(dtype), "uncertainty": ROWS.astype(dtype), "labels": np.arange(12) % 4}
    path = write(kind, tmp_path / ("x.npz" if kind in ("npz", "compressed") else "x.parquet"), arrays)
    found = read(path)
    expected = np.float64 if dtype == np.float64 else np.float32
    assert found.embedded.semantic.dtype == expected and found.embedded.labels.dtype == np.int64
    np.testing.assert_array_equal(found.embedded.semantic, (ROWS * 10).astype(dtype).astype(expected))
    np.testing.assert_array_equal(found.embedded.uncertainty, ROWS.astype(dtype).astype(expected))
    assert [found.class_of(i) for i in (0, 5)] == ["0", "1"] and found.files[3] == "row 3" and not found.named


@pytest.mark.parametrize("kind", ["npz", "lists"])
@pytest.mark.parametrize(
    "labels,names",
    [
        (np.asarray(["b", "a", "é"] * 4), ["b", "a", "é"]),
        (np.asarray(["b", "a", "c"] * 4).astype("S"), ["b", "a", "c"]),
        (np.asarray([2**60, 7, 0] * 4), [str(2**60), "7", "0"]),
        (np.asarray([1.0, 0.0, 2.0] * 4), ["1", "0", "2"]),
        (np.asarray([True, False, True] * 4), ["1", "0", "1"]),
        (np.asarray([1, 0, 3] * 4, np.uint8), ["1", "0", "3"]),
    ],
)
def test_labels_of_any_kind_are_read(tmp_path, kind, labels, names):
    if kind == "npz":
        path = npz(tmp_path / "x.npz", labels=labels)
    else:
        path = parquet(tmp_path / "x.parquet", labels=pa.array(labels.tolist()))
    found = read(path)
    assert [found.class_of(i) for i in range(3)] == names
    assert (np.unique(found.embedded.labels, return_inverse=True)[1] == np.unique(labels, return_inverse=True)[1]).all()


def test_names_that_are_not_utf_8_are_kept(tmp_path, capsys):
    names = np.asarray([os.fsdecode(b"/x/caf\xe9 %d.png" % i) for i in range(12)])
    part = {"semantic": ROWS, "labels": np.arange(12, dtype=np.int32) % 2, "files": names}
    for name in ("x.npz", "x.parquet"):
        store.join(tmp_path / name, lambda: iter([part, part]), [os.fsdecode(b"caf\xe9"), "b"], {"workdir": "/x"})
        found = read(tmp_path / name)
        assert found.files.tolist() == [*names, *names] and found.class_of(0) == os.fsdecode(b"caf\xe9")
        search.main([f"--index={tmp_path / name}", f"--query={tmp_path / name}", "-k", "1"])
        assert "/x/caf\\xe9 3.png" in capsys.readouterr().out
    np.savez(tmp_path / "bytes.npz", semantic=ROWS, files=np.asarray([os.fsencode(name) for name in names]))
    assert read(tmp_path / "bytes.npz").files.tolist() == names.tolist()


def made(rng, n, temperature=None, relative=None, weights=None):
    about = {"temperature": temperature, "relative": relative, "weights": weights}
    arrays = {
        "semantic": rng.normal(size=(n, 3)),
        "labels": np.arange(n) // 2,
        "uncertainty": 3 * rng.random((n, 2)) ** 4,
    }
    return {**arrays, "about": np.asarray(json.dumps({k: v for k, v in about.items() if v is not None}))}


def metrics(tmp_path, *words):
    evaluate.main([f"--embeddings={tmp_path}/x.npz", "--no_clustering", f"--out={tmp_path}/m.json", *words])
    return json.loads((tmp_path / "m.json").read_text())


def test_evaluate_measures_with_the_settings_of_the_file(tmp_path, capsys):
    arrays = made(np.random.default_rng(0), 12, 0.2, False)
    np.savez(tmp_path / "x.npz", **arrays)
    embedded = read(tmp_path / "x.npz").embedded
    expected = {
        s: full_report(embedded, metric=s, cluster=False)[0]["introspective/MAP@R"] for s in (ABSOLUTE, Metric())
    }
    assert len(set(expected.values())) == 2
    name = "introspective/MAP@R"
    assert metrics(tmp_path)[name] == pytest.approx(expected[ABSOLUTE])
    assert "warning" not in capsys.readouterr().err
    flags = f"--temperature={Metric().temperature}", "--no-absolute"
    assert metrics(tmp_path, *flags)[name] == pytest.approx(expected[Metric()])
    told = capsys.readouterr().err
    assert "the embeddings were made with 0.2" in told and "the embeddings were made with False" in told
    np.savez(tmp_path / "x.npz", **{**arrays, "about": np.asarray("{}")})
    assert metrics(tmp_path)[name] == pytest.approx(expected[Metric()])
    assert metrics(tmp_path, "--temperature=0.2", "--absolute")[name] == pytest.approx(expected[ABSOLUTE])
    for value in ("0", "-1", "nan", "inf"):
        assert "must be above 0" in refused(
            capsys, evaluate, [f"--embeddings={tmp_path}/x.npz", f"--temperature={value}"]
        )


def test_sets_that_do_not_go_together_are_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = tmp_path / "x.npz"
    np.savez(x, **made(rng, 12, 3.0, True, "a" * 16))
    for about, message in (
        ((2.0, True, "a" * 16), "temperature = (3.0|2.0) and .* with (3.0|2.0)"),
        ((3.0, False, "a" * 16), "relative = (True|False) and .* with (True|False)"),
        ((3.0, True, "b" * 16), "weights (a{16}|b{16}) and .* with (a{16}|b{16})"),
    ):
        y = tmp_path / "y.npz"
        np.savez(y, **made(rng, 12, *about))
        for door, words in (
            (evaluate, [f"--embeddings={x}", f"--gallery={y}"]),
            (evaluate, [f"--embeddings={x}", f"--held_out={y}"]),
            (search, [f"--index={x}", f"--query={y}"]),
            (search, [f"--index={x}", f"--query={x}", f"--held_out={y}"]),
        ):
            assert re.search(message, refused(capsys, door, words))
    np.savez(tmp_path / "y.npz", semantic=np.eye(5), labels=np.arange(5) // 2)
    for door, words in (
        (evaluate, [f"--embeddings={x}", f"--gallery={y}"]),
        (search, [f"--index={x}", f"--query={y}"]),
        (search, [f"--index={x}", f"--query={x}", f"--held_out={y}"]),
    ):
        assert re.search("(3|5) dimensions of semantic, .* has (3|5)", refused(capsys, door, words))
    np.savez(tmp_path / "y.npz", **made(rng, 12, 2.0, True, "a" * 16))
    metrics(tmp_path, f"--gallery={y}", "--temperature=1")
    assert "the embeddings were made with 3.0" in capsys.readouterr().err


def test_classes_of_two_files_are_compared_by_name(tmp_path, capsys):
    one = Index(Embedded(ROWS, np.arange(12) % 2), GOOD["files"], ["cat", "dog"], {})
    two = Index(Embedded(ROWS, np.arange(12) % 3), GOOD["files"], ["ant", "cat", "dog"], {})
    a, b, named = labels_in_common(one, two)
    assert named and [x == y for x, y in zip(a, b, strict=True)] == [
        ("cat", "dog")[i % 2] == ("ant", "cat", "dog")[i % 3] for i in range(12)
    ]
    npz(tmp_path / "x.npz", labels=np.asarray(["cat"] * 6 + ["dog"] * 6))
    npz(tmp_path / "y.npz", labels=np.asarray(["dog"] * 6 + ["cat"] * 6))
    assert metrics(tmp_path, f"--gallery={tmp_path}/y.npz")["R@1"] == 0.0  # each row finds itself, of the other class
    npz(tmp_path / "y.npz", labels=np.arange(12) // 6)
    assert metrics(tmp_path, f"--gallery={tmp_path}/y.npz")["R@1"] == 1.0
    assert "does not name its classes" in capsys.readouterr().err


class TestOwn:
    """Which row of an index is a query's own image."""

    @pytest.fixture
    def image(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        for name in ("a/1.jpg", "b/1.jpg", "a/2.jpg"):
            (tmp_path / name).write_bytes(name.encode())
        return lambda name: str(tmp_path / name)

    @staticmethod
    def index(files, **more):
        n = len(files)
        return Index(Embedded(ROWS[:n], np.zeros(n, int)), np.asarray(files), None, more.pop("about", {}), **more)

    def test_made_up_names_match_nothing(self, tmp_path):
        one = read(npz(tmp_path / "x.npz", files=None))
        two = read(npz(tmp_path / "y.npz", files=None, semantic=ROWS + 1))
        assert own_rows(one, two) is None

    def test_equal_base_names_match_nothing(self, monkeypatch, image, tmp_path):
        monkeypatch.chdir(tmp_path / "a")
        assert own_rows(self.index(["1.jpg"]), self.index(["2.jpg", "1.jpg"])) is None
        assert own_rows(self.index([image("b/1.jpg")]), self.index(["1.jpg", image("a/1.jpg")])) is None
        assert own_rows(self.index(["/gone/1.jpg"]), self.index(["/gone/1.jpg"])) is None

    def test_the_same_image_matches(self, image, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "a")
        queries = self.index([image("link/2.jpg"), image("b/1.jpg"), image("a/../a/1.jpg")])
        found = own_rows(queries, self.index([image("a/1.jpg"), image("a/2.jpg")]))
        assert found.tolist() == [1, -1, 0]

    def test_an_image_that_stands_twice_is_told(self, image, capsys):
        index = self.index([image("a/1.jpg"), image("b/1.jpg"), image("a/1.jpg")])
        assert own_rows(self.index([image("b/1.jpg")]), index).tolist() == [1]
        assert capsys.readouterr().err == ""
        assert own_rows(self.index([image("a/1.jpg"), image("b/1.jpg")]), index).tolist() == [2, 1]
        said = capsys.readouterr().err
        assert "1 queries stand in the index more than once" in said and image("a/1.jpg") in said

    def test_an_image_that_has_moved_matches_by_name_and_vector(self, image, tmp_path, capsys):
        index = self.index(["/gone/2.jpg", "/gone/1.jpg", image("b/1.jpg")])
        queries = self.index([image("a/1.jpg"), image("a/2.jpg")])
        vectors = [ROWS[1] * 1.001, ROWS[1]]  # the second is another picture of the same name
        moved = replace(queries, embedded=queries.embedded._replace(semantic=np.stack(vectors)))
        assert own_rows(moved, index).tolist() == [1, -1]
        assert (
            "1 images have the names and vectors of images of the index that are no longer" in capsys.readouterr().err
        )
        gallery_parts.save(index, tmp_path / "parts")
        assert own_rows_in(moved, read_gallery(tmp_path / "parts")).tolist() == [1, -1]
        # The same split of a run, read from two places that both exist.
        about = {"images": "split:test", "weights": "a" * 16}
        both = [self.index([image(name)], about=about) for name in ("a/1.jpg", "b/1.jpg")]
        assert own_rows(*both).tolist() == [0]
        assert own_rows(self.index([image("a/1.jpg")]), self.index([image("b/1.jpg")])) is None

    def test_the_same_file_matches_row_by_row(self, tmp_path):
        path = npz(tmp_path / "x.npz", files=None)
        (tmp_path / "copy.npz").write_bytes(path.read_bytes())
        (tmp_path / "link.npz").symlink_to(path)
        for other in (path, tmp_path / "copy.npz", tmp_path / "link.npz"):
            assert own_rows(read(other), read(path)).tolist() == list(range(12))

    def test_the_same_split_of_the_same_run_matches(self):
        names, about = ["glyphs 1", "glyphs 0"], {"images": "split:test", "weights": "a" * 16}
        assert own_rows(self.index(names, about=about), self.index(names[::-1], about=about)).tolist() == [1, 0]
        for changed in ({"images": "split:train"}, {"weights": "b" * 16}):
            assert own_rows(self.index(names, about=about), self.index(names, about={**about, **changed})) is None

    def test_search_finds_the_twin_of_another_file(self, tmp_path, capsys):
        npz(tmp_path / "x.npz", files=None)
        npz(tmp_path / "y.npz", files=None, semantic=np.concatenate([ROWS, ROWS + 1e-3]), labels=np.arange(24) % 4)
        for query, first in (("x", "row 0"), ("y", "row 12")):
            search.main([f"--index={tmp_path}/y.npz", f"--query={tmp_path}/{query}.npz", "-k", "1"])
            assert capsys.readouterr().out.splitlines()[1].split("  ")[-1] == first


def test_weights_digest():
    tree = {"params": {"trunk": {"w": ROWS}, "heads": {"b": np.zeros(3, np.float32)}}, "batch_stats": {"m": np.ones(2)}}
    found = weights_digest(tree)
    assert re.fullmatch("[0-9a-f]{16}", found) and found == weights_digest(dict(reversed(tree.items())))
    assert found == weights_digest({**tree, "params": {**tree["params"], "loss": {"proxies": ROWS}}})
    changed = ROWS.copy()
    changed[5, 1] = np.nextafter(changed[5, 1], 9)
    for trunk in ({"w": changed}, {"v": ROWS}, {"w": ROWS.astype(np.float64)}, {"w": ROWS.reshape(3, 12)}):
        assert weights_digest({**tree, "params": {**tree["params"], "trunk": trunk}}) != found
    assert weights_digest({**tree, "batch_stats": {"m": np.zeros(2)}}) != found


class TestParts:
    def test_other_weights_start_over_and_another_place_does_not(self, tmp_path):
        out, identity = tmp_path / "x.npz", {"weights": "a", "workdir": "/one", "step": 1, "names": "n"}
        store.Parts(out, identity).write(0, {"records": np.arange(3)})
        assert store.Parts(out, {**identity, "workdir": "/copy"}).has(0)
        again = store.Parts(out, {**identity, "weights": "b"})
        assert again.started_over and not again.has(0)

    def test_a_folder_of_somebody_else_is_left_alone(self, tmp_path):
        (tmp_path / "x.npz.parts").mkdir()
        (tmp_path / "x.npz.parts" / "thesis.tex").write_text("precious")
        with pytest.raises(UserError, match="is not a folder of parts"):
            store.Parts(tmp_path / "x.npz", {"weights": "a"})
        (tmp_path / "y.npz.parts").symlink_to(tmp_path / "x.npz.parts")
        with pytest.raises(UserError, match="is a link"):
            store.Parts(tmp_path / "y.npz", {"weights": "a"})
        assert (tmp_path / "x.npz.parts" / "thesis.tex").read_text() == "precious"

    def test_numbers_that_are_none_are_refused_by_name(self):
        arrays = {"semantic": np.where(np.arange(12)[:, None] == 7, np.nan, ROWS)}
        with pytest.raises(UserError, match=r"run gives NaN .* semantic for 1 of 12 images, the first 7.png"):
            store.check_finite(arrays, GOOD["files"].tolist(), "run")
        store.check_finite({"semantic": ROWS, "u": ROWS[:0]}, GOOD["files"].tolist(), "run")


HOLD = """
import sys
from pathlib import Path
from idml_jax.runtime.files import locked
with locked(Path(sys.argv[1]), "x"):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_one_file(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "x.npz.lock")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "ready\n"
            busy = pytest.raises(UserError, match=rf"x.npz: another process is writing it.*process {other.pid}")
            with busy, store.writing(tmp_path / "x.npz"):
                pass
        finally:
            other.kill()
            other.wait(30)
    with store.writing(tmp_path / "x.npz"):  # whose owner was killed
        pass
    assert not list(tmp_path.iterdir())


def mutate(data, draw):
    """Bytes changed at some places, cut, doubled or swapped."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place, kind = draw.randrange(max(1, len(data))), draw.randrange(6)
        if kind == 0 and data:
            data[place] = draw.randrange(256)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + draw.randrange(1, 64)]
        elif kind == 3:
            data[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 16)))
        elif kind == 4:
            data[place : place + 8] = draw.choice((b"\xff" * 8, bytes(8), b"99999999", b"-1, 1e99"))
        else:
            other = draw.randrange(max(1, len(data)))
            data[place : place + 32] = data[other : other + 32]
    return bytes(data)


def fuzz_reader(tmp_path, count, seed):
    """Mutated files are read or refused in one line; returns how many of each."""
    draw, found = random.Random(seed), {"read": 0, "refused": 0}
    about = np.asarray(json.dumps({"temperature": 3.0, "relative": True, "images": "/x", "step": 3}))
    npz(tmp_path / "x.npz", about=about, class_names=np.asarray(["a", "b", "c", "d"]), uncertainty=ROWS)
    parquet(
        tmp_path / "x.parquet",
        {"idml_jax": str(about), "class_names": '["a", "b", "c", "d"]'},
        files=pa.array(GOOD["files"].tolist()),
    )
    original = {suffix: (tmp_path / f"x{suffix}").read_bytes() for suffix in (".npz", ".parquet")}
    for number in range(count):
        suffix = draw.choice(list(original))
        data = original[suffix]
        if suffix == ".npz" and draw.random() < 0.5:  # behind the checksums of the archive
            members = {
                name: zipfile.ZipFile(io.BytesIO(data)).read(name)
                for name in zipfile.ZipFile(io.BytesIO(data)).namelist()
            }
            chosen = draw.choice(list(members))
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, mutate(content, draw) if name == chosen else content)
            data = out.getvalue()
        else:
            data = mutate(data, draw)
        path = tmp_path / f"y{suffix}"
        path.write_bytes(data)
        try:
            index = read(path)
        except UserError as error:
            assert str(path) in str(error), (number, error)
            found["refused"] += 1
        else:
            assert np.isfinite(index.embedded.semantic).all() and len(index.files) == len(index.embedded.semantic)
            assert all(isinstance(index.class_of(row), str | None) for row in range(len(index.files)))
            assert index.metric.temperature > 0
            found["read"] += 1
    return found


def test_mutated_files_are_read_or_refused(tmp_path):
    found = fuzz_reader(tmp_path, 100, 0)
    assert found["refused"] >= 30, found


@pytest.mark.slow
def test_many_mutated_files_are_read_or_refused(tmp_path):
    found = fuzz_reader(tmp_path, 2000, 1)
    assert found["refused"] >= 600, found


def test_a_tilde_is_the_home_folder_at_every_door(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    npz(tmp_path / "x.npz")
    evaluate.main(
        ["--embeddings=~/x.npz", "--gallery=~/x.npz", "--held_out=~/x.npz", "--no_clustering", "--out=~/m.json"]
    )
    for name in ("a.jsonl", "a.html", "a.png"):
        search.main(["--index=~/x.npz", "--query=~/x.npz", "--held_out=~/x.npz", "-k", "1", f"--out=~/out/{name}"])
    made = ["a.html", "a.jsonl", "a.png"]
    if importlib.util.find_spec("faiss"):
        export.main(["--index=~/x.npz", "--faiss=~/out/x.faiss"])
        made.append("x.faiss")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "out", "x.npz"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == made


@pytest.mark.parametrize(
    "kind",
    ["HNSW0", "HNSW1", "HNSW01", "IVF4_HNSW1,Flat", "PCA2,HNSW1", "RR0,Flat", "LSQ0x2", "PRQ2x0x4", "HNSW0,Flat",
     "HNSW99999", "", "Flat,", "IVF99999999999,Flat", "PQ0", "SQ0", "PCA0,Flat"],
)  # fmt: skip
def test_kinds_with_which_faiss_would_end_the_process(tmp_path, capsys, kind):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra 'faiss')")
    path = npz(tmp_path / "x.npz")
    told = refused(capsys, export, [f"--index={path}", f"--faiss={tmp_path}/x.faiss", f"--faiss_kind={kind}"])
    assert f"--faiss_kind={kind}:" in told
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_an_index_that_does_not_fit_on_the_disk(tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra 'faiss')")

    @contextlib.contextmanager
    def full(path):
        class Full(io.BytesIO):
            def write(self, data):
                raise OSError(28, "No space left on device")

        try:
            yield Full()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error

    monkeypatch.setattr(faiss_index, "atomic", full)
    told = refused(capsys, export, [f"--index={npz(tmp_path / 'x.npz')}", f"--faiss={tmp_path}/x.faiss"])
    assert "x.faiss: cannot be written (No space left on device)" in told


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_results_never_replace_anything_but_files(tmp_path, capsys, kind):
    path = npz(tmp_path / "x.npz")
    (tmp_path / "victim").write_text("precious")
    for door, words, name in (
        (evaluate, [f"--embeddings={path}"], "--out={}/m.json"),
        (search, [f"--index={path}", f"--query={path}"], "--out={}/a.jsonl"),
        (search, [f"--index={path}", f"--query={path}"], "--out={}/a.html"),
        (export, [f"--index={path}"], "--faiss={}/x.faiss"),
    ):
        if "faiss" in name and not importlib.util.find_spec("faiss"):
            continue
        out = tmp_path / name.split("/")[1]
        make = {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda out: out.symlink_to(tmp_path / "victim")}
        make[kind](out)
        assert f"{out}: is a {kind}" in refused(capsys, door, [*words, name.format(tmp_path)])
    assert (tmp_path / "victim").read_text() == "precious"
