"""Runs a notebook of launch/ and stores its outputs in it; what GitHub cannot show (pages in frames) as pictures.

    python docs/notebook_outputs.py launch/idml_jax.ipynb --folder=/tmp/notebook     # minutes; needs Chromium

Needs the extra ``test`` and Chromium. The notebook runs in an empty folder. ``tests/test_notebooks.py`` fails if
the cells were changed since.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FRAME = re.compile(r'<iframe srcdoc="([^"]*)".*?height="(\d+)"', re.S)
WIDTH, COLOURS = 1000, 200  # of a picture: a notebook is to stay small


def digest(book: dict) -> str:
    """Of the code that the outputs belong to."""
    sources = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


def execute(path: Path, folder: Path) -> dict:
    """The notebook with its outputs, run in ``folder``."""
    import nbclient
    import nbformat

    book = nbformat.read(path, as_version=4)
    folder.mkdir(parents=True, exist_ok=True)
    client = nbclient.NotebookClient(book, timeout=7200, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT)})
    # Files are named as seen from the folder that the notebook runs in.
    text = nbformat.writes(book)
    for place in sorted({str(folder), str(folder.resolve())}, key=len, reverse=True):
        text = text.replace(json.dumps(f"{place}/")[1:-1], "").replace(json.dumps(place)[1:-1], ".")
    return json.loads(text)


def picture(page: str, height: int) -> str:
    """A screenshot of a page as base64 of a PNG."""
    from PIL import Image

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("error: Chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page)
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}", f"--screenshot={folder}/page.png",
        ]  # fmt: skip
        subprocess.run([browser, *flags, f"{folder}/page.html"], check=True, capture_output=True, timeout=300)
        with Image.open(f"{folder}/page.png") as shown:
            small = shown.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE)  # keeps rare colours
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def rewritten(text: str) -> str:
    """What remains to be seen of text with lines that were rewritten, such as progress bars."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip() if "\r" in line else shown)
    return "\n".join(lines)


def joined(outputs: list[dict]) -> list[dict]:
    """The outputs of a cell; text that was printed piece by piece is in one piece."""
    found: list[dict] = []
    for output in outputs:
        if output["output_type"] != "stream":
            found.append(output)
        elif found and found[-1].get("name") == output["name"]:
            found[-1]["text"] += "".join(output["text"])
        else:
            found.append({**output, "text": "".join(output["text"])})
    for output in found:
        if output["output_type"] == "stream":
            output["text"] = rewritten(output["text"])
    return found


def settle(book: dict) -> dict:
    """The notebook as it is stored: frames as pictures, no times, and the digest of its code."""
    for cell in book["cells"]:
        cell.get("metadata", {}).pop("execution", None)
        if "outputs" in cell:
            cell["outputs"] = joined(cell["outputs"])
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            output.get("metadata", {}).clear()
            found = FRAME.search("".join(data.get("text/html", "")))
            if found:
                data["image/png"] = picture(html.unescape(found[1]), int(found[2]))
                del data["text/html"]
    book["metadata"]["idml_jax"] = {"outputs_of": digest(book)}
    book["metadata"]["language_info"] = {"name": "python"}
    return book


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="empty folder to run in")
    given = parser.parse_args()
    if given.folder.is_dir() and any(given.folder.iterdir()):
        parser.error(f"{given.folder} is not empty")
    book = settle(execute(given.notebook, given.folder))
    given.notebook.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
