"""The notebooks are valid, their outputs are of their cells, every cell compiles; ``--slow`` runs them on tiny data."""

import builtins
import json
import os
import re
import runpy
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "launch").glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text())["cells"]


def test_there_are_two():
    assert [path.name for path in NOTEBOOKS] == ["idml_jax.ipynb", "own_loop.ipynb"]


def test_of_lines_that_are_rewritten_the_last_is_stored():
    made = runpy.run_path(str(ROOT / "docs" / "notebook_outputs.py"))
    said = ["\r[#..] step 1", "\r            \rloss 1\n\r[##.] 2", "\r       \rloss 2\n"]
    outputs = [{"output_type": "stream", "name": "stdout", "text": text} for text in said]
    assert made["joined"]([*outputs, {"output_type": "display_data"}]) == [
        {"output_type": "stream", "name": "stdout", "text": "loss 1\nloss 2\n"},
        {"output_type": "display_data"},
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestAsCommitted:
    def test_they_are_valid(self, path):
        nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra 'test')")
        nbformat.validate(nbformat.read(path, as_version=4))

    def test_a_badge_opens_them_in_colab(self, path):
        assert f"/blob/main/launch/{path.name})" in "".join(cells(path)[0]["source"])

    def test_their_outputs_are_of_these_cells_and_name_no_local_file(self, path):
        """All outputs or none: they are written by ``python docs/notebook_outputs.py``, minutes of training."""
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        book = json.loads(path.read_text())
        if "idml_jax" not in book["metadata"]:
            assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
            pytest.skip(f"no outputs are stored yet: python docs/notebook_outputs.py {path.relative_to(ROOT)}")
        made = runpy.run_path(str(ROOT / "docs" / "notebook_outputs.py"))
        assert book["metadata"]["idml_jax"]["outputs_of"] == made["digest"](book)
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell["outputs"]]
        assert any(output["output_type"] == "stream" for output in outputs)
        assert not any(output["output_type"] == "error" for output in outputs)
        shown = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in outputs]) + json.dumps(
            [text for o in outputs for kind, text in o.get("data", {}).items() if kind.startswith("text/")]
        )
        assert (
            not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users|mnt|opt|var)/", shown) and "<iframe" not in shown
        )
        if path.stem == "idml_jax":
            assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
        assert path.stat().st_size < 2_000_000

    def test_every_cell_compiles_and_uses_only_what_came_before(self, path):
        whole = []
        for cell in cells(path):
            if cell["cell_type"] == "code":
                source = "".join(cell["source"])
                compile(source, f"{path.name}:{cell['id']}", "exec")
                whole.append(source)
        # What a cell reads at its top level has been bound by it or by one before.
        table = symtable.symtable("\n".join(whole), path.name, "exec")
        unbound = {s.get_name() for s in table.get_symbols() if not (s.is_assigned() or s.is_imported())}
        assert not unbound - set(dir(builtins))

    def test_the_budget_is_a_tagged_cell(self, path):
        tagged = [cell for cell in cells(path) if "parameters" in cell["metadata"].get("tags", [])]
        assert len(tagged) == 1 and "IDML_JAX_NOTEBOOK_TINY" in "".join(tagged[0]["source"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_runs(path, tmp_path, monkeypatch):
    """Runs the cells on the tiny set in a separate kernel and checks their output."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra 'test')")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra 'test')")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra 'test')")
    book = nbformat.read(path, as_version=4)
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "IDML_JAX_NOTEBOOK_TINY": "1",
        "IDML_JAX_NOTEBOOK_DIR": str(tmp_path / "runs"),
        "PYTHONPATH": str(ROOT),
    }
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    texts = "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", ()))
    pages = [o for c in book.cells for o in c.get("outputs", ()) if "text/html" in o.get("data", {})]
    if path.stem == "idml_jax":
        assert texts.count("trained") >= 2 and "images searched for 1" in texts and "'semantic': (36, 16)" in texts
        assert len(pages) == 3 and all("data:image/" in page["data"]["text/html"] for page in pages)
    else:
        assert texts.count("untrained  R@1") == 2 and texts.count("trained    R@1") == 2 and "by the proxies" in texts
