"""Files are written completely or not at all and never replace anything but files; external text is shown safely."""

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from idml_jax import errors
from idml_jax.data.lists import listed_paths
from idml_jax.errors import UserError, printable
from idml_jax.runtime import files

ROOT = Path(__file__).resolve().parents[2]


def make(kind, path):
    """Creates something other than a file at a path; never a real device."""
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    elif kind == "a folder":
        path.mkdir()
    else:
        if kind == "a link":
            (path.parent / "victim").write_text("precious")
        path.symlink_to(path.parent / "victim")


WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"x"),
    "text": lambda path: files.write_text(path, "x"),
    "JSON": lambda path: files.write_json(path, {"x": 1}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a link", "a link to nothing"])
def test_only_plain_files_are_replaced(tmp_path, write, kind):
    path = tmp_path / "x"
    make(kind, path)
    before = os.lstat(path)
    with pytest.raises(UserError, match=f"x: is {kind.removesuffix(' to nothing')}.*; only a file is replaced"):
        write(path)
    assert os.lstat(path).st_ino == before.st_ino and os.lstat(path).st_mode == before.st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == (["victim", "x"] if kind == "a link" else ["x"])
    assert kind != "a link" or (tmp_path / "victim").read_text() == "precious"


def test_planted_links_of_known_temporary_names_are_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    for name in ("x.json.tmp", "x.tmp", ".x.json.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    files.write_json(tmp_path / "x.json", {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_target_that_becomes_a_link_meanwhile_stays(tmp_path):
    (tmp_path / "victim").write_text("precious")
    with pytest.raises(UserError, match="is a link"), files.atomic(tmp_path / "x") as file:
        file.write(b"new")
        (tmp_path / "x").symlink_to(tmp_path / "victim")
    assert (tmp_path / "victim").read_text() == "precious" and len(list(tmp_path.iterdir())) == 2


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "new" / "x", "x")
        with files.replace_folder(tmp_path / "folder") as folder:
            (folder / "y").write_text("y")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "x").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "x"
    path.write_text("old")
    for target in (path, tmp_path / "a" / "b" / "c"):
        with pytest.raises(type(error)), files.atomic(target) as file:
            file.write(b"half")
            raise error
    with pytest.raises(type(error)), files.replace_folder(tmp_path / "a" / "folder") as folder:
        (folder / "y").write_text("y")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and path.read_text() == "old"


@pytest.mark.parametrize("there", [True, False], ids=["a file is there", "nothing is there"])
def test_a_full_disk_is_reported_in_one_line(tmp_path, there):
    path = tmp_path / "x"
    if there:
        path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        kept = "the existing file is kept" if there else "nothing is left behind"
        with pytest.raises(UserError, match=rf"x: cannot be written \(File too large\); {kept}"):
            files.write_bytes(path, bytes(100_000))
        with pytest.raises(UserError, match="cannot be written"), files.replace_folder(tmp_path / "f") as folder:
            (folder / "y").write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == (["x"] if there else [])
    assert not there or path.read_text() == "old"


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            files.write_text(path, "x")
    with pytest.raises(UserError, match="already exists"), files.replace_folder(tmp_path / "file"):
        pass
    for given, message in (("", "not a path"), ("a\0b", "not a path"), ("~nobody-of-that-name/x", "home")):
        with pytest.raises(UserError, match=message):
            files.user_path(given)
    assert files.user_path("~/x") == Path.home() / "x" and len(list(tmp_path.iterdir())) == 1


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    files.write_text(tmp_path / ("n" * 255), "x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"


def test_a_lock_is_held_by_one_and_outlives_nobody(tmp_path):
    lock = lambda: files.locked(tmp_path / "x.lock", "x: busy")
    with lock(), pytest.raises(UserError, match=rf"x: busy \(process {os.getpid()}\)"), lock():
        pass
    assert not list(tmp_path.iterdir())
    # A process that was killed leaves the file, but not the lock.
    (tmp_path / "x.lock").write_text("4194304\n")
    with lock():
        assert (tmp_path / "x.lock").read_text() == f"{os.getpid()}\n"
    (tmp_path / "x.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="x.lock"), lock():
        pass
    assert not (tmp_path / "victim").exists()
    (tmp_path / "x.lock").unlink()
    (tmp_path / "x.lock").write_text("somebody's text")
    with pytest.raises(UserError, match="x.lock: is not a lock"), lock():
        pass
    assert (tmp_path / "x.lock").read_text() == "somebody's text"


@pytest.mark.parametrize(
    "text,shown",
    [
        ("plain name_1 é 中 🐦", "plain name_1 é 中 🐦"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\x9b2Jb\x00\x7f", "a\\x9b2Jb\\x00\\x7f"),
        ("two\nlines\r\ttab", "two\\nlines\\r\\ttab"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("\ud800x\u2028", "\\ud800x\\u2028"),
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    shown.encode()


def test_error_lines_do_not_reach_the_terminal_raw(capsys):
    with pytest.raises(SystemExit):
        errors.run_command(lambda: (_ for _ in ()).throw(UserError("a\x1b]0;x\x07 \udce9\nnext")))
    assert capsys.readouterr().err == "error: a\\x1b]0;x\\x07 \\xe9 next\n"


def test_ctrl_c_ends_at_once_with_130(tmp_path):
    code = (
        "import atexit, sys; from idml_jax import errors\n"
        "atexit.register(print, 'cleaned up')\n"
        "def work():\n    print('out')\n    raise KeyboardInterrupt\n"
        "errors.run_command(work, 'stopped; go on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "out\n", "stopped; go on\n")


def test_a_path_has_one_name(tmp_path, monkeypatch):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/er")
    monkeypatch.chdir(tmp_path / "deep")
    assert files.user_path("../photos/a.jpg") == tmp_path / "photos" / "a.jpg"
    assert files.user_path(tmp_path / "link" / ".." / "x") == tmp_path / "deep" / "x"
    assert files.without_dots("/a/..b/c..") == "/a/..b/c.."
    (tmp_path / "list.csv").write_text("path,class\ndeep/../link/1.jpg,a\n")
    assert listed_paths(str(tmp_path / "list.csv"), "--exclude")[-1][1] == str(tmp_path / "link" / "1.jpg")
