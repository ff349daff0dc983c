"""A folder has the same images and classes for training, prepare, embed and search; lists of images."""

import os
import re
import shutil
import socket
import zipfile
from pathlib import Path

import archives_made as made
import cv2
import numpy as np
import pytest

from idml_jax.data import datasets, files, folders, lists, sources
from idml_jax.data.images import decode
from idml_jax.data.stored import layouts
from idml_jax.errors import UserError

IMAGE = made.jpeg(0, 0)


def fill(root, names):
    return made.write_files(root, {name: IMAGE for name in names})


def classes(*names, images=2):
    return [f"{name}/{i}.jpg" for name in names for i in range(images)]


def of_training(root):
    """Maps each split to (class, name) pairs; also returns the messages."""
    said = []
    found = sources.scan_splits(root, said.append)
    return {
        split: sorted(
            (part.class_names[label], os.path.relpath(path, root))
            for path, label in zip(part.paths, part.labels, strict=True)
        )
        for split, part in found.items()
    }, said


def of_prepare(root):
    plan = layouts.folder(root)
    found = {}
    for record in plan.records():
        found.setdefault(record.split, []).append((plan.class_names[record.label], record.name))
    return {split: sorted(rows) for split, rows in found.items()}, list(plan.notes)


def of_embed(root):
    said = []
    source, known = lists.list_images(root, warn=said.append)
    rows = zip(source.paths, source.labels, strict=True)
    return {os.path.relpath(path, root): source.class_names[k] if known else None for path, k in rows}, said


AB = classes("a", "b")
SPLIT = classes("train/a", "train/b", "test/c", "test/d")

ALONE = "train is the only split folder; its class folders are taken as one set"

# Content of a folder; the splits and classes that every command finds; messages about the rest.
ODD = {
    "class folders": (AB, {"images": "ab"}, []),
    "deeper folders belong to the class": (["a/x/1.jpg", "a/2.jpg", "b/y/z/3.jpg", "b/4.jpg"], {"images": "ab"}, []),
    "train and test": (SPLIT, {"train": "ab", "test": "cd"}, []),
    "any case": (
        [n.replace("train", "Train").replace("test", "TEST") for n in SPLIT],
        {"train": "ab", "test": "cd"},
        [],
    ),
    "training and valid": (
        [n.replace("train", "training").replace("test", "Valid") for n in SPLIT],
        {"train": "ab", "test": "cd"},
        [],
    ),
    "dev": ([n.replace("test", "dev") for n in SPLIT], {"train": "ab", "test": "cd"}, []),
    "Train, Test, Valid and extra": (
        [*(n.replace("train", "Train").replace("test", "Test") for n in SPLIT), *classes("Valid/c", "extra/e")],
        {"train": "ab", "test": "cd"},
        [f"skipped 4 {folders.ASIDE}, the first Valid/c/0.jpg"],
    ),
    "a folder that is no split": (
        [*SPLIT, "sketches/s/1.jpg"],
        {"train": "ab", "test": "cd"},
        [f"skipped 1 {folders.ASIDE}, the first sketches/s/1.jpg"],
    ),
    "query and gallery": (
        classes("train/a", "query/b", "gallery/b", "gallery/c"),
        {"train": "a", "query": "b", "gallery": "bc"},
        [],
    ),
    "a class called train": (classes("bus", "car", "train"), {"images": ["bus", "car", "train"]}, []),
    "wrapped": ([f"my_set/{n}" for n in AB], {"images": "ab"}, []),
    "wrapped twice": ([f"my_set/data/{n}" for n in SPLIT], {"train": "ab", "test": "cd"}, []),
    "train alone": (classes("train/a", "train/b"), {"images": "ab"}, [ALONE]),
    "hidden": (
        [*AB, ".ipynb_checkpoints/a/1.jpg", "a/.3.jpg", "@eaDir/x/1.jpg", "__MACOSX/a/1.jpg", "b/Thumbs.db"],
        {"images": "ab"},
        [f"skipped 5 {folders.HIDDEN}, the first .ipynb_checkpoints"],
    ),
    "other endings": (
        [*AB, "a/notes.txt", "readme.md", "b/3.jpg.part"],
        {"images": "ab"},
        [f"skipped 3 {folders.OTHER}, the first a/notes.txt"],
    ),
    "endings in any case": (["a/1.JPG", "a/2.Jpeg", "b/1.jfif", "b/2.jpe"], {"images": "ab"}, []),
    "an empty class": ([*AB, "c/"], {"images": "ab"}, [f"skipped 1 {folders.EMPTY}, the first c"]),
    "an empty class of a split": (
        [*SPLIT, "test/e/", "test/f/"],
        {"train": "ab", "test": "cd"},
        [f"skipped 2 {folders.EMPTY}, the first test/e"],
    ),
    "blanks and signs": (classes("a b", "ü", "x=1,;"), {"images": ["a b", "x=1,;", "ü"]}, []),
}


