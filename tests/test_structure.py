"""The house: imports point only to earlier rooms, and heavy packages stay at the edge."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "idml_jax"

MATHS = (
    "ism", "pairs", "reductions", "miners", "losses", "pair_losses", "proxy_losses", "memory", "mixing", "difficulty",
    "classifier",
)  # fmt: skip
RUNTIME = (
    "watch", "interrupt", "hosts", "config", "recipes", "protocols", "sharding", "optim", "objective", "state", "steps",
    "checkpoint", "writers", "evaluate", "pretrained", "classify_steps", "classify", "protocols_classification",
    "run", "loop", "train", "trained", "embeddings", "faiss_index",
)  # fmt: skip
ROOMS = {
    "errors": {"errors"},
    "maths": {"maths"},
    "models": {"maths", "models"},
    "metrics": {"maths", "metrics"},
    "data": {"errors", "data"},
    "runtime": {"errors", "maths", "models", "metrics", "data", "runtime"},
    "doors": {"errors", "maths", "models", "metrics", "data", "runtime", "doors"},
}
# Who alone may import what.
EDGES = {
    "orbax": {"checkpoint"},
    "clu": {"writers"},
    "tensorflow": set(),
    "torch": {"pretrained"},
    "safetensors": {"pretrained"},
    "tensorflow_datasets": {"data.glyphs", "data.shards", "data.prepared", "data.layouts_tfds"},
    "array_record": {"data.shards"},
    "matplotlib": {"data.glyphs_draw", "plots"},
    "sklearn": {"plots"},
    "pyarrow": {"embeddings"},
    "faiss": {"faiss_index"},
    "grain": {"data.pipeline"},
    "cv2": {
        "data.colour", "data.decode", "data.resample", "data.transforms", "data.glyphs_draw", "data.glyphs",
        "data.layouts_classification",
    },
    "PIL": {"data.decode", "data.resample", "data.glyphs_draw", "data.glyphs"},
    "ml_collections": {
        "classify_steps", "config", "recipes", "protocols", "protocols_classification", "run", "train", "trained",
        "main",
    },
    "scipy": {"data.layouts_retrieval", "data.layouts_classification"},  # MATLAB files
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def room_of(name):
    first = name.split(".")[0]
    if first in ("models", "metrics", "data", "errors"):
        return first
    if first in MATHS:
        return "maths"
    return "runtime" if first in RUNTIME else "doors"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # ``from idml_jax import ism`` names a module, ``from idml_jax.ism import x`` does not.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_only_to_earlier_rooms():
    known = {name for name, _ in modules()}
    wrong = []
    for name, path in modules():
        if name == "__init__":
            continue
        for target in imports(path):
            if not target.startswith("idml_jax."):
                continue
            target = target.removeprefix("idml_jax.")
            if target in known and room_of(target) not in ROOMS[room_of(name)]:
                wrong.append(f"{name} -> {target}")
    assert not wrong


@pytest.mark.parametrize("package", sorted(EDGES))
def test_heavy_packages_stay_at_the_edge(package):
    users = {name for name, path in modules() for target in imports(path) if target.split(".")[0] == package}
    assert users <= EDGES[package]


def test_maths_and_metrics_import_neither_io_nor_config():
    forbidden = {"absl", "clu", "orbax", "tensorflow", "tensorflow_datasets", "grain", "ml_collections", "cv2", "PIL"}
    for name, path in modules():
        if room_of(name) in ("maths", "metrics"):
            assert not forbidden & {target.split(".")[0] for target in imports(path)}, name


def test_files_stay_small():
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules()}
    assert max(lengths.values()) <= 400, {n: k for n, k in lengths.items() if k > 400}


def test_the_pure_part_imports_alone():
    code = (
        "import sys; from idml_jax import ism, losses; from idml_jax.metrics import retrieval;"
        "print([m for m in ('tensorflow', 'clu', 'orbax', 'tensorflow_datasets', 'cv2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]", done.stderr
