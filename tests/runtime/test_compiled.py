"""The start of a command: what it loads, and compiled programs kept between processes."""

import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest

from idml_jax import __main__ as commands
from idml_jax.data.stored.names import NAMES
from idml_jax.data.stored.prepare import LAYOUTS
from idml_jax.runtime import compiled
from idml_jax.runtime.callable_module import late

ROOT = Path(__file__).resolve().parent.parent.parent


def test_help_of_every_command_loads_nothing_heavy():
    lines = ["import contextlib, importlib, io, sys"]
    for name in sorted({command.module for command in commands.COMMANDS.values()}):
        lines += [f"sys.argv = ['{name}', '--help']", "with contextlib.suppress(SystemExit):"]
        lines += [f"    importlib.import_module('idml_jax.{name}').main()"]
    lines += ["print([m for m in ('jax', 'numpy', 'cv2', 'flax') if m in sys.modules])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert done.stdout.count("--workdir") > 5 and "--config.data.image_size=224" in done.stdout


def test_the_names_that_help_shows_are_those_there_are():
    assert tuple(LAYOUTS) == NAMES


def test_members_are_imported_at_their_first_use(monkeypatch):
    module = types.ModuleType("some_module")
    monkeypatch.setitem(sys.modules, "some_module", module)
    find = late("some_module", {"NAMES": "data.stored.names", "names": "data.stored.names:NAMES"})
    assert find("NAMES") == find("names") == module.names == NAMES
    with pytest.raises(AttributeError, match="module 'some_module' has no attribute 'other'"):
        find("other")


@pytest.fixture
def before_jax(monkeypatch, tmp_path):
    """The state of a process that has not loaded jax, with a home of its own."""
    monkeypatch.delitem(sys.modules, "jax")
    for name in [name for name in os.environ if name.startswith("JAX_") and "CACHE" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield tmp_path
    for name in [name for name in os.environ if name.startswith("JAX_") and "CACHE" in name]:
        del os.environ[name]  # monkeypatch restores those there were


class TestKept:
    def test_they_are_kept_for_this_processor(self, before_jax):
        compiled.keep_compiled()
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        assert folder.parent == before_jax / "idml_jax" / "compiled" and folder.stat().st_mode & 0o777 == 0o700

    def test_a_folder_of_the_user_wins(self, before_jax, monkeypatch):
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
        compiled.keep_compiled()
        assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine" and not list(before_jax.iterdir())

    def test_a_home_that_cannot_be_written_keeps_nothing(self, before_jax, monkeypatch):
        (before_jax / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(before_jax / "file"))
        compiled.keep_compiled()
        assert "JAX_COMPILATION_CACHE_DIR" not in os.environ

    def test_a_process_that_has_loaded_jax_is_left_alone(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        before = dict(os.environ)
        compiled.keep_compiled()
        assert dict(os.environ) == before and not list(tmp_path.iterdir())

    def test_a_damaged_program_is_removed_without_a_word(self, before_jax):
        compiled.keep_compiled()
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        (folder / "jit_f-1-cache").write_bytes(b"cut short")
        shown = []
        text = "Error reading persistent compilation cache entry for 'jit_f': ZstdError"
        warnings.showwarning(UserWarning(text), UserWarning, "compiler.py", 1, None)
        assert not list(folder.iterdir()) and not shown

    def test_those_longest_unused_go_first(self, tmp_path):
        for age, name in enumerate(("new", "old", "oldest")):
            (tmp_path / name).write_bytes(b"x" * 10)
            os.utime(tmp_path / name, (time.time() - 100 * age,) * 2)
        compiled.trim(tmp_path, 15)
        assert [path.name for path in tmp_path.iterdir()] == ["new"]


COMPILED, READ = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_retrieval_time_sec"


@pytest.fixture
def at(monkeypatch):
    """Tells what ends at a second of a clock of its own, where nothing was compiled so far."""
    clock = 1000.0
    monkeypatch.setattr(compiled, "_compiled", compiled._Busy())
    monkeypatch.setattr(compiled, "_read", compiled._Busy())
    monkeypatch.setattr(compiled, "_so_far", compiled.compiling()._replace(seconds=0.0, reading=0.0))

    def note(second, event, duration):
        monkeypatch.setattr(compiled, "time", types.SimpleNamespace(monotonic=lambda: clock + second))
        compiled._note(event, duration)

    return note


def test_compiling_and_reading_are_told_apart(at):
    start = compiled.compiling()
    at(2.0, COMPILED, 2.0)
    at(5.0, READ, 0.75)
    at(5.0, COMPILED, 1.0)  # a quarter of a second of it before the reading
    assert str(compiled.compiling().since(start)) == "2.2 s of it compiling, 1 kept programs read in 0.8 s"
    assert str(compiled.Compiling(1.0)) == "1.0 s of it compiling"


def test_what_threads_compile_at_the_same_time_counts_once(at):
    start = compiled.compiling()
    at(10.0, COMPILED, 4.0)  # 6 to 10
    at(12.0, COMPILED, 5.0)  # 7 to 12
    at(13.0, COMPILED, 12.0)  # 1 to 13, around both
    at(20.0, COMPILED, 1.0)
    at(20.5, COMPILED, 8.0)  # 12.5 to 20.5, across the gap
    found = compiled.compiling().since(start)
    assert found.seconds == pytest.approx(19.5) and found.kept == 0
