"""A gallery of a million rows: time to build, time to search, recall@10 and memory, beside plain faiss in the same run.

    python benchmarks/gallery.py --rows=1000000 --width=128 --folder=/tmp/gallery

Needs faiss-cpu in addition to the package. Every contestant is a process of its own, so that its peak memory is its
own; all read the same rows from one file. Rows are points around random class centres, normalised; the queries are new
points around the same centres. Contestants:

* ``blocks``: Parquet parts, exact search block by block.
* ``ann``: the same parts, ``--ann``; the index is opened for each search, as the command does.
* ``faiss Flat``: exact search by plain faiss, everything in memory.
* ``faiss`` with the kind and effort that ``ann`` chose: everything in memory, no exact distances afterwards.

``build`` is the time from rows to something that can be searched (for ``blocks`` writing the parts, for ``ann`` in
addition building and measuring the index). ``search`` is the time for all queries, and for a single one.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

K = 10
CHUNK = 50_000


def make(folder: Path, rows: int, width: int, queries: int) -> None:
    """Writes rows and queries."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(rows // 100, width)).astype(np.float32)

    def points(count: int) -> np.ndarray:
        x = centres[rng.integers(0, len(centres), count)] + 0.7 * rng.normal(size=(count, width)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    out = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (rows, width))
    for start in range(0, rows, CHUNK):
        out[start : start + CHUNK] = points(min(CHUNK, rows - start))
    out.flush()
    np.save(folder / "queries.npy", points(queries))


def timed(action):
    """The result of a call and its seconds."""
    start = time.perf_counter()
    result = action()
    return result, time.perf_counter() - start


def report(folder: Path, name: str, build: float, search: float, one: float, index: np.ndarray, **more) -> None:
    """Stores what a contestant measured."""
    np.save(folder / f"{name}.found.npy", index)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"name": name, "build": build, "search": search, "one": one, "peak": peak, **more}
    (folder / f"{name}.json").write_text(json.dumps(told))


def write(folder: Path) -> None:
    """The parts; their time is part of both of our contestants."""
    from idml_jax.inference import gallery_parts
    from idml_jax.inference.index import Index
    from idml_jax.metrics.embedded import Embedded

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    files = np.asarray([f"/photos/{i:07d}.jpg" for i in range(len(rows))])
    index = Index(Embedded(rows, np.zeros(len(rows), np.int32)), files, None, {"images": "benchmark"})
    report(folder, "parts", timed(lambda: gallery_parts.save(index, folder / "photos"))[1], 0, 0, np.zeros(0))


def blocks(folder: Path) -> None:
    """Exact search of the parts."""
    from idml_jax.inference.gallery import read_gallery
    from idml_jax.metrics.blocks import neighbours_in_blocks

    queries, gallery = np.load(folder / "queries.npy"), read_gallery(folder / "photos")
    look = lambda some: neighbours_in_blocks(some, gallery.blocks(), K)
    look(queries), look(queries[:1])  # compiles
    found, seconds = timed(lambda: look(queries))
    report(folder, "blocks", 0, seconds, timed(lambda: look(queries[:1]))[1], found.index)


def ann(folder: Path) -> None:
    """Approximate search of the parts."""
    from idml_jax.inference import approximate
    from idml_jax.inference.gallery import read_gallery

    queries, gallery = np.load(folder / "queries.npy"), read_gallery(folder / "photos")
    built, build = timed(lambda: approximate.open_or_build(gallery, print))
    look = lambda some: approximate.search(approximate.open_or_build(gallery), gallery, some, K)
    found, seconds = timed(lambda: look(queries))
    more = {"kind": built.kind, "effort": built.effort, "told": built.recall}
    report(folder, "ann", build, seconds, timed(lambda: look(queries[:1]))[1], found.index, **more)


def plain(folder: Path, kind: str, effort: int, name: str) -> None:
    """Plain faiss in memory."""
    import faiss

    rows, queries = np.load(folder / "rows.npy"), np.load(folder / "queries.npy")
    index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_L2)

    def build() -> None:
        if not index.is_trained:
            index.train(rows)
        index.add(rows)

    seconds = timed(build)[1]
    if kind.startswith("IVF"):
        index.nprobe = effort
    elif kind.startswith("HNSW"):
        index.hnsw.efSearch = effort
    (_, found), search = timed(lambda: index.search(queries, K))
    report(folder, name, seconds, search, timed(lambda: index.search(queries[:1], K))[1], found)


def table(folder: Path) -> str:
    """The measurements as a table, with ratios to faiss Flat."""
    names = ["blocks", "ann", "faiss Flat", "faiss same kind"]
    told = {name: json.loads((folder / f"{name}.json").read_text()) for name in ["parts", *names]}
    found = {name: np.load(folder / f"{name}.found.npy") for name in names}
    for name in ("blocks", "ann"):
        told[name]["build"] += told["parts"]["build"]
    truth, base = found["faiss Flat"], told["faiss Flat"]
    lines = [
        f"parts written in {told['parts']['build']:.1f} s; ann: {told['ann']['kind']}, effort {told['ann']['effort']}, "
        f"its own measure of recall@{K}: {told['ann']['told']:.3f}",
        f"| | build, s | {len(truth):,} queries, s | one query, ms | recall@{K} | peak memory, MiB | search / Flat |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        one = told[name]
        recall = np.mean((found[name][:, :, None] == truth[:, None, :]).any(axis=2))
        lines.append(
            f"| {name} | {one['build']:.1f} | {one['search']:.2f} | {1000 * one['one']:.0f} | {recall:.4f} | "
            f"{one['peak']:,.0f} | {one['search'] / base['search']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--folder", type=Path, required=True, help="folder for rows, parts and results")
    parser.add_argument("--step", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name in ("rows", "width", "queries"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)} must be at least 1")
    folder = given.folder.resolve()
    steps = {"write": write, "blocks": blocks, "ann": ann}
    if given.step in steps:
        steps[given.step](folder)
    elif given.step:
        kind = json.loads((folder / "ann.json").read_text())
        flat = given.step == "flat"
        plain(folder, "Flat" if flat else kind["kind"], kind["effort"], "faiss Flat" if flat else "faiss same kind")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, given.rows, given.width, given.queries)
        for step in ("write", "blocks", "ann", "flat", "same"):
            print(step, flush=True)
            subprocess.run([sys.executable, __file__, f"--folder={folder}", f"--step={step}"], check=True)
        print(table(folder))


if __name__ == "__main__":
    main()
