"""Tables of images: formats, columns, splits, boxes, several labels, and refused tables."""

import csv
import io
import json
import pickle

import archives_made as made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from idml_jax.data import columns, datasets, lists, pipeline, sources, splits, tables
from idml_jax.data.images.decode import DecodeError, Picture, decode
from idml_jax.data.images.transforms import ResizeCenterCrop
from idml_jax.data.listed import table_splits
from idml_jax.data.samplers import BalancedSampler, ShuffledSampler
from idml_jax.errors import UserError

ROWS = [
    {
        "image": f"p/{i}.jpg",
        "label": f"c{i % 2 + 2 * (i > 3)}",
        "split": "train" if i < 4 else "validation",
        "is_query": i in (4, 5),
        "is_gallery": i >= 5,
        "x_1": 0, "y_1": 1, "x_2": 4, "y_2": 6,
        "camera": i % 3,
        "weight": i % 4,
    }
    for i in range(10)
]  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    return made.write_files(tmp_path / "pictures", {f"p/{i}.jpg": made.jpeg(i % 4, i) for i in range(10)})


def write_table(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0], delimiter={".tsv": "\t", ".csv": ";"}[path.suffix])
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    return path


def load(path, **options):
    said = []
    return datasets.load_dataset("folder", root=str(path), warn=said.append, **options), said


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.parquet"])
def test_every_column_in_every_format(pictures, name):
    found, said = load(write_table(pictures / name, ROWS))
    assert (len(found.train), len(found.test), len(found.gallery), found.validation) == (4, 2, 5, None) and not said
    assert found.test.class_names == found.gallery.class_names == ["c2", "c3"]
    assert found.test.labels.tolist() == [0, 1] and found.gallery.labels.tolist() == [1, 0, 1, 0, 1]
    assert found.test.fields["group"].tolist() == ["1", "2"]
    assert found.train.fields["weight"].tolist() == [0, 1, 2, 3]
    assert found.gallery.fields["row"].tolist() == [5, 6, 7, 8, 9]
    box = sources.box_of(found.test, 1)
    assert box == (0, 1, 4, 6)
    data = found.test.read(1)
    np.testing.assert_array_equal(Picture(data, 3, box).part(None), decode(data)[1:6, 0:4])
    with pytest.raises(DecodeError, match=r"box 0,0,99,5 is not within"):
        Picture(data, 3, (0, 0, 99, 5))


def test_paths_start_from_the_table_or_from_a_root(pictures, tmp_path):
    (tmp_path / "away").mkdir()
    table = write_table(tmp_path / "away" / "x.csv", ROWS)
    with pytest.raises(UserError, match="none of its 10 files exists"):
        load(table)
    assert len(load(table, image_root=str(pictures))[0].train) == 4
    source, labelled = lists.list_images(table, root=str(pictures), warn=lambda line: None)
    assert len(source) == 10 and labelled
    with pytest.raises(UserError, match="relative paths are those of a table"):
        lists.list_images(pictures / "p", root=str(pictures))


