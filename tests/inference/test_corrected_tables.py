"""Corrected sets of images that are not files of their own: rows of a table, records of a run's data."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from idml_jax import audit, embed
from idml_jax.data.lists import list_images
from idml_jax.errors import UserError
from idml_jax.inference import corrections
from idml_jax.inference import index as indices
from idml_jax.inference.encoded import encoded_reader


def held(folder, where, several=False):
    """A table that holds two images of each of four classes, the second of each twice, as parts of a picture."""
    rows = [(label, i, box) for label in range(4, 8) for i, box in ((0, ""), (1, "0,0,20,20"), (1, "4,4,24,24"))]
    names = [f"class_{label:02d}" for label, _, _ in rows]
    columns = {
        "image": [(folder / f"test/class_{label:02d}/{i:02d}.png").read_bytes() for label, i, _ in rows],
        "labels" if several else "label": [f"{name}|all" for name in names] if several else names,
        "box": [box for _, _, box in rows],
        "group": [str(i) for _, i, _ in rows],
    }
    pa.parquet.write_table(pa.table(columns), where)
    return columns


def decided(index, where, changes):
    """A file of decisions: each change is a row of the index and its new class, empty to remove the image."""
    with open(where, "w", newline="") as file:
        table = csv.DictWriter(file, ["action", "path", "proposed", "box", "decision"])
        table.writeheader()
        for row, name in changes:
            told = {"path": index.files[row], "box": corrections.box_of(index, row), "decision": "accept"}
            table.writerow({**told, "action": "relabel" if name else "remove", "proposed": name})


@pytest.mark.parametrize("several", [False, True])
def test_images_of_a_table_are_corrected_in_a_table(finished, image_folder, tmp_path, capsys, several):
    columns = held(image_folder, tmp_path / "held.parquet", several)
    out = tmp_path / "held.npz"
    embed.main([f"--workdir={finished[0]}", f"--images={tmp_path / 'held.parquet'}", f"--out={out}"])
    index = indices.read(out)
    audit.main([f"--index={out}", f"--out={tmp_path / 'audited'}"])
    assert "--out=corrected.parquet" in capsys.readouterr().out
    decided(index, tmp_path / "d.csv", [(2, "")] if several else [(1, "class_07"), (5, "")])
    apply = [f"--index={out}", f"--apply={tmp_path / 'd.csv'}"]
    for name in ("x.csv", "x"):
        with pytest.raises(SystemExit):
            audit.main([*apply, f"--out={tmp_path / name}"])
        told = capsys.readouterr().err
        assert "row 1: is not the path of a file" in told and "--out=corrected.parquet" in told
    audit.main([*apply, f"--out={tmp_path / 'x.parquet'}"])
    source, known = list_images(str(tmp_path / "x.parquet"))
    kept = np.delete(np.arange(12), 2 if several else 5)
    assert known and [source.read(record) for record in range(11)] == [columns["image"][row] for row in kept]
    assert source.fields["group"].tolist() == [columns["group"][row] for row in kept]
    boxes = [columns["box"][row] for row in kept]
    assert [",".join(map(str, box)) if box.any() else "" for box in source.fields["box"]] == boxes
    if several:
        assert set(source.class_names) == {"all", *(f"class_{label:02d}" for label in range(4, 8))}
    else:
        expected = [columns["label"][row] for row in kept]
        expected[1] = "class_07"
        assert [source.class_names[label] for label in source.labels] == expected


def test_a_table_that_has_changed_gives_no_images(finished, image_folder, tmp_path):
    table = tmp_path / "held.parquet"
    held(image_folder, table)
    embed.main([f"--workdir={finished[0]}", f"--images={table}", f"--out={tmp_path / 'held.npz'}"])
    index = indices.read(tmp_path / "held.npz")
    assert encoded_reader(index, "")(str(index.files[0])) is not None
    pa.parquet.write_table(pa.parquet.read_table(table).take(list(range(11, -1, -1))), table)
    assert encoded_reader(index, "")(str(index.files[0])) is None
    corrected = corrections.apply(index, [])
    with pytest.raises(UserError, match="row 1: the image is not found, so no table can hold it"):
        corrections.write(corrected, tmp_path / "x.parquet", lambda row: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held.npz", "held.parquet"]


def test_files_too_are_corrected_in_a_table(finished, image_folder, tmp_path):
    out = tmp_path / "files.npz"
    embed.main([f"--workdir={finished[0]}", f"--images={image_folder / 'test'}", f"--out={out}"])
    index = indices.read(out)
    decided(index, tmp_path / "d.csv", [(3, "new, one")])
    audit.main([f"--index={out}", f"--apply={tmp_path / 'd.csv'}", f"--out={tmp_path / 'x.parquet'}"])
    source, _ = list_images(str(tmp_path / "x.parquet"))
    assert len(source) == 96 and source.class_names[source.labels[3]] == "new, one"
    with open(index.files[7], "rb") as file:
        assert source.read(7) == file.read()
