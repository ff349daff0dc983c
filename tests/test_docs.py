"""The pages: links and anchors lead somewhere, code compiles, commands and settings exist. No network, no mkdocs."""

import ast
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from idml_jax.training import recipes
from idml_jax.training.config import default_config
from idml_jax.training.workdir import flatten

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.M | re.S)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(text, *kinds):
    return [body for _, kind, body in FENCE.findall(text) if kind in kinds]


def prose(text):
    """A page without its blocks of code."""
    return FENCE.sub("", text)


@cache
def anchors(page):
    """Of headings, as Python-Markdown's toc makes them, and of the API's objects."""
    text, found = page.read_text(), set()
    for heading in re.findall(r"^#+ (.*)$", prose(text), re.M):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    for module in re.findall(r"^::: (idml_jax[\w.]*)", text, re.M):
        found.add(module)
        file = ROOT / (module.replace(".", "/") + ".py")
        tree = ast.parse((file if file.exists() else ROOT / module.replace(".", "/") / "__init__.py").read_text())
        found |= {f"{module}.{n.name}" for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return found


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


def commands(text):
    """The words of every command of ours, in blocks and in the text."""
    lines = "\n".join(blocks(text, "bash", "")).replace("\\\n", " ").splitlines()
    rest = prose(text).replace("\\\n", " ")
    lines += [line for line in rest.splitlines() if line.startswith("    ")]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    for line in lines:
        line = line.strip()
        if line.startswith(("python ", "bash ")):
            yield shlex.split(line.replace("...", ""), comments=True)


@cache
def flags_of(module):
    """Flags that a module's parser knows, read from its source."""
    tree = ast.parse((ROOT / "idml_jax" / f"{module}.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    words = {a.value for n in calls if n.func.attr == "add_argument" for a in n.args if isinstance(a, ast.Constant)}
    defined = [n for n in calls if n.func.attr.startswith("DEFINE_")]
    return words | {f"--{n.args[0].value}" for n in defined}


SETTINGS = set(flatten(default_config().to_dict()))


def what_is_wrong(words):
    """Of a command, in words; empty where it could run."""
    if words[0] == "bash" or words[1] != "-m":
        return [f"{words[1]} is missing"] if "/" in words[1] and not (ROOT / words[1]).exists() else []
    name = words[2].removeprefix("idml_jax.")
    if name == words[2]:
        return []  # pip and the like
    if not (ROOT / "idml_jax" / f"{name}.py").exists():
        return [f"no module {words[2]}"]
    wrong = []
    for word in words[3:]:
        flag, _, value = word.partition("=")
        if not flag.startswith("-"):
            continue
        if flag.startswith("--config.") and name == "main":
            if flag.removeprefix("--config.") not in SETTINGS:
                wrong.append(f"no setting {flag}")
        elif flag not in flags_of(name):
            wrong.append(f"{words[2]} has no flag {flag}")
        elif flag == "--config":
            wrong += settings_wrong(value)
    return wrong


def settings_wrong(value):
    path, _, variant = recipes.find(value).partition(":")
    if not (ROOT / path).is_file():
        return [f"no settings {value}"]
    if not re.search("[A-Z]", variant):  # else it stands for one
        recipes.get_config(f"{path}:{variant}")
    return []


@by_page
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


@by_page
def test_python_compiles_and_imports_what_is_there(page):
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block, str(page))):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "idml_jax":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@by_page
def test_commands_and_settings_exist(page):
    text = page.read_text()
    assert not [wrong for words in commands(text) for wrong in what_is_wrong(words)]
    named = {name.rstrip(".") for name in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", text)}
    assert named <= SETTINGS, named - SETTINGS


def test_wrong_pages_are_noticed(tmp_path):
    page = tmp_path / "x.md"
    page.write_text("# One thing\n\n[a](#one-thing) [b](#other) [c](none.md)\n\n```bash\ncd x\n```\n")
    assert list(broken_links(page)) == ["#other", "none.md"]
    wrong = {
        "python -m idml_jax.nothing": "no module", "python -m idml_jax.embed --wrkdir=x": "no flag --wrkdir",
        "python -m idml_jax.main --config=glyphs --config.data.rot=x": "no setting",
        "python -m idml_jax.main --config=glyfs": "no settings", "python docs/nothing.py": "missing",
    }  # fmt: skip
    for line, message in wrong.items():
        (words,) = commands(f"```bash\n{line}  # why\n```\n")
        assert message in " ".join(what_is_wrong(words)), line
        assert list(commands(f"Say `{line}` here.")) == [words]


def test_every_page_is_in_the_navigation_once():
    def leaves(node):
        values = node.values() if isinstance(node, dict) else node
        for value in values:
            yield from [value] if isinstance(value, str) else leaves(value)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(leaves(site["nav"]))
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_the_picture_of_the_floors_is_up_to_date():
    """If this fails: ``python docs/design_picture.py``."""
    picture = runpy.run_path(str(DOCS / "design_picture.py"))
    assert (DOCS / "design.svg").read_text() == picture["draw"](*picture["read_floors"]())


def test_examples_of_what_can_be_added_exist():
    """Those that the table of the design page names are those of the file of examples."""
    named = re.findall(r"\| `(test_\w+)` \|$", (DOCS / "design.md").read_text(), re.M)
    tests = ast.parse((ROOT / "tests" / "test_extending.py").read_text())
    assert named == [n.name for n in tests.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package} is not installed (extra 'docs')")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "losses" / "index.html").read_text()
    assert 'id="idml_jax.ism.introspective_distance"' in api and "temperature" in api


@pytest.mark.slow
def test_the_code_on_uncertainty_runs(tmp_path, image_folder, monkeypatch, capsys):
    """Block after block, on a small run in place of the characters."""
    from runs_made import small_config

    from idml_jax import embed
    from idml_jax.training import train

    monkeypatch.chdir(tmp_path)
    train.train_and_evaluate(small_config(image_folder, epochs=1, **{"data.validation_classes": 0.5}), "run")
    for split, name in (("validation", "held_out"), ("test", "test")):
        embed.main(["--workdir=run", f"--split={split}", f"--out={name}.npz"])
    shutil.copytree(image_folder / "train", "junk")
    embed.main(["--workdir=run", "--images=junk", "--out=junk.npz"])
    capsys.readouterr()
    code = "\n".join(blocks((DOCS / "uncertainty.md").read_text(), "python"))
    exec(compile(code, "uncertainty.md", "exec"), {})
    told = capsys.readouterr().out
    for text in (
        "of the queries are answered",
        "of the first 100 are wrong",
        "in the less uncertain half",
        "labelled class_",
        "are junk",
    ):
        assert text in told


def test_a_loss_of_ones_own_trains(image_folder, tmp_path, monkeypatch):
    """The page's code on a small run in place of the characters: the loop takes the step from its objective."""
    from runs_made import small_config

    from idml_jax.training import steps

    monkeypatch.chdir(tmp_path)
    fast = {"eval.untrained": False, "eval.cluster": False, "eval.ambiguity_images": 0}
    monkeypatch.setattr(recipes, "get_config", lambda _: small_config(image_folder, epochs=1, max_steps=1, **fast))
    stepped, step = [], steps.jit_train_step

    def watched(*given, setup, **more):
        stepped.append(setup.objective)
        return step(*given, setup=setup, **more)

    monkeypatch.setattr(steps, "jit_train_step", watched)
    found = {}
    exec(compile(blocks((DOCS / "losses.md").read_text(), "python")[-1], "losses.md", "exec"), found)
    assert [type(objective) for objective in stepped] == [found["WithUniformity"]]
    assert found["result"]["final"]["R@1"] > 0