def test_several_labels(pictures):
    rows = [
        {"path": f"p/{i}.jpg", "labels": "a|b" if i % 2 else "b", "split": "train" if i < 6 else "test"}
        for i in range(10)
    ]
    for name, of in (("x.csv", str), ("x.jsonl", lambda text: text.split("|"))):
        found, _ = load(write_table(pictures / name, [row | {"labels": of(row["labels"])} for row in rows]))
        assert found.train.class_names == ["a", "b"]
        assert sources.sets_of(found.train).tolist() == [[1, -1], [0, 1]] * 3
        half = sources.Subset(found.train, np.asarray([0, 2]))
        assert half.class_names == ["b"] and sources.sets_of(half).tolist() == [[0, -1]] * 2
    with pytest.raises(UserError, match="several labels, which are not divided by class"):
        load(write_table(pictures / "y.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in rows]))
    with pytest.raises(UserError, match="not divided by class"):
        load(pictures / "x.csv", validation_classes=0.5)
    assert splits.check_classes(found.train, "x", "refuse", print) is found.train


def test_test_and_validation_images(pictures):
    rows = [{"path": f"p/{i}.jpg", "label": i % 2, "split": ("train", "val", "test")[i % 3]} for i in range(9)]
    rows += [{"path": "p/9.jpg", "label": 0, "split": "unlabeled"}]
    found, said = load(write_table(pictures / "x.csv", rows), on_small_class="keep")
    assert (len(found.train), len(found.test), len(found.validation)) == (3, 3, 3)
    assert "skipped 1 rows of splits that are not used" in said[0]
    with pytest.raises(UserError, match="has validation images of its own"):
        load(pictures / "x.csv", validation_classes=0.2)


def test_a_saved_set_of_hugging_face(tmp_path):
    content = [made.jpeg(i, i) for i in range(8)]
    table = pa.table({"image": [{"bytes": x, "path": None} for x in content], "label": [i % 4 for i in range(8)]})
    names = {"features": {"label": {"names": ["a", "b", "c", "d"], "_type": "ClassLabel"}}}
    for split, part in (("train", table.slice(0, 4)), ("test", table.slice(4))):
        folder = tmp_path / "set" / split
        folder.mkdir(parents=True)
        with pa.OSFile(str(folder / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part)
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "0.arrow"}]}))
        (folder / "dataset_info.json").write_text(json.dumps(names))
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    found, _ = load(tmp_path / "set", on_small_class="keep")
    assert found.train.class_names == ["a", "b", "c", "d"]
    again = pickle.loads(pickle.dumps(found.test))
    assert [again.read(i) for i in range(4)] == content[4:]
    assert again.name(0).endswith("set, row 5")
    about = {"huggingface": json.dumps({"info": names})}
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "x.parquet")
    source, labelled = lists.list_images(tmp_path / "x.parquet")
    assert labelled and source.read(3) == content[3] and source.class_names == ["a", "b", "c", "d"]
    (tmp_path / "set" / "test" / "0.arrow").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read as a table"):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"split": "holdout"}, r"x\.jsonl, line 2: split 'holdout'; known: train"),
        ({"is_query": "maybe"}, r"line 2: is_query = 'maybe'; it must be true or false"),
        ({"box": [5, 5, 5, 9], "x_1": None}, "has a column box and columns x1"),
        ({"x_1": 7}, r"line 2: box '7 1 4 6'; it must be x1,y1,x2,y2"),
        ({"x_1": "wide"}, r"line 2: box 'wide 1 4 6'"),
        ({"weight": -1}, r"line 2: weight '-1'; it must be a number of at least 0"),
        ({"weight": float("inf")}, r"line 2: weight 'inf'; it must be a number of at least 0"),
        ({"label": None}, r"line 2: no class \(p/1\.jpg\)"),
        ({"image": ""}, r"line 2: no path"),
        ({"file": "p/1.jpg"}, "the columns .* mean the same, the path"),
        ({"is_gallery": False}, None),
    ],
)
def test_refusals(pictures, change, message):
    rows = [dict(row) for row in ROWS]
    rows[1] |= change
    table = write_table(pictures / "x.jsonl", rows)
    if message is None:
        assert len(load(table)[0].train) == 4
        return
    with pytest.raises(UserError, match=message):
        load(table)


