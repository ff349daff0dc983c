"""What a table says about images, through files of embeddings to evaluation; and the export to ONNX."""

import json

import numpy as np
import pytest
from runs_made import small_config

from idml_jax import embed, export
from idml_jax.errors import UserError
from idml_jax.inference import index as indices
from idml_jax.inference import measure, store
from idml_jax.inference import model as trained
from idml_jax.inference.index import Index
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
