"""What a table says about images, through files of embeddings to evaluation; and the export to ONNX."""

import json

import numpy as np
import pytest
from runs_made import small_config

from idml_jax import embed, export, search
from idml_jax.data.listed import table_splits
from idml_jax.errors import UserError
from idml_jax.inference import corrections, gallery_checks, gallery_parts, measure, store
from idml_jax.inference import index as indices
from idml_jax.inference import model as trained
from idml_jax.inference.exclude import kept
from idml_jax.inference.gallery import read_gallery, read_stored
from idml_jax.inference.gallery_search import near, open_searched
from idml_jax.inference.index import Index
from idml_jax.inference.own import own_rows
from idml_jax.metrics.embedded import Embedded
from idml_jax.training import going_on, workdir

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", ["x.npz", "x.parquet"])
def test_a_table_is_embedded_and_evaluated(finished, image_folder, tmp_path, name):
    rows = [
        {
            "path": f"class_{label:02d}/{i:02d}.png",
            "labels": f"c{label}|even" if label % 2 == 0 and i < 2 else f"c{label}",
            "is_query": i < 2,
            "is_gallery": i > 0,
            "group": i % 2,
            "box": "0,0,20,20" if i else "",
        }
        for label in range(4, 8)
        for i in range(4)
    ]
    table = tmp_path / "x.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / name
    embed.main([f"--workdir={finished[0]}", f"--images={table}", f"--root={image_folder / 'test'}", f"--out={out}"])
    found = indices.read(out)
    assert found.embedded.sets.shape == (16, 2) and found.boxes[0].tolist() == [0] * 4
    assert found.marked[:2].tolist() == [[True, False], [True, True]]
    again = store.save(found, tmp_path / f"again_{name}")
    np.testing.assert_array_equal(indices.read(again).embedded.sets, found.embedded.sets)
    said = []
    told = measure.measure(str(out), options=measure.Options(ks=(1,), worst=1), warn=said.append)
    assert told.queries == 8 and "CMC@1" in told.report and len(told.worst) == 1
    assert "8 images marked as queries search 12 marked as the gallery" in said[0]
    assert "4 of 8 queries are in the gallery; they do not find themselves" in said[1]
    assert "no query finds images of its class and group" in said[2]
    plain = measure.measure(str(out), options=measure.Options(ks=(1,), exclude="none"), warn=said.append)
    assert "CMC@1" not in plain.report


def stored(path, **more):
    embedded = Embedded(RNG.normal(size=(12, 4)).astype(np.float32), np.arange(12) % 3, **more)
    files = np.asarray([f"{i}.png" for i in range(12)])
    return str(store.save(Index(embedded, files, ["a", "b", "c"], {}), path))


def test_a_search_says_what_it_leaves_aside(tmp_path, capsys):
    index = stored(tmp_path / "x.npz", groups=np.arange(12) % 2)
    search.main([f"--index={index}", f"--query={index}", "-k", "1", f"--out={tmp_path}/x.html"])
    said = capsys.readouterr().err
    assert "its groups are for evaluate; a search also finds images of the query's class and group" in said
    assert "24 pictures cannot be shown, as their files are gone or broken, the first 0.png" in said


def with_table(folder):
    """12 images with all that a table may say: each picture is two images, by their boxes."""
    files = np.asarray([str(folder / f"{i // 2}.png") for i in range(12)])
    for file in files:
        open(file, "w").close()
    boxes = np.asarray([[0, 0, 5 + i, 9] for i in range(12)], np.int32)
    boxes[3] = 0
    labels = np.arange(12) % 3
    sets = np.stack([labels, np.where(np.arange(12) % 2, (labels + 1) % 3, -1)], axis=1)
    embedded = Embedded(RNG.normal(size=(12, 4)).astype(np.float32), labels, sets=sets, groups=np.arange(12) % 2)
    marked = np.stack([np.isin(np.arange(12), [3, 4, 5, 6]), np.arange(12) > 5], axis=1)
    return Index(embedded, files, ["a", "b", "c"], {}, boxes=boxes, marked=marked)


def test_a_gallery_keeps_what_a_table_says_as_a_file_does(tmp_path):
    index = with_table(tmp_path)
    folder = gallery_parts.save(index, tmp_path / "parts", per_part=5)
    store.save(index, tmp_path / "x.npz")
    rows = np.asarray([1, 3, 11])
    for found, own in ((read_stored(folder), index), (read_gallery(folder).index(rows), index.take(rows))):
        np.testing.assert_array_equal(found.embedded.sets, own.embedded.sets)
        np.testing.assert_array_equal(found.embedded.groups, own.embedded.groups)
        np.testing.assert_array_equal(found.boxes, own.boxes)
        np.testing.assert_array_equal(found.marked, own.marked)
    np.testing.assert_array_equal(measure._column(read_stored(folder), "group"), index.embedded.groups)
    np.testing.assert_array_equal(measure._column(read_stored(folder).take(rows), "group"), rows % 2)
    with pytest.raises(UserError, match=r"holds no camera \(--exclude\); it holds box, class_name"):
        measure._column(read_stored(folder), "camera")


def test_a_query_is_found_in_a_gallery_by_picture_and_box(tmp_path):
    index = with_table(tmp_path)
    gallery_parts.save(index, tmp_path / "parts", per_part=5)
    queries = indices.read(store.save(index, tmp_path / "x.npz")).take(np.asarray([2, 3, 7]))
    searched = open_searched(str(tmp_path / "parts"), memory=0)
    assert searched.gallery is not None
    for whole in (searched, searched._replace(head=read_stored(tmp_path / "parts"), gallery=None)):
        assert near(whole, queries, 1).whole_own.tolist() == [2, 3, 7]
    stored = read_stored(tmp_path / "parts")
    less, own = kept(stored, np.arange(12) < 3, own_rows(queries, stored))
    assert own.tolist() == [-1, 0, 4] and own_rows(stored, less).tolist() == [-1] * 3 + list(range(9))
    with pytest.raises(UserError, match="have a box from a table, and these none"):
        gallery_checks.check_told(tmp_path, {"box": 4}, {})