def test_misspelt_and_extra_values(pictures):
    (pictures / "x.csv").write_text("path,label,bbox\np/1.jpg,a,0\np/2.jpg,b,0\n")
    said = []
    lists.list_images(pictures / "x.csv", warn=said.append)
    assert said == [f"{pictures}/x.csv: the column 'bbox' is not used; did you mean 'box'?"]
    (pictures / "x.csv").write_text("path,label\np/1.jpg,a, b\n")
    with pytest.raises(UserError, match="3 values for the 2 columns of the header"):
        lists.list_images(pictures / "x.csv")
    (pictures / "x.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"x\.jsonl, line 1: is not JSON"):
        lists.list_images(pictures / "x.jsonl")
    (pictures / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot be read as a table"):
        lists.list_images(pictures / "x.parquet")
    assert tables.is_table(pictures / "x.parquet") and not tables.is_table(pictures)
    assert {"path", "box", "weight"} <= columns.WANTED


def test_weights_in_the_order_of_images():
    weights = np.asarray([0.0, 1.0, 3.0, 4.0])
    sampler = ShuffledSampler(4, 2, 0, weights)
    counts = np.bincount(np.concatenate([sampler.batch(step) for step in range(400)]), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), weights / 8, atol=0.02)
    labels = np.asarray([[0, 1], [0, -1], [0, -1], [1, -1], [1, -1], [1, -1]])
    balanced = BalancedSampler(labels, 4, 2, 0, np.asarray([1.0, 1, 0, 5, 5, 1]))
    batches = np.stack([balanced.batch(step) for step in range(50)])
    assert 2 not in batches and {tuple(sorted(row[:2])) for row in batches} <= {(0, 1), (3, 4), (3, 5), (4, 5), (0, 3), (0, 4), (0, 5)}  # fmt: skip  # noqa: E501
    with pytest.raises(UserError, match="all training images have the weight 0"):
        ShuffledSampler(4, 2, 0, np.zeros(4))


def test_limit_of_pixels_and_transparency(monkeypatch):
    out = io.BytesIO()
    Image.fromarray(np.dstack([np.zeros((2, 3, 3), np.uint8), np.asarray([[0, 255, 51]] * 2, np.uint8)])).save(
        out, "PNG"
    )
    assert decode(out.getvalue())[0, :, 0].tolist() == [255, 0, 204]
    monkeypatch.setenv("IDML_JAX_MAX_PIXELS", "5")
    with pytest.raises(DecodeError, match="3 x 2 pixels are more than the limit of 5 .IDML_JAX_MAX_PIXELS sets it"):
        decode(out.getvalue())
    monkeypatch.setenv("IDML_JAX_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="must be a whole number above 0"):
        decode(out.getvalue())


def test_what_spreadsheets_write(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    for text in ("sep=;\npath;label\na.png;x, y\n", '"sep=\t"\r\npath\tlabel\r\na.png\tx, y\r\n'):
        (tmp_path / "x.csv").write_text(text)
        source, _ = lists.list_images(tmp_path / "x.csv")
        assert source.class_names == ["x, y"] and source.paths == [str(tmp_path / "a.png")]
    (tmp_path / "x.csv").write_text("sep=;\n")
    with pytest.raises(UserError, match="lists no images"):
        lists.list_images(tmp_path / "x.csv")
    assert tables.separated_rows("sep=;\na;b\n", ",") == ("a;b\n", ";")
    assert tables.separated_rows("a;b\n1,2;3\n", ",")[1] == ";" and tables.separated_rows("a\n", "\t")[1] == "\t"


def test_an_image_that_is_listed_twice_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    said = []
    (tmp_path / "x.csv").write_text('path,label,box\na.png,x,\na.png,x,"0,0,1,1"\na.png,y,\n')
    lists.list_images(tmp_path / "x.csv", warn=said.append)
    assert len(said) == 1 and "1 row names an image again, 1 of them with another class, the first" in said[0]
    assert said[0].endswith("a.png (lines 2 and 4)")
    (tmp_path / "x.csv").write_text("path,label,split\na.png,x,query\na.png,x,gallery\n")
    lists.list_images(tmp_path / "x.csv", warn=said.append)
    assert len(said) == 2 and "its column of splits is for training" in said[1]


@pytest.mark.parametrize("held", [False, True])
def test_test_images_that_are_training_images_are_counted(tmp_path, held):
    """By their path, or where a table holds the images by their content; a picture's two boxes are two images."""
    made.write_files(tmp_path, {f"{name}.jpg": made.jpeg(0, 0) for name in "abcdef"})
    names = ["a", "b", "c", "d", "e", "a", "b", "f", "b"]
    splits = ["train"] * 4 + ["validation", "validation", "test", "test", "test"]
    boxes = [""] * 8 + ["0,0,4,4"]
    columns = {"label": [f"of_{name}" for name in names], "split": splits, "box": boxes}
    if held:
        pictures = {name: made.jpeg(0, seed) for seed, name in enumerate("abcdef")}
        table = tmp_path / "t.parquet"
        pq.write_table(pa.table({"image": [pictures[name] for name in names], **columns}), table)
    else:
        table = tmp_path / "t.jsonl"
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = [json.dumps({"path": f"{name}.jpg", **row}) for name, row in zip(names, rows, strict=True)]
        table.write_text("\n".join(lines))
    said = []
    table_splits(str(table), warn=said.append)
    unit = "rows" if held else "lines"
    told = [line for line in said if "training images" in line]
    assert [line.partition(": ")[2].partition(", the first")[0] for line in told] == [
        "1 of 3 test images are training images, too",
        "1 of 2 validation images are training images, too",
    ]
    assert f"({unit} 2 and 7); metrics of such images" in told[0] and f"({unit} 1 and 6)" in told[1]


def test_an_image_that_a_table_holds_twice_is_named(tmp_path):
    images = [made.jpeg(0, 0), made.jpeg(0, 1), made.jpeg(0, 0)]
    pq.write_table(pa.table({"image": images, "label": ["a", "b", "b"]}), tmp_path / "t.parquet")
    said = []
    lists.list_images(tmp_path / "t.parquet", warn=said.append)
    assert len(said) == 1 and "1 row holds an image again, 1 of them with another class" in said[0]
    assert said[0].endswith("(rows 1 and 3)")


@pytest.mark.parametrize("empty", [None, b"", {"bytes": None, "path": None}])
def test_empty_cells_of_images(tmp_path, empty):
    """They are told as what they are, with the row once, at every door."""
    wrap = (lambda x: {"bytes": x, "path": None}) if isinstance(empty, dict) else (lambda x: x)
    cells = [empty if i == 5 else wrap(made.jpeg(i % 4, i)) for i in range(8)]
    pq.write_table(pa.table({"image": cells, "label": [f"c{i % 4}" for i in range(8)]}), tmp_path / "x.parquet")
    told = f"{tmp_path}/x.parquet, row 6: its cell of the table is empty, so there is no image"
    with pytest.raises(UserError) as caught:
        load(tmp_path / "x.parquet")
    assert str(caught.value) == f"{told}; config.data.on_corrupt=skip leaves such files out"
    found, said = load(tmp_path / "x.parquet", on_corrupt="skip", on_small_class="keep")
    assert said[:1] == [f"1 of 8 files is not a readable image and is left out: {told}"]
    assert len(found.train) + len(found.test) == 7
    source, _ = lists.list_images(tmp_path / "x.parquet")
    with pytest.raises(UserError) as caught:
        source.read(5)
    assert str(caught.value) == told
    reading = pipeline.Reading(ResizeCenterCrop(8, 8))
    (batch,) = pipeline.eval_batches(source, reading, batch_size=8, on_bad="skip")
    assert batch["problem"][5] == "its cell of the table is empty, so there is no image"
