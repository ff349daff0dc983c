"""Galleries: folders of parts that many processes write, and that are searched without being read whole."""

import contextlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest

from idml_jax import embed, search
from idml_jax.errors import UserError
from idml_jax.inference import approximate, gallery, gallery_parts
from idml_jax.inference import search as searching
from idml_jax.inference.gallery import read_gallery
from idml_jax.inference.gallery_parts import Shard, embed_to_gallery, parse_shard
from idml_jax.inference.index import Index, read
from idml_jax.inference.store import save
from idml_jax.metrics import retrieval
from idml_jax.metrics.blocks import neighbours_in_blocks
from idml_jax.metrics.embedded import Embedded, rows_of
from idml_jax.reporting.answers import records

ROOT = Path(__file__).resolve().parents[2]


def some_index(rows=300, width=6, classes=12, seed=0, scattered=0.3):
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    vectors = rng.normal(size=(classes, width))[labels] + scattered * rng.normal(size=(rows, width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    u = rng.normal(size=(rows, 3)).astype(np.float32)
    files = np.asarray([f"/none/{i:04d}.png" for i in range(rows)])
    about = {"images": "/none", "weights": "abc", "temperature": 2.0}
    return Index(Embedded(vectors, labels, u), files, [f"c{i}" for i in range(classes)], about)


@pytest.fixture
def stored(tmp_path):
    """An index with equal rows, and the gallery of it."""
    index = some_index()
    index.semantic[[7, 150, 299]] = index.semantic[3]
    return index, gallery_parts.save(index, tmp_path / "photos", per_part=64)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(gallery_parts, "PART_IMAGES", 20)


def loaded(finished):
    return embed.load(finished[0])


def run(command, *words):
    """Runs a command; returns nothing, raises on failure."""
    command.main([str(word) for word in words])


@pytest.mark.parametrize(("rows", "leaves_out"), [(100, True), (1000, False)])
def test_blocks_give_the_answers_of_one_search(stored, rows, leaves_out):
    index, folder = stored
    own = np.where(np.arange(300) % 3 == 0, -1, np.arange(300)) if leaves_out else None
    whole = retrieval.neighbours(index.semantic, index.semantic, 9, own=own)
    found = neighbours_in_blocks(index.semantic, read_gallery(folder).blocks(rows=rows), 9, own=own)
    np.testing.assert_array_equal(found.index, whole.index)
    np.testing.assert_array_equal(found.distance, whole.distance)


def test_too_few_rows_are_an_error(stored):
    index, folder = stored
    with pytest.raises(ValueError, match="k: expected 1 to the rows there are to find, of 300, got 300"):
        neighbours_in_blocks(index.semantic, read_gallery(folder).blocks(), 300, own=np.arange(300))


def test_a_gallery_is_read_as_it_was_written(stored):
    index, folder = stored
    found = read_gallery(folder)
    assert len(found) == 300 and len(found.parts) == 5 and found.class_names == index.class_names
    whole, some = found.index(), found.index(np.array([0, 63, 64, 299]))
    for name in ("semantic", "uncertainty", "labels"):
        np.testing.assert_array_equal(getattr(whole.embedded, name), getattr(index.embedded, name))
        np.testing.assert_array_equal(getattr(some.embedded, name), getattr(index.embedded, name)[[0, 63, 64, 299]])
    assert whole.files.tolist() == index.files.tolist() and some.files[2] == "/none/0064.png"
    # A part can be read alone.
    assert read(next(folder.glob("part-0000-000001.parquet"))).labels == index.labels[64:128]


def test_search_in_blocks_answers_as_search_in_memory(stored, tmp_path, capsys):
    index, folder = stored
    asked, out = some_index(seed=1, rows=40), tmp_path / "x.jsonl"
    save(asked, tmp_path / "asked.npz")
    rules = ["--exclude=/none/00*", "--exclude=class=c3"]
    run(search, f"--index={folder}", f"--query={tmp_path / 'asked.npz'}", f"--out={out}", "--memory=0", *rules)
    told, found = capsys.readouterr().out, [json.loads(line) for line in out.read_text().splitlines()]
    kept = np.array([row for row in range(100, 300) if row % 12 != 3])
    assert "100 images are left out" in told and f"{len(kept)} images searched for 40" in told
    assert re.search(r"40 of 40 answered, [\d.]+% rightly; 4 are of classes that the index lacks", told)
    whole = Index(rows_of(index.embedded, kept), index.files[kept], index.class_names, index.about)
    answers = searching.search(asked.embedded, whole.embedded, 10, metric=index.metric)
    for one, two in zip(found, records(asked, whole, answers), strict=True):
        for name in ("answer", "votes", "neighbours", "uncertainty", "margin", "class", "answered"):
            assert one[name] == two[name], name
        assert one["sure"] is None


@pytest.mark.parametrize("where", ["file", "gallery", "blocks"])
def test_lines_of_a_list_that_are_for_no_image_are_counted(stored, tmp_path, capsys, where):
    index, folder = stored
    save(index, tmp_path / "x.npz")
    (tmp_path / "list.txt").write_text("/none/0003.png\n/none/003.png\n/non/0004.png\n")
    (tmp_path / "one.csv").write_text("path\n/none/0005.png\n/none/0006.png\nno.png\n")
    (tmp_path / "all.txt").write_text("/none/0007.png\n/none/0007.png\n")
    held = Index(index.embedded, index.files, [f"h{i}" for i in range(12)], index.about)
    save(held, tmp_path / "held.npz")
    rules = [f"--exclude={tmp_path / name}" for name in ("list.txt", "one.csv", "all.txt")]
    place = [f"--index={tmp_path / 'x.npz' if where == 'file' else folder}", *["--memory=0"] * (where == "blocks")]
    more = [f"--held_out={tmp_path / 'held.npz'}", f"--query={tmp_path / 'x.npz'}", f"--out={tmp_path / 'x.jsonl'}"]
    run(search, *place, *more, *rules)
    told, warned = capsys.readouterr()
    assert [line for line in told.splitlines() if "left out" in line] == [
        f"{rules[0]}: 1 image is left out", f"{rules[1]}: 2 images are left out", f"{rules[2]}: 1 image is left out"
    ]  # fmt: skip
    assert [line for line in warned.splitlines() if "--exclude" in line] == [
        f"warning: {rules[0]}: 2 of its 3 lines name no image of the index, the first /none/003.png",
        f"warning: {rules[1]}: 1 of its 3 lines names no image of the index, the first no.png",
    ]


@pytest.mark.parametrize("memory", ["0", "100"])
def test_a_class_is_left_out_with_all_images_that_have_it(tmp_path, capsys, memory):
    sets = np.array([[0, 1], [1, -1], [2, 0], [2, -1], [0, -1]])
    embedded = Embedded(np.eye(5, dtype=np.float32), sets[:, 0], sets=sets)
    index = Index(embedded, np.array([f"/none/{i}.png" for i in range(5)]), ["a", "b", "c"], {"images": "/none"})
    folder = gallery_parts.save(index, tmp_path / "photos", per_part=2)
    save(index, tmp_path / "x.npz")
    words = [f"--query={tmp_path / 'x.npz'}", f"--out={tmp_path / 'x.jsonl'}", "-k1", f"--memory={memory}"]
    for name, count in (("b", 2), ("a", 3)):
        run(search, f"--index={folder}", *words, f"--exclude=class={name}")
        assert f"--exclude=class={name}: {count} images are left out" in capsys.readouterr().out


def test_confidence_of_a_search_in_blocks_needs_held_out_classes(stored, tmp_path, capsys):
    _, folder = stored
    asked = some_index(seed=1, rows=40, scattered=1.0)
    save(asked, tmp_path / "asked.npz")
    save(some_index(seed=2, rows=60, scattered=1.0), tmp_path / "same.npz")
    others = some_index(seed=2, rows=120, scattered=0.6)
    save(Index(others.embedded, others.files, [f"h{i}" for i in range(12)], others.about), tmp_path / "held.npz")
    words = [f"--index={folder}", f"--query={tmp_path / 'asked.npz'}", "--memory=0", f"--out={tmp_path / 'x.jsonl'}"]
    for more, message in (
        (["--abstain=0.9"], "give --held_out, or a larger --memory without --ann"),
        ([f"--held_out={tmp_path / 'same.npz'}"], "12 of its classes are in"),
        (["--balanced"], "--balanced needs the class sizes of the whole gallery"),
    ):
        with pytest.raises(SystemExit):
            run(search, *words, *more)
        assert message in capsys.readouterr().err
    run(search, *words, f"--held_out={tmp_path / 'held.npz'}")
    assert "how sure: from 120 queries of" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert all(0 < row["sure"] < 1 and row["known"] is not None for row in found)


def test_approximate_search_says_its_recall_and_finds_the_nearest(stored, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    index, folder = stored
    asked = some_index(seed=1, rows=40)
    for limit, kind in ((1000, "HNSW32"), (100, "IVF35,SQ8")):
        monkeypatch.setattr(approximate, "GRAPH_ROWS", limit)
        said = []
        (folder / approximate.ABOUT).unlink(missing_ok=True)
        opened = read_gallery(folder)
        built = approximate.open_or_build(opened, said.append)
        assert built.kind == kind and built.recall >= 0.95 and len(said) == 1
        again = approximate.open_or_build(opened, said.append)  # read, not built
        assert again[1:] == built[1:] and len(said) == 1
        gone = np.arange(300) < 100
        found = approximate.search(again, opened, asked.semantic, 5, left_out=gone)
        exact = retrieval.neighbours(asked.semantic, index.semantic[100:], 5)
        assert found.index.min() >= 100
        assert np.mean(found.index[:, :, None] == (exact.index + 100)[:, None, :]) * 5 > 0.9
    save(asked, tmp_path / "asked.npz")
    run(search, f"--index={folder}", f"--query={tmp_path / 'asked.npz'}", "--ann", "-k", 3)
    assert re.search(
        r"IVF35,SQ8, \d+ lists searched\): recall@10 \d\.\d+ against exact search", capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        run(search, f"--index={tmp_path / 'asked.npz'}", f"--query={tmp_path / 'asked.npz'}", "--ann")
    assert "is not a gallery; embed --shard=1/1 writes one" in capsys.readouterr().err


def test_shards_make_the_vectors_of_one_process(finished, image_folder, tmp_path, small_parts, capsys):
    out, images = tmp_path / "photos", image_folder / "train"
    words = [f"--workdir={finished[0]}", f"--images={images}"]
    run(embed, *words, f"--out={tmp_path / 'one.npz'}")
    run(embed, *words, f"--out={out}", "--shard=2/2")
    assert "2 of 5 parts of these images are in" in capsys.readouterr().out
    with pytest.raises(UserError, match="3 of 5 parts are missing, the first part-0000-000000.parquet"):
        read_gallery(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    (out / "part-0000-000001.parquet").write_bytes(b"damaged")
    run(embed, *words, f"--out={out}", "--shard=1/1")  # any number of processes goes on
    told = capsys.readouterr().out
    assert "resuming: 1 of 5 parts are done" in told and "complete: 96 images in" in told
    assert (out / "part-0000-000003.parquet").stat().st_mtime_ns == kept[out / "part-0000-000003.parquet"]
    one, found = read(tmp_path / "one.npz"), read_gallery(out).index()
    for name in ("semantic", "uncertainty", "semantic_norm", "labels"):
        np.testing.assert_array_equal(getattr(one.embedded, name), getattr(found.embedded, name))
    assert one.files.tolist() == found.files.tolist() and one.labels == found.labels

    # Other images, other classes and parts of another configuration are refused.
    for more in ([f"--images={image_folder / 'test'}"], ["--no_labels"]):
        with pytest.raises(SystemExit):
            run(embed, *words, *more, f"--out={out}", "--shard=1/1")
        assert re.search("holds other images; --append|its images have classes", capsys.readouterr().err)
    part, other = out / "part-0000-000000.parquet", out / "part-0000-000001.parquet"
    part.write_bytes(other.read_bytes())
    with pytest.raises(SystemExit):
        run(embed, *words, f"--out={out}", "--shard=1/1")
    assert "is a part of another configuration" in capsys.readouterr().err


def test_images_are_added_without_embedding_the_others(finished, image_folder, tmp_path, small_parts, capsys):
    out = tmp_path / "photos"
    test, some = image_folder / "test", tmp_path / "some.txt"
    listed = sorted(test.rglob("*.png"))
    some.write_text("".join(f"{path}\t{path.parent.name}\n" for path in [*listed[40:70], test / "broken.png"]))
    words = [f"--workdir={finished[0]}", f"--out={out}"]
    run(embed, *words, f"--images={some}", "--shard=1/1")
    assert "1 image cannot be read" in capsys.readouterr().out and "broken.png" in (out / "_skipped.txt").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob("part*")}
    run(embed, *words, f"--images={test}", "--append")
    assert "30 of 96 images are in the gallery already" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    run(embed, *words, f"--images={test}", "--append")  # nothing is left to do
    found = read_gallery(out).index()
    assert len(found) == 96 and len(set(found.files.tolist())) == 96
    assert found.labels == [Path(name).parent.name for name in found.files.tolist()]
    # An image does not find itself, in memory and in blocks.
    capsys.readouterr()
    for memory in (100, 0):
        run(search, f"--index={out}", f"--query={listed[0]}", "-k", 3, f"--memory={memory}")
        told = capsys.readouterr().out
        assert str(listed[0]) not in told.split("distance", 1)[1] and "96 images searched for 1" in told


@pytest.mark.parametrize("package", ["pyarrow", "duckdb"])
def test_the_documented_queries_open_the_folder(stored, monkeypatch, capsys, package):
    pytest.importorskip(package)
    index, folder = stored
    monkeypatch.chdir(folder.parent)
    page = (ROOT / "docs" / "galleries.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.S) if f"import {package}" in code]
    exec(compile(code, "galleries.md", "exec"), {})
    assert "c3" in capsys.readouterr().out
    table = pyarrow.dataset.dataset(folder).to_table()
    assert table.num_rows == 300 and table["class_name"].to_pylist() == index.labels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("_source-0000.json", "{}", "is not the description of a gallery's source in format 1"),
        ("_source-0000.json", None, "is not a gallery of idml_jax.embed --shard"),
        ("part-0000-000002.parquet", "x", "not a part of a gallery"),
        ("part-0000-000002.parquet", None, "1 of 5 parts are missing, the first part-0000-000002.parquet"),
    ],
)  # fmt: skip
def test_damaged_galleries_are_refused_in_a_line(stored, name, content, message):
    _, folder = stored
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_gallery(folder)


def test_wrong_options_are_refused_in_a_line(stored, tmp_path, capsys):
    _, folder = stored
    for text in ("3/2", "0/2", "x", "1/", "-1/2"):
        with pytest.raises(UserError, match="give i/n with 1 <= i <= n"):
            parse_shard(text)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is not a gallery and not empty"):
        embed_to_gallery(None, None, tmp_path / "full", labelled=False, origin="", shard=Shard())
    with pytest.raises(UserError, match="so nothing can be added to it"):
        embed_to_gallery(None, None, tmp_path / "none", labelled=False, origin="", append=True)
    assert not (tmp_path / "none").exists()
    for rule, message in (
        ("*.gif", "no image of the index"),
        ("class=none", "no image"),
        ("*", "leaves out all images"),
    ):
        with pytest.raises(SystemExit):
            run(search, f"--index={folder}", f"--query={folder}", f"--exclude={rule}")
        assert message in capsys.readouterr().err
    assert gallery.is_gallery(folder) and not gallery.is_gallery(tmp_path / "full")


def die_once(marker):
    """A function that ends its process at the first call of all processes."""

    def die(number):
        with contextlib.suppress(FileExistsError), open(marker, "x"):
            os._exit(1)

    return die


@pytest.mark.slow
def test_workers_on_ray_make_the_vectors_of_one_process_though_one_is_killed(finished, image_folder, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed (extra 'ray')")
    from idml_jax.inference.ray_engine import Job, Workers, embed_on_cluster

    images, out = str(image_folder / "train"), tmp_path / "photos"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run(embed, f"--workdir={finished[0]}", f"--images={images}", f"--out={tmp_path / 'one'}", "--shard=1/1")
        job = Job(str(finished[0]), images, "", False, 0, 1, str(out), False)
        work = job.open()  # with small parts, as the workers read it
        source = work.folder / "_source-0000.json"
        source.write_text(json.dumps({**json.loads(source.read_text()), "per_part": 20}))
        embed_on_cluster(job, Workers(2), before=die_once(str(tmp_path / "died")))
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists() and len(list(out.glob("*.parquet"))) == 5
    one, found = read_gallery(tmp_path / "one").index(), read_gallery(out).index()
    for name in ("semantic", "uncertainty", "labels"):
        np.testing.assert_array_equal(getattr(one.embedded, name), getattr(found.embedded, name))
    assert one.files.tolist() == found.files.tolist()
