"""Galleries whose images change: files that could not be read and then can, files that are gone or newer."""

import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from idml_jax import embed
from idml_jax.errors import UserError
from idml_jax.inference import gallery_changes, gallery_parts
from idml_jax.inference.gallery import read_gallery


@pytest.fixture
def images(image_folder, tmp_path):
    """Two classes of eight images; the fourth is cut off and the last is nothing."""
    for name in ("class_04", "class_05"):
        (tmp_path / "g" / name).mkdir(parents=True)
        for path in sorted((image_folder / "test" / name).iterdir())[:8]:
            shutil.copy(path, tmp_path / "g" / name / path.name)
    (tmp_path / "whole").mkdir()
    for path, name in ((tmp_path / "g/class_04/03.png", "03.png"), (tmp_path / "g/class_05/07.png", "07.png")):
        shutil.copy(path, tmp_path / "whole" / name)
    cut(tmp_path / "g/class_04/03.png")
    (tmp_path / "g/class_05/07.png").write_bytes(b"nothing")
    return tmp_path / "g"


@pytest.fixture
def command(finished, images, tmp_path, monkeypatch, capsys):
    """A function that embeds the images into ``gal``, with parts of 6, and returns what is said."""
    monkeypatch.setattr(gallery_parts, "PART_IMAGES", 6)

    def run(*words, images=images, out="gal"):
        given = [f"--workdir={finished[0]}", f"--images={images}", f"--out={tmp_path / out}", *words]
        embed.main(given)
        return capsys.readouterr().out

    return run


def cut(path):
    path.write_bytes(path.read_bytes()[:200])


def restore(images, *names):
    for name in names:
        # As rsync and tar do: the time of change is an old one.
        shutil.copy2(images.parent / "whole" / Path(name).name, images / name)


def same(one, two):
    a, b = read_gallery(one).index(), read_gallery(two).index()
    assert a.files.tolist() == b.files.tolist() and a.labels == b.labels
    for name in ("semantic", "uncertainty", "semantic_norm"):
        np.testing.assert_array_equal(getattr(a.embedded, name), getattr(b.embedded, name))


@pytest.mark.parametrize("again", ["--shard=1/1", "--append"])
def test_repaired_images_enter_the_gallery(command, images, tmp_path, again):
    out, broken = tmp_path / "gal", images / "class_05/07.png"
    assert "2 images cannot be read" in command("--shard=1/1")
    times = {path: path.stat().st_mtime_ns for path in out.glob("part*")}
    told = command(again)  # nothing has changed: nothing is done
    assert "embedded again" not in told and "complete: 14 images" in told and "images of its" not in told
    assert {path: path.stat().st_mtime_ns for path in out.glob("part*")} == times
    restore(images, "class_04/03.png")
    told = command(again)
    assert "1 image of finished parts is embedded again" in told and "complete: 15 images" in told
    assert f"1 image cannot be read and is left out, {broken}: not" in told
    changed = [path.name for path, old in times.items() if path.stat().st_mtime_ns != old]
    assert changed == ["part-0000-000000.parquet"]
    broken.write_bytes(b"nothing, too")  # another file, but no better: tried once
    assert "1 image of finished parts is embedded again" in command(again)
    assert "embedded again" not in command(again)
    restore(images, "class_05/07.png")
    told = command(again)
    assert "complete: 16 images" in told and "cannot be read" not in told
    assert not list(out.glob("_skipped*")) and not list(out.glob("_tried*"))
    command("--shard=1/1", out="fresh")
    same(out, tmp_path / "fresh")


def test_a_part_of_unreadable_images_alone_gets_its_file(command, images, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery_parts, "PART_IMAGES", 1)
    command("--shard=1/1")
    assert len(list((tmp_path / "gal").glob("part*"))) == 14
    restore(images, "class_04/03.png", "class_05/07.png")
    assert "complete: 16 images" in command("--shard=1/1")


def test_galleries_of_earlier_versions_try_their_unreadable_images_again(command, images, tmp_path):
    command("--shard=1/1")
    for path in (tmp_path / "gal").glob("_tried*"):
        path.unlink()
    restore(images, "class_04/03.png")
    assert "2 images of finished parts are embedded again" in (told := command("--shard=1/1"))
    assert "complete: 15 images" in told and "embedded again" not in command("--shard=1/1")


def test_a_part_that_a_stopped_process_left_is_made_again(command, images, tmp_path, monkeypatch):
    """A process stopped after it had updated the list of unreadable images, but before it rewrote the part."""
    command("--shard=1/1")
    restore(images, "class_04/03.png")

    def stop(*arguments):
        raise UserError("stopped")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gallery_parts, "_write_table", stop)
        command("--shard=1/1")
    restore(images, "class_05/07.png")
    assert "complete: 16 images" in command("--shard=1/1")
    command("--shard=1/1", out="fresh")
    same(tmp_path / "gal", tmp_path / "fresh")