def test_a_corrected_list_keeps_the_table_and_is_read_by_training(tmp_path):
    index = with_table(tmp_path)
    gone = corrections.Change(str(index.files[6]), "remove", "", corrections.box_of(index, 6))
    corrected = corrections.apply(index, [gone])
    splits = table_splits(str(corrections.write(corrected, tmp_path / "x.csv")))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "query": 3, "gallery": 5}
    found = splits["gallery"].fields
    np.testing.assert_array_equal(found["box"], index.boxes[7:])
    assert found["labels"].tolist() == index.embedded.sets[7:].tolist() and found["group"].tolist() == list("10101")
    with pytest.raises(UserError, match="a folder cannot hold label_sets"):
        corrections.write(corrected, tmp_path / "folder")
    with pytest.raises(UserError, match="several labels, of which none can be replaced"):
        corrections.apply(index, [corrections.Change(str(index.files[3]), "relabel", "b")])


def test_the_faiss_index_of_a_gallery_has_its_rows(tmp_path, capsys):
    faiss = pytest.importorskip("faiss")
    index = with_table(tmp_path)
    gallery_parts.save(index, tmp_path / "parts", per_part=5)
    export.main([f"--index={tmp_path / 'parts'}", f"--faiss={tmp_path / 'x.faiss'}"])
    assert "12 rows of 4 dimensions" in capsys.readouterr().out
    found = faiss.read_index(str(tmp_path / "x.faiss"))
    np.testing.assert_array_equal(found.reconstruct_n(0, 12), index.semantic)


def test_a_query_does_not_find_itself_in_the_gallery(tmp_path):
    said = []
    queries = stored(tmp_path / "x.npz")
    alone = measure.measure(queries, options=measure.Options(cluster=False))
    both = measure.measure(queries, queries, options=measure.Options(cluster=False), warn=said.append)
    assert both.report == pytest.approx(alone.report, nan_ok=True)
    assert said == [f"{queries}: holds the queries themselves; each searches all the others"]
    sets = np.stack([np.arange(12) % 3, np.full(12, -1)], axis=1)
    several = stored(tmp_path / "y.npz", sets=sets)
    with pytest.raises(UserError, match="--rerank: needs one label per image"):
        measure.measure(several, options=measure.Options(rerank=(object(),)))


def test_a_run_gets_more_epochs(finished, image_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    (tmp_path / "result.json").write_text("{}")
    longer = small_config(image_folder, epochs=5)
    with pytest.raises(UserError, match="config.epochs = 3 there, 5 here"):
        workdir.remember(longer, tmp_path)
    with pytest.raises(UserError, match="--resume=never"):
        going_on.check("never", longer, tmp_path)
    with pytest.raises(UserError, match="ask for less than the run had, 3 and 0"):
        going_on.check("longer", small_config(image_folder, epochs=2), tmp_path)
    with pytest.raises(UserError, match="holds no run that could go on"):
        going_on.check("longer", longer, tmp_path / "none")
    with pytest.raises(UserError, match="config.seed = 0 there, 7 here"):
        going_on.lengthen(small_config(image_folder, epochs=5, seed=7), tmp_path)
    going_on.check("longer", longer, tmp_path)
    going_on.lengthen(longer, tmp_path)
    assert workdir.remember(longer, tmp_path) == []
    assert not (tmp_path / "result.json").exists() and (tmp_path / "result_3_epochs.json").exists()
    for steps in (2, 4, 4):  # each earlier result is kept, under its length
        (tmp_path / "result.json").write_text(str(steps))
        (tmp_path / "config.json").write_text(small_config(image_folder, max_steps=steps).to_json())
        going_on.lengthen(small_config(image_folder, max_steps=6), tmp_path)
    kept = {path.name: path.read_text() for path in tmp_path.glob("result*_steps*.json")}
    assert kept == {"result_2_steps.json": "2", "result_4_steps.json": "4", "result_4_steps_2.json": "4"}
    (tmp_path / "config.json").write_text(longer.to_json())
    other = small_config(image_folder, **{"epochs": 5, "eval.ks": (1, 3)})
    (changed,) = workdir.remember(other, tmp_path, free=("eval.",))
    assert changed.startswith("config.eval.ks = [1, 2, 4, 8] there")


def test_onnx(finished, tmp_path):
    with pytest.raises(UserError, match="--platforms=cpu is for --format=stablehlo"):
        export._export({"workdir": "x", "out": "y", "index": "", "format": "onnx", "platforms": "cpu"})
    runtime = pytest.importorskip("onnxruntime", reason="extra 'onnx' is not installed")
    pytest.importorskip("jax2onnx", reason="extra 'onnx' is not installed")
    model = trained.load(finished[0])
    out = export.write(model, tmp_path / "model", form="onnx")
    images = RNG.integers(0, 256, (3, 16, 16, 1), np.uint8)
    found = runtime.InferenceSession(str(out / "model.onnx")).run(["semantic"], {"images": images})[0]
    np.testing.assert_allclose(found, model.embedder.images(images)["semantic"], atol=1e-4)
    assert json.loads((out / "about.json").read_text())["difference_from_jax"] < 1e-4
