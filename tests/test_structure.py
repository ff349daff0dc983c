"""The structure of the package: imports point only to lower floors, and heavy packages stay at the edge."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "idml_jax"

# What each folder (or module) of the package may import from the package, besides itself; the rest are commands.
FLOORS = {
    "errors": set(),
    "geometry": set(),
    "ism": {"geometry"},
    "losses": {"ism"},
    "mixing": set(),
    "models": {"ism", "losses"},
    "metrics": {"ism"},
    "runtime": {"errors"},
    "data": {"errors", "runtime"},
    "training": {"errors", "ism", "losses", "mixing", "models", "metrics", "runtime", "data"},
}
FLOORS["inference"] = FLOORS["training"] | {"training"}
FLOORS["reporting"] = FLOORS["inference"] | {"inference"}
DOORS = {
    "__main__", "audit", "main", "fit", "prepare", "embed", "search", "compare", "report", "export", "evaluate",
    "pretrained", "risk",
}  # fmt: skip
# The only modules that may import a package.
EDGES = {
    "orbax": {"runtime.checkpoint"},
    "clu": {"runtime.tensorboard"},
    "tensorboard": {"runtime.tensorboard"},
    "wandb": {"runtime.trackers"},
    "mlflow": {"runtime.trackers"},
    "trackio": {"runtime.trackers"},
    "tensorflow": set(),
    "torch": {"training.weights.files"},
    "safetensors": {"training.weights.files"},
    "huggingface_hub": {"training.weights.hub"},
    "tensorflow_datasets": {
        "data.glyphs.builder",
        "data.stored.shards",
        "data.stored.prepared",
        "data.stored.layouts_tfds",
    },
    "array_record": {"data.stored.shards"},
    "matplotlib": {"data.glyphs.draw", "reporting.plots"},
    "sklearn": {"reporting.plots"},
    "pyarrow": {"data.tables"},
    "pillow_heif": {"data.images.decode"},
    "jax2onnx": {"inference.onnx_model"},
    "onnxruntime": {"inference.onnx_model"},
    "faiss": {"inference.faiss_index"},
    "ray": {"inference.ray_engine"},
    "grain": {"data.pipeline"},
    "cv2": {
        "data.images.colour",
        "data.images.decode",
        "data.images.encode",
        "data.images.resample",
        "data.images.transforms",
        "data.glyphs.draw",
        "data.glyphs.examples",
        "data.stored.layouts_classification",
    },
    "PIL": {
        "data.given",
        "runtime.trackers",
        "data.images.decode",
        "data.images.encode",
        "data.images.resample",
        "data.glyphs.draw",
        "data.glyphs.builder",
    },
    "ml_collections": {"training", "inference", "main"},
    "scipy": {"data.stored.layouts_retrieval", "data.stored.layouts_classification"},  # MATLAB files
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def floor_of(name):
    return name.split(".")[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # ``from idml_jax import ism`` names a module, ``from idml_jax.ism import x`` does not.
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_floor():
    assert {floor_of(name) for name, _ in modules()} - {"__init__"} == set(FLOORS) | DOORS


def test_imports_point_only_to_lower_floors():
    known = {name for name, _ in modules()}
    wrong = []
    for name, path in modules():
        floor = floor_of(name)
        if floor not in FLOORS:
            continue
        for target in imports(path):
            target = target.removeprefix("idml_jax.")
            if target in known and floor_of(target) not in FLOORS[floor] | {floor}:
                wrong.append(f"{name} -> {target}")
    assert not wrong


@pytest.mark.parametrize("package", sorted(EDGES))
def test_heavy_packages_stay_at_the_edge(package):
    users = {name for name, path in modules() for target in imports(path) if target.split(".")[0] == package}
    assert {name for name in users if not {name, floor_of(name)} & EDGES[package]} == set()


def test_maths_and_metrics_import_neither_io_nor_config():
    forbidden = {"absl", "clu", "orbax", "tensorflow", "tensorflow_datasets", "grain", "ml_collections", "cv2", "PIL"}
    for name, path in modules():
        if floor_of(name) in ("geometry", "ism", "losses", "mixing", "models", "metrics"):
            assert not forbidden & {target.split(".")[0] for target in imports(path)}, name


def test_modules_do_not_import_each_other_in_circles():
    known = {name for name, _ in modules()}
    graph = {
        name: {t.removeprefix("idml_jax.") for t in imports(path)} & known - {name}
        for name, path in modules()
        if name != "__init__"
    }
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        trail.append(name)
        for target in sorted(graph.get(name, ())):
            # A package's own module names the package, whose file gathers its modules.
            if not name.startswith(f"{target}."):
                visit(target)
        done.add(trail.pop())

    for name in sorted(graph):
        visit(name)


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
