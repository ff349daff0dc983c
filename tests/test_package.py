"""The installed package: public names, settings by name, and a self-contained wheel."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import idml_jax
from idml_jax.errors import UserError
from idml_jax.training import recipes

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_public_name_is_there_and_listed_once():
    assert len(set(idml_jax.__all__)) == len(idml_jax.__all__)
    for name in idml_jax.__all__:
        assert getattr(idml_jax, name).__doc__, name
    assert set(idml_jax.__all__) <= set(dir(idml_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        idml_jax.nothing  # noqa: B018


def test_importing_it_loads_nothing_heavy():
    code = "import idml_jax, sys; print(sorted({'jax', 'numpy', 'flax', 'ml_collections'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_wheel_takes_every_package_and_setting():
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "idml_jax").rglob("*.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"idml_jax.configs"}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"idml_jax.configs": "configs"}
    assert recipes.names() == sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
    # What is not Python has to be named.
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["idml_jax"]
    named = {path for pattern in patterns for path in (ROOT / "idml_jax").glob(pattern)}
    others = {p for p in (ROOT / "idml_jax").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others == named


def test_the_version_stands_in_one_place():
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "idml_jax.__version__"}
    # Read without importing the package, by its text; what repeats it must agree.
    (line,) = [x for x in (ROOT / "idml_jax" / "__init__.py").read_text().splitlines() if x.startswith("__version__")]
    assert line == f'__version__ = "{idml_jax.__version__}"'
    assert f"\nversion: {idml_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {idml_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_project_says_what_it_is():
    project = PROJECT["project"]
    supported = {
        c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    }
    assert supported == {"3.11", "3.12", "3.13"} and project["requires-python"] == ">=3.11,<3.14"
    assert not any(c.startswith("License ::") for c in project["classifiers"])  # the license field says it
    # Placeholders are marked by one word.
    assert all("OWNER" in url or "arxiv.org" in url for url in project["urls"].values())


def test_the_workflow_runs_the_two_commands_lint_and_pages():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "checks.yml").read_text())
    said = "\n".join(step.get("run", "") for job in flow["jobs"].values() for step in job["steps"])
    for words in ("bash launch/quickstart.sh", "bash launch/test.sh", "ruff check .", "mkdocs build --strict"):
        assert words in said, words
    assert "-m mypy" in (ROOT / "launch" / "test.sh").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["entry"] for repo in hooks for hook in repo["hooks"]} >= {"ruff format", "ruff check --fix"}
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3 and all(yaml.safe_load(form.read_text()) for form in forms)


@pytest.mark.slow
def test_sdist_and_wheel_build_with_the_same_content(tmp_path):
    """Both builds, the wheel from the sdist, as ``python -m build`` does it."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    make = (
        "import os, sys; from setuptools import build_meta as b; os.chdir(sys.argv[1]);"
        "print(getattr(b, 'build_' + sys.argv[2])(sys.argv[3]))"
    )
    # Of a copy: setuptools leaves folders beside what it builds.
    tree = tmp_path / "tree"
    for name in ("idml_jax", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)

    def build(folder, kind):
        done = subprocess.run(
            [sys.executable, "-c", make, folder, kind, tmp_path], env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / done.stdout.splitlines()[-1]

    archive = build(tree, "sdist")
    assert archive.name == f"idml_jax-{idml_jax.__version__}.tar.gz"
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    direct = set(zipfile.ZipFile(build(tree, "wheel")).namelist())
    through = zipfile.ZipFile(build(tmp_path / "unpacked" / archive.name.removesuffix(".tar.gz"), "wheel"))
    assert set(through.namelist()) == direct
    assert {"idml_jax/py.typed", "idml_jax/configs/glyphs.py", "idml_jax/training/settings.txt"} <= direct
    (about,) = (name for name in direct if name.endswith("/METADATA"))
    assert f"\nVersion: {idml_jax.__version__}\n" in through.read(about).decode()


class TestSettingsByName:
    def test_every_one_loads(self):
        for name in recipes.names():
            assert recipes.get_config(name).batch_size > 0

    def test_they_are_found_from_anywhere_but_own_files_come_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for value in ("glyphs:quick", "glyphs.py:quick", "configs/glyphs.py:quick"):
            assert recipes.find(value) == f"{ROOT}/configs/glyphs.py:quick"
            assert recipes.get_config(value).epochs == 8
        assert recipes.find("cifar10:cutmix,ism") == f"{ROOT}/configs/cifar10.py:cutmix,ism"
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "glyphs.py").write_text("def get_config():\n    return 7\n")
        assert recipes.find("configs/glyphs.py") == "configs/glyphs.py"
        assert recipes.get_config("configs/glyphs.py") == 7
        for foreign in ("other/glyphs.py", "glyphs.json", "", "nothing"):
            assert recipes.find(foreign) == foreign

    @pytest.mark.parametrize(
        "name,message",
        [
            ("glyfs", "glyfs: no such settings; known: cars196, cifar10"),
            ("glyphs:slow", "known variants: quick"),
            ("empty.py", "has no function get_config"),
        ],
    )
    def test_what_cannot_be_found_is_said(self, tmp_path, monkeypatch, name, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.py").write_text("")
        with pytest.raises(UserError, match=message):
            recipes.get_config(name)


@pytest.mark.slow
def test_a_wheel_installs_in_a_clean_venv_and_trains_outside_the_checkout(tmp_path, image_folder):
    """Builds the wheel, installs it with its pinned dependencies, and goes from settings by name to a search."""
    pip = ["-m", "pip", "--disable-pip-version-check", "-q"]
    # With PYTHONPATH, pip would take the checkout for the installed package.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    subprocess.run([sys.executable, *pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True, env=clean)
    (wheel,) = tmp_path.glob("idml_jax-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, *pip, "install", wheel, "-c", ROOT / "requirements.txt"], check=True, env=clean)
    away = tmp_path / "away"
    away.mkdir()

    def call(*words):
        done = subprocess.run([python, *words], cwd=away, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = call("-c", "import idml_jax, pathlib; print(pathlib.Path(idml_jax.__file__).parent)").strip()
    assert where.startswith(str(tmp_path / "venv")) and (Path(where) / "py.typed").exists()
    small = (
        "--config.batch_size=32", "--config.epochs=1", "--config.max_steps=2", "--config.data.image_size=16",
        "--config.data.resize=16", "--config.model.name=convnet4", "--config.model.embedding_dim=16",
        "--config.eval.ambiguity_images=0", "--config.log.tensorboard=False",
    )  # fmt: skip
    told = call("-m", "idml_jax.main", "--config=folder", f"--config.data.root={image_folder}", "--workdir=run", *small)
    assert "trained" in told and (away / "run" / "result.json").exists()
    call("-m", "idml_jax.embed", "--workdir=run", f"--images={image_folder / 'test'}", "--out=x.npz")
    query = image_folder / "test" / "class_05" / "00.png"
    assert "sure" in call("-m", "idml_jax.search", "--index=x.npz", f"--query={query}", "-k", "3")
    call("-m", "idml_jax.report", "--workdir=run")
    assert "<h2>" in (away / "run" / "report.html").read_text()
