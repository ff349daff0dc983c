"""Results never overwrite what a command reads, nor files of another kind."""

import numpy as np
import pytest

from idml_jax import audit, compare, embed, evaluate, export, report, search
from idml_jax.errors import UserError
from idml_jax.reporting import page
from idml_jax.runtime.files import check_result

READ = "is read by this command and would be overwritten"


@pytest.mark.parametrize(
    "door, words, name, message",
    [
        (search, ["--index=none.npz", "--query={}", "--out={}"], "q.png", READ),
        (search, ["--index=none.npz", "--query={}", "--out={}"], "list.jsonl", READ),
        (search, ["--index=none.npz", "--query=q.png", "--held_out={}", "--out={}"], "sheet.html", READ),
        (evaluate, ["--embeddings={}", "--out={}"], "photos.npz", "the name must end in .json"),
        (export, ["--index={}", "--faiss={}"], "photos.npz", READ),
        (audit, ["--index=none.npz", "--apply={}", "--out={}"], "decisions.csv", READ),
        (compare, ["--workdir=none", "--pairs={}", "--out={}"], "pairs.csv", READ),
        (report, ["--workdir=none", "--out={}"], "photo.png", "the name must end in .html"),
        (embed, ["--workdir=none", "--images={}", "--out={}", "--overwrite"], "photos.parquet", READ),
    ],
)
def test_a_command_does_not_write_over_what_it_reads(door, words, name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    if name == "photos.npz":
        about = '{"format": 1}'
        np.savez(file, semantic=np.eye(3, dtype=np.float32), files=np.asarray(["a", "b", "c"]), about=np.asarray(about))
    else:
        file.write_bytes(b"precious")
    before = file.read_bytes()
    with pytest.raises(SystemExit) as ended:
        door.main([word.format(file) for word in words])
    assert ended.value.code != 0
    assert message in str(ended.value.code) + capsys.readouterr().err
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_of_the_same_file_is_found(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    (tmp_path / "other.png").hardlink_to(tmp_path / "photo.png")
    (tmp_path / "folder").symlink_to(tmp_path)
    for name in ("photo.png", "other.png", "folder/photo.png"):
        with pytest.raises(UserError, match="would be overwritten"):
            check_result(tmp_path / name, ["", tmp_path / "absent.png", tmp_path / "photo.png"])
    check_result(tmp_path / "sheet.png", [tmp_path / "photo.png"], (".png",))


def test_a_page_of_a_run_is_a_page(tmp_path):
    with pytest.raises(UserError, match="must end in .html"):
        page.make(tmp_path, tmp_path / "page.pdf")