def test_vectors_of_files_that_are_gone_stay_when_a_part_is_written_again(command, images, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\t{path.parent.name}\n" for path in sorted(images.rglob("*.png"))))
    command("--shard=1/1", images=listed)
    before = read_gallery(tmp_path / "gal").index()
    (images / "class_04/00.png").unlink()
    shutil.copy(images / "class_05/00.png", images / "class_04/01.png")
    os.utime(images / "class_04/01.png", (time.time() + 60,) * 2)
    restore(images, "class_04/03.png")
    told = command("--append", images=listed)
    # The newer one of the same part is embedded with it; afterwards it could not be told from the others.
    assert "2 images of finished parts are embedded again" in told and "complete: 15 images" in told
    found = read_gallery(tmp_path / "gal").index()
    assert [Path(name).name for name in found.files[:5]] == ["00.png", "01.png", "02.png", "03.png", "04.png"]
    np.testing.assert_array_equal(found.semantic[0], before.semantic[0])
    np.testing.assert_array_equal(found.semantic[1], found.semantic[8])
    assert found.files[8].endswith("class_05/00.png")


def test_an_image_that_another_command_added_is_not_added_twice(command, images, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\t{path.parent.name}\n" for path in sorted(images.rglob("*.png"))))
    command("--shard=1/1", images=listed)
    restore(images, "class_04/03.png", "class_05/07.png")
    shutil.copy(images / "class_04/00.png", images / "class_04/new.png")
    told = command("--append")  # other images than those of the list: 14 of them are known
    assert "14 of 17 images are in the gallery already" in told and "complete: 17 images" in told
    assert "cannot be read" not in told  # the list of the first command still names them
    told = command("--shard=1/1", images=listed)
    assert "complete: 17 images" in told and "embedded again" not in told


def told_of_unreadable(told):
    return [line for line in told.splitlines() if re.search("not be read|cannot be read|are listed", line)]


def test_every_unreadable_image_counts_once_with_its_state(command, images, tmp_path):
    """The commands name different images, so each is a source of its own and has tried the unreadable ones anew."""
    cut_off, nothing, link = images / "class_04/03.png", images / "class_05/07.png", images / "class_05/link.png"
    link.symlink_to("/no/such.png")
    more, out = tmp_path / "more", tmp_path / "gal"
    listing, whole = out / "_skipped.txt", tmp_path / "whole"
    (more / "class_04").mkdir(parents=True)
    shutil.copy(images / "class_04/00.png", more / "class_04/0.png")
    broken = "a link to /no/such.png, which does not exist; remove the link or restore the file"
    names = lambda: [line.split("\t")[0] for line in listing.read_text().splitlines()]
    command("--shard=1/1")
    for number in range(2):
        shutil.copy(images / "class_04/00.png", images / f"class_04/new{number}.png")
        told = command("--append")
        assert f"3 images cannot be read and are left out, the first {cut_off}: not" in told
        assert "earlier" not in told and names() == [str(cut_off), str(nothing), str(link)]
    # The folder has changed, but not the files.
    assert "again" not in command("--append")
    told = command("--append", images=more)
    assert f"3 images of earlier commands still cannot be read, the first {cut_off}: not" in told
    assert "left out" not in told and names() == [str(cut_off), str(nothing), str(link)]
    restore(images, "class_04/03.png")
    one = tmp_path / "one.txt"
    one.write_text(f"{images / 'class_04/00.png'}\tclass_04\n")
    told = command("--append", images=more)
    # Neither when the gallery has all images of a command.
    assert told_of_unreadable(command("--append", images=one)) == told_of_unreadable(told)
    assert told_of_unreadable(told) == [
        f"2 images of earlier commands still cannot be read, the first {nothing}: "
        + next(line.split("\t")[1] for line in listing.read_text().splitlines()),
        f"all of them are listed in {listing}",
        f"1 image of earlier commands could not be read and has changed since, {cut_off}; --append embeds it",
    ]
    told = command("--append")
    assert "1 image of finished parts is embedded again, since its file has changed" in told
    assert "2 images cannot be read and are left out" in told and names() == [str(nothing), str(link)]
    shutil.copy(whole / "07.png", more / "class_04/1.png")
    nothing.unlink()
    told = command("--append", images=more)
    assert told_of_unreadable(told)[0] == (
        f"2 images of earlier commands still cannot be read, the first {nothing}: its file is gone"
    )
    assert listing.read_text().splitlines() == [f"{nothing}\tits file is gone", f"{link}\t{broken}"]
    restore(images, "class_05/07.png")
    link.unlink()
    shutil.copy(whole / "07.png", link)
    told = command("--append")
    assert told_of_unreadable(told) == [] and not listing.exists()
    assert "complete: 21 images" in told


def test_append_tells_of_files_that_are_gone_or_newer(command, images, tmp_path):
    out = tmp_path / "gal"
    command("--shard=1/1")
    for name in ("00", "01", "02", "05"):
        (images / f"class_04/{name}.png").unlink()
    os.utime(images / "class_05/00.png", (time.time() + 60,) * 2)
    first = ", ".join(f"{images}/class_04/{name}.png" for name in ("00", "01", "02"))
    line = (
        f"{out}: the files of 5 of its images are not those that were embedded: 4 gone ({first}, ...), 1 newer "
        f"({images}/class_05/00.png); the gallery keeps their old vectors; to bring them up to date, embed all of it "
        "anew into another --out"
    )
    restore(images, "class_04/03.png")
    for _ in range(2):  # when it adds something, and when the same command has nothing to add
        assert command("--append").splitlines().count(line) == 1
    (images / "class_05/07.png").unlink()
    told = command("--append")
    assert "11 of 11 images are in the gallery already" in told and told.splitlines().count(line) == 1
    assert len(read_gallery(out)) == 15


def test_damaged_lists_and_parts_are_refused_in_a_line(command, images, tmp_path):
    command("--shard=1/1")
    (part,) = (tmp_path / "gal").glob("part-0000-000000.parquet")
    for path in (tmp_path / "gal").glob("_tried*"):
        path.write_text("{")
    assert "2 images of finished parts are embedded again" in command("--shard=1/1")
    part.write_bytes(b"damaged")
    with pytest.raises(UserError, match=re.escape(f"{part}: not a part of a gallery")):
        gallery_changes.stored(part)
    assert "complete: 14 images" in command("--shard=1/1")
