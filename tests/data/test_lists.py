"""Lists of images in all supported forms, and refused lists."""

import csv
import os

import archives_made as made
import numpy as np
import pytest

from idml_jax.data import files, lists, tables
from idml_jax.errors import UserError

IMAGE = made.jpeg(0, 0)


def fill(root, names):
    return made.write_files(root, {name: IMAGE for name in names})


class TestLists:
    def listed(self, tmp_path, content, name="x.txt", present=("a/1.jpg", "b/2.jpg", "c, d/3.jpg")):
        root = fill(tmp_path, present)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        said = []
        source, known = lists.list_images(root / name, warn=said.append)
        named = [source.class_names[k] for k in source.labels] if known else None
        return [os.path.relpath(path, root) for path in source.paths], named, said

    @pytest.mark.parametrize(
        "name,content",
        [
            ("x.txt", "a/1.jpg\tx\nb/2.jpg\ty\n"),
            ("x.txt", "a/1.jpg,x\nb/2.jpg,y\n"),
            ("x.lst", "a/1.jpg;x\r\n\r\nb/2.jpg;y"),
            ("x.csv", "a/1.jpg,x\nb/2.jpg,y\n"),
            ("x.csv", "path;label\na/1.jpg;x\nb/2.jpg;y\n"),
            ("x.CSV", "\ufeffimage,class\na/1.jpg,x\nb/2.jpg,y\n"),
            ("x.csv", 'Class , File\n"x" , "a/1.jpg"\ny,b/2.jpg\n'),
            ("x.csv", "id,file,split,label\n7,a/1.jpg,train,x\n8,b/2.jpg,test,y\n"),
            ("x.tsv", "file_name\tcategory\na/1.jpg\tx\nb/2.jpg\ty\n"),
            ("x.tsv", '"a/1.jpg"\t"x"\nb/2.jpg\ty\n'),
        ],
    )
    def test_forms(self, tmp_path, name, content):
        found, named, said = self.listed(tmp_path, content, name)
        assert (found, named) == (["a/1.jpg", "b/2.jpg"], ["x", "y"])
        assert [line.split(": ")[1][:23] for line in said] == ["its column of splits is"] * ("split" in content)

    @pytest.mark.parametrize("name,separator", [("x.csv", ","), ("x.csv", ";"), ("x.tsv", "\t"), ("x.txt", ";")])
    @pytest.mark.parametrize("path", ["img_path", "IMAGE_FILE", "img_file"])
    def test_names_of_the_path_column(self, tmp_path, name, separator, path):
        content = f"{path},label,split\na/1.jpg,x,train\nb/2.jpg,y,test\n".replace(",", separator)
        assert self.listed(tmp_path, content, name)[:2] == (["a/1.jpg", "b/2.jpg"], ["x", "y"])
        assert lists.read_listing(tmp_path / name).splits == ["train", "test"]

    @pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.txt", "x.lst"])
    @pytest.mark.parametrize(
        "content,message",
        [
            (
                "photo,label,split\na/1.jpg,x,train\n",
                r"line 1: names columns \(label, split\), but none .* path, paths,",
            ),
            ("photo,class\na/1.jpg,x\n", r"line 1: names columns \(class\), but none .*one of path, .*img_path"),
            ("photo,label,split\na/1,x,train\n", r"line 1: names columns \(label, split\), but none"),
            ("a/1.jpg,x,\nb/2.jpg,y,test\n", r"line 2: 3 values, while a table without a header .*path, label, split"),
            ("photo,breed,part\na/1.jpg,x,train\n", r"line 1: 3 values, while a table without a header"),
        ],
    )
    def test_a_column_is_not_dropped_for_want_of_a_header(self, tmp_path, name, content, message):
        separator = "," if name == "x.csv" else "\t"
        with pytest.raises(UserError, match=rf"{name}, {message}"):
            self.listed(tmp_path, content.replace(",", separator), name)

    def test_a_class_may_have_the_name_of_a_column(self, tmp_path):
        assert self.listed(tmp_path, "a/1.jpg\tcamera\nb/2.jpg\tbox\n")[:2] == (
            ["a/1.jpg", "b/2.jpg"],
            ["camera", "box"],
        )
        made.write_files(tmp_path, {"a/1": IMAGE})
        assert self.listed(tmp_path, "a/1\tcamera\nb/2.jpg\tbox\n")[1] == ["camera", "box"]

    def test_spaces_in_quotes_are_part_of_a_name(self, tmp_path):
        content = '"path","class","split"\n"a/1.jpg"," x y"," train"\na/1.jpg,"x y ",train\nb/2.jpg, x y ,test \n'
        assert self.listed(tmp_path, content, "x.csv")[1] == [" x y", "x y ", "x y"]
        assert lists.read_listing(tmp_path / "x.csv").splits == ["train", "train", "test"]

    def test_paths_alone(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        content = f"{tmp_path}/a/1.jpg\n./b/2.jpg\n~/c, d/3.jpg\n"
        found, named, said = self.listed(tmp_path, content)
        assert (found, named, said) == (["a/1.jpg", "b/2.jpg", "c, d/3.jpg"], None, [])
        content = 'path\n"c, d/3.jpg"\na/1.jpg\n'
        assert self.listed(tmp_path, content, "y.csv")[0] == ["c, d/3.jpg", "a/1.jpg"]

    def test_missing_files_are_counted_and_stay(self, tmp_path):
        found, named, said = self.listed(tmp_path, "a/1.jpg\tx\nnone.jpg\ty\ngone.jpg\ty\n")
        assert len(found) == 3 and named == ["x", "y", "y"]
        assert said == [f"{tmp_path}/x.txt: 2 of 3 files do not exist, the first {tmp_path}/none.jpg"]

    @pytest.mark.parametrize(
        "content,message",
        [
            (b"", "lists no images"),
            (b"\n \n", "lists no images"),
            (b"path,label\n", "lists no images|none of its 1 files"),
            (b"a/1.jpg\tx\nb/2.jpg\n", r"x\.txt, line 2: no class \(b/2\.jpg\), while other lines have one"),
            (b"a/1.jpg\t\nb/2.jpg\tx\n", r"x\.txt, line 1: no class \(a/1\.jpg\)"),
            (b"a/1.jpg\tx\n\ty\n", r"x\.txt, line 2: no path"),
            (b"none.jpg\n", r"none of its 1 files exists, the first .*none\.jpg; paths are relative to the list"),
            ("a/1.jpg\n".encode("utf-16"), "not UTF-8 text"),
            (IMAGE + b"\0", "not UTF-8 text"),
            (b'"a/1.jpg\tx\n', r"x\.txt, line 1: its quotes are not balanced"),
            (b"a" * 100_000, "none of its 1 files exists"),
        ],
    )
    def test_refusals(self, tmp_path, content, message):
        with pytest.raises(UserError, match=message):
            self.listed(tmp_path, content)

    def test_names_that_are_no_utf8(self, tmp_path):
        raw = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
        with open(raw, "wb") as file:
            file.write(IMAGE)
        (tmp_path / "x.txt").write_bytes(b"\xff\xfe.jpg\tk\n")
        source, known = lists.list_images(tmp_path / "x.txt")
        assert known and source.read(0) == IMAGE

    @pytest.mark.parametrize("column", ["label", "labels", "group"])
    def test_classes_and_groups_that_are_no_utf8_are_refused(self, tmp_path, column):
        content = f"path,{column}\na/1.jpg,x\nb/2.jpg,K\xe4se\n"
        assert self.listed(tmp_path, content.encode())[0] == ["a/1.jpg", "b/2.jpg"]
        what = "group" if column == "group" else "class"
        with pytest.raises(
            UserError, match=rf"x.txt, line 3: the {what} K\\xe4se is not UTF-8; save the table as UTF-8"
        ):
            self.listed(tmp_path, content.encode("latin-1"))

    def test_names_of_files_in_another_encoding_are_explained(self, tmp_path):
        present = ("a/1.jpg", "b/\xe4.jpg")
        said = self.listed(tmp_path, "a/1.jpg\nb/\xe4.jpg\n".encode("latin-1"), present=present)[2]
        assert len(said) == 1 and said[0].endswith(
            r"b/\xe4.jpg; the table is not UTF-8, as the names of files mostly are"
        )
        with pytest.raises(UserError, match="the table is not UTF-8"):
            self.listed(tmp_path, "b/\xe4.jpg\n".encode("latin-1"), present=present)

    def test_what_is_no_regular_file(self, tmp_path, monkeypatch):
        os.mkfifo(tmp_path / "pipe.txt")
        (tmp_path / "zero.txt").symlink_to("/dev/zero")
        (tmp_path / "zero.jpg").symlink_to("/dev/zero")
        for name in ("pipe.txt", "zero.txt", "zero.jpg"):
            with pytest.raises(UserError, match="neither a regular file nor a folder"):
                lists.list_images(tmp_path / name)
        fill(tmp_path, ["1.jpg"])
        os.mkfifo(tmp_path / "2.jpg")
        (tmp_path / "x.txt").write_text("1.jpg\n2.jpg\nzero.jpg\n.\n")
        source, _ = lists.list_images(tmp_path / "x.txt")
        assert source.read(0) == IMAGE
        for row in (1, 2, 3):
            with pytest.raises(files.FileError, match="not a regular file"):
                source.read(row)
        monkeypatch.setattr(tables, "MAX_BYTES", 10)
        with pytest.raises(UserError, match=r"x\.txt: 23 bytes are more than the limit of 10"):
            lists.list_images(tmp_path / "x.txt")

    def test_large_images_are_refused_by_name(self, tmp_path, monkeypatch):
        with open(tmp_path / "1.jpg", "wb") as file:
            file.truncate(files.MAX_FILE_BYTES + 1)  # takes no room
        source, _ = lists.list_images(tmp_path / "1.jpg")
        with pytest.raises(files.FileError, match=r"1\.jpg: 536,870,913 bytes are more than the limit"):
            source.read(0)
        assert np.array_equal(source.labels, [0])


class TestSeveralLabels:
    def read(self, tmp_path, labels, name="x.csv"):
        root = fill(tmp_path, [f"{number}.jpg" for number in range(len(labels))])
        with open(root / name, "w", newline="") as out:
            csv.writer(out).writerows([("path", "labels"), *((f"{n}.jpg", text) for n, text in enumerate(labels))])
        said = []
        source, _ = lists.list_images(root / name, warn=said.append)
        return sorted(source.class_names), said

    @pytest.mark.parametrize("text", ["['a', 'b']", "[1, 2]", "('a', 'b')", " {'a'} "])
    def test_the_text_of_a_list_is_refused(self, tmp_path, text):
        words = r"x\.csv, line 3: labels = .* is the text of a list .* by '\|', or store lists"
        with pytest.raises(UserError, match=words):
            self.read(tmp_path, ["a|b", text])

    @pytest.mark.parametrize("labels", [["a,b", "a", "b,c"], ["a; b", "c;d"]])
    def test_other_separators_are_named(self, tmp_path, labels):
        names, said = self.read(tmp_path, labels)
        assert len(names) == len(labels) and len(said) == 1
        assert f"2 of {len(labels)} labels are texts as {labels[0]!r}, each of them one class" in said[0]

    @pytest.mark.parametrize("labels", [["a|b", "Paris, Texas|c"], ["a", "b", "Paris, Texas"], ["(a)", "b [c]"]])
    def test_ordinary_labels_are_left_alone(self, tmp_path, labels):
        assert not self.read(tmp_path, labels)[1]