@pytest.mark.parametrize("name", ODD)
def test_every_command_finds_the_same_images(name, tmp_path):
    contents, expected, said = ODD[name]
    root = tmp_path / "root"
    fill(root, [entry for entry in contents if not entry.endswith("/")])
    for entry in contents:
        if entry.endswith("/"):
            (root / entry).mkdir(parents=True)
    found, told = of_training(root)
    assert {split: sorted({row[0] for row in rows}) for split, rows in found.items()} == {
        split: sorted(names) for split, names in expected.items()
    }
    assert told == [f"{root}: {line}" for line in said]
    assert of_prepare(root) == (found, told)
    classes_of, heard = of_embed(root)
    for rows in found.values():
        for class_name, file in rows:
            assert classes_of[file] == class_name
    assert heard == [line for line in told if folders.ASIDE not in line]
    # As an archive too, but for empty folders, which archives need not tell.
    with zipfile.ZipFile(tmp_path / "root.zip", "w") as archive:
        for entry in contents:
            if not entry.endswith("/"):
                archive.writestr(entry, IMAGE)
    packed, _ = of_prepare(tmp_path / "root.zip")
    assert packed == {
        split: [(class_name, f"root.zip/{file}") for class_name, file in rows] for split, rows in found.items()
    }


REFUSED = {
    "two folders for one split": ([*SPLIT, "Testing/c/1.jpg"], "Testing, test are several folders for one split"),
    "an empty test folder": ([*classes("train/a", "train/b"), "test/"], "root/test: it holds no images"),
    "test without train": (classes("test/a", "val/b"), "test, val, but no train"),
    "query alone": (classes("train/a", "query/b"), "but no gallery; expected train, query and gallery"),
    "query, gallery and test": (classes("train/a", "query/b", "gallery/b", "test/c"), "but test too"),
    "train and extra": (classes("train/a", "extra/b"), "train, but no test"),
    "a flat test folder": ([*classes("train/a", "train/b"), "test/1.jpg"], r"test/1\.jpg lies outside a class folder"),
    "loose images": (["1.jpg", "2.jpg"], r"1\.jpg lies outside a class folder; expected <class>/<image>"),
    "nothing": (["readme.md"], "it holds no images"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_and_prepare_refuse_the_same(name, tmp_path):
    contents, message = REFUSED[name]
    fill(tmp_path / "root", [entry for entry in contents if not entry.endswith("/")])
    for entry in contents:
        if entry.endswith("/"):
            (tmp_path / "root" / entry).mkdir()
    for door in (of_training, of_prepare):
        with pytest.raises(UserError, match=message):
            door(tmp_path / "root")


def test_loose_images_beside_classes(tmp_path):
    root = fill(tmp_path / "root", [*AB, "preview.jpg"])
    found, said = of_training(root)
    assert said == [f"{root}: skipped 1 {folders.LOOSE}, the first preview.jpg"]
    assert of_prepare(root) == (found, said)
    # Who embeds a folder wants all its images.
    classes_of, said = of_embed(root)
    assert len(classes_of) == 5 and set(classes_of.values()) == {None}
    assert said == [f"{root}: classes are unknown, as 1 of 5 images lie outside class folders, the first preview.jpg"]


class TestLinks:
    def test_linked_class_folders_and_files_are_followed(self, tmp_path):
        elsewhere = fill(tmp_path / "elsewhere", classes("a", "b"))
        root = fill(tmp_path / "root", classes("c"))
        (root / "a").symlink_to(elsewhere / "a")
        (root / "c" / "link.jpg").symlink_to(elsewhere / "b" / "0.jpg")
        found, said = of_training(root)
        assert [row[0] for row in found["images"]] == ["a", "a", "c", "c", "c"] and not said
        assert of_prepare(root) == (found, []) and len(of_embed(root)[0]) == 5

    def test_split_folders_of_links(self, tmp_path):
        root = fill(tmp_path / "root", classes("all/a", "all/b", "all/c", "all/d"))
        for split, names in (("train", "ab"), ("test", "cd")):
            (root / split).mkdir()
            for name in names:
                (root / split / name).symlink_to(root / "all" / name)
        found, said = of_training(root)
        assert {s: len(rows) for s, rows in found.items()} == {"train": 4, "test": 4}
        assert said == [f"{root}: skipped 8 {folders.ASIDE}, the first all/a/0.jpg"]
        assert of_prepare(root) == (found, said)

    def test_circles_end(self, tmp_path):
        root = fill(tmp_path / "root", classes(*"abcdefgh"))
        for one in "abcdefgh":
            (root / one / "up").symlink_to(root)
            for other in "abcdefgh":
                if one != other:
                    (root / one / f"to_{other}").symlink_to(root / other)
        found, said = of_training(root)
        assert len(said) == 1 and folders.LINKS in said[0]
        assert of_prepare(root) == (found, said)
        # Each link's target is walked once more, not each way to it.
        assert len(found["images"]) <= 8 * 2 + 8 * 2

    def test_a_folder_linked_beside_itself_or_twice(self, tmp_path):
        outside = fill(tmp_path / "outside", ["1.jpg"])
        root = fill(tmp_path / "root", classes("z"))
        (root / "a").symlink_to(root / "z")
        (root / "b").symlink_to(outside)
        (root / "c").symlink_to(outside)
        found, said = of_training(root)
        assert [row[0] for row in found["images"]] == ["b", "z", "z"]
        assert said == [f"{root}: skipped 2 {folders.LINKS}, the first a"]
        assert of_prepare(root) == (found, said) and of_embed(root)[1] == said

    def test_broken_links_pipes_and_sockets_are_that_images_failure(self, tmp_path):
        root = fill(tmp_path / "root", classes("a", "b", "c", "d"))
        (root / "a" / "broken.jpg").symlink_to("/no/such")
        (root / "a" / "itself.jpg").symlink_to("itself.jpg")
        os.mkfifo(root / "b" / "pipe.jpg")
        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()
            os.chdir(root / "b")  # paths of sockets have to be short
            try:
                opened.bind("socket.jpg")
            finally:
                os.chdir(here)
            first = rf"^{root}/a/broken\.jpg: a link to /no/such.*\(and 3 more files\)"  # its name once
            with pytest.raises(UserError, match=first):
                datasets.load_dataset("folder", root=str(root))
            said = []
            splits = datasets.load_dataset("folder", root=str(root), on_corrupt="skip", warn=said.append)
            assert len(splits.train) + len(splits.test) == 8
            assert said[0] == (
                f"4 of 12 files are not readable images and are left out: {root}/a/broken.jpg: a link to /no/such, "
                f"which does not exist; remove the link or restore the file; {root}/a/itself.jpg: cannot be read (Too "
                f"many levels of symbolic links); {root}/b/pipe.jpg: not a regular file; {root}/b/socket.jpg: not a "
                "regular file"
            )
            source, _ = lists.list_images(root)
            for index, path in enumerate(source.paths):
                if "/b/pipe" in path or "/b/socket" in path:
                    with pytest.raises(files.FileError, match="not a regular file"):
                        source.read(index)

    def test_many_unreadable_files_are_counted_and_five_named(self, tmp_path):
        root = fill(tmp_path / "root", classes("a", "b", "c", "d"))
        for number in range(7):
            (root / "a" / f"n{number}.jpg").write_bytes(b"")
        said = []
        datasets.load_dataset("folder", root=str(root), on_corrupt="skip", warn=said.append)
        named = "; ".join(f"{root}/a/n{number}.jpg: the file is empty" for number in range(5))
        assert said == [f"7 of 15 files are not readable images and are left out: {named}; and 2 more"]

    def test_folders_that_cannot_be_read(self, tmp_path, monkeypatch):
        root = fill(tmp_path / "root", classes("a", "b"))
        scandir = os.scandir

        def closed(path):
            if str(path).endswith("/b"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", closed)
        for door in (of_training, of_prepare, of_embed):
            with pytest.raises(UserError, match=r"root/b: this folder cannot be read \(Permission denied\)"):
                door(root)

    def test_very_deep_folders(self, tmp_path):
        # Deeper than Python's stack.
        root, depth = fill(tmp_path / "root", classes("a", "b")), 1200
        here = os.getcwd()
        os.chdir(root / "a")
        try:
            for _ in range(depth):
                os.mkdir("x")
                os.chdir("x")
            found, _ = of_training(root)
            assert len(found["images"]) == 4
        finally:  # nor would pytest get rid of it
            for _ in range(depth):
                os.chdir("..")
                os.rmdir("x")
            os.chdir(here)

    def test_names_that_are_no_utf8(self, tmp_path):
        root = fill(tmp_path / "root", classes("a", "b"))
        raw = os.fsencode(root) + b"/c\xff"
        os.mkdir(raw)
        for i in range(2):
            with open(raw + b"/%d\xfe.jpg" % i, "wb") as file:
                file.write(IMAGE)
        from idml_jax import prepare

        found, _ = of_training(root)
        assert [row[0] for row in found["images"]][-1] == "c\udcff"
        source, known = lists.list_images(root)
        assert known and source.read(5) == IMAGE
        folder = prepare.prepare("folder", root, tmp_path / "sets", name="x", say=lambda line: line.encode())
        assert (folder / "label.labels.txt").read_text().split() == ["a", "b", "c\\xff"]

    def test_messages_about_such_names_can_be_printed(self, tmp_path):
        from idml_jax import prepare

        root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
        fill(root, [*classes("a", "b", "c", "d"), "a/n\udcfe.txt"])
        (root / "b" / "\udcfe.jpg").write_bytes(b"no image")
        said = []
        splits = datasets.load_dataset("folder", root=str(root), on_corrupt="skip", warn=said.append)
        assert len(splits.train) == 4 and len(said) == 2
        prepare.prepare(
            "folder", root, tmp_path / "sets", name="x", on_corrupt="skip", allow_incomplete=True, say=said.append
        )
        assert lists.list_images(root, warn=said.append)[1]
        "".join(said).encode()  # raises if it cannot be


def test_documented_endings_are_the_real_ones():
    known = {ending for endings in decode.FORMATS.values() for ending in endings}
    assert set(decode.ENDINGS) == known
    documented = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text()
    listed = documented.split("one of these endings, in any case:")[1].split("where the installed Pillow")[0]
    assert set(re.findall(r"`(\.\w+)`", listed)) == known | {".avif"}
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"} <= known


def test_paths_as_typed(tmp_path, monkeypatch):
    fill(tmp_path / "home" / "photos", classes(*"abcd"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    from idml_jax import prepare

    for root in ("~/photos", "photos", "./photos"):
        assert len(datasets.load_dataset("folder", root=root).train) == 4
        assert len(lists.list_images(root)[0]) == 8
    prepare.prepare("folder", "~/photos", "~/sets", say=lambda line: None)
    assert len(datasets.load_dataset("folder", data_dir="~/sets", variant="photos").train) == 4
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.data\.root = photos, below the current folder"):
        datasets.load_dataset("folder", root="photos")


class TestCopies:
    """Parts that hold the images of another part."""

    def said(self, root, **options):
        lines = []
        datasets.load_dataset("folder", root=str(root), warn=lines.append, **options)
        return [line for line in lines if "copies" in line]

    def test_a_copied_part_is_named(self, image_folder, tmp_path):
        assert self.said(image_folder) == []
        for part in ("train", "test"):
            shutil.copytree(image_folder / "train", tmp_path / part)
        (tmp_path / "test/class_00/00.png").write_bytes(b"another")  # not all of them, and one of its own
        (line,) = self.said(tmp_path, on_corrupt="skip")
        assert line.startswith("test images are copies of training images (50 found")
        assert str(tmp_path / "test/class_00/01.png") in line and "recall comes out too high" in line

    def test_names_that_repeat_in_every_class(self, tmp_path):
        """``<class>/images/0.bmp``: only the whole path tells which file was copied."""
        for label in range(30):
            folder = tmp_path / "train" / f"c{label:02d}" / "images"
            folder.mkdir(parents=True)
            for number in range(3):
                pixels = np.random.default_rng([label, number]).integers(0, 256, (16, 16, 3), np.uint8)
                cv2.imwrite(str(folder / f"{number}.bmp"), pixels)
        shutil.copytree(tmp_path / "train", tmp_path / "test")
        (line,) = self.said(tmp_path)
        assert "(50 found" in line and str(tmp_path / "train/c00/images/0.bmp") in line

    def test_queries_in_the_gallery(self, image_folder, tmp_path):
        shutil.copytree(image_folder / "train", tmp_path / "train")
        for part in ("query", "gallery"):
            shutil.copytree(image_folder / "test", tmp_path / part)
        (line,) = self.said(tmp_path)
        assert line.startswith("queries are copies of gallery images")

    def test_the_same_names_and_sizes_are_no_copies(self, image_folder, tmp_path):
        for part in ("train", "test"):
            shutil.copytree(image_folder / "train", tmp_path / part)
        for path in (tmp_path / "test").rglob("*.png"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")  # behind the end of the picture
        assert self.said(tmp_path, on_corrupt="skip") == []
