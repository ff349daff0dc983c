"""The metric in closed form, and fine-tuning that starts from it or from a random head: runs and one table.

    python benchmarks/experiments/imagenet_trunk.py --out=data/resnet50_v1.safetensors
    python benchmarks/experiments/closed_form.py --data=birds_imagenet --root=data --seeds=0,1,2
    python benchmarks/experiments/closed_form.py --data=omniglot_imagenet --root=data --seeds=0,1,2

Rows: the closed form (``idml_jax.fit``, one run, which also measures the features as they are), and fine-tuning for two
epochs from the whitened and from a random head, without warm-up, and for two epochs of the heads and two of everything
from either; each with the plain and with the introspective metric. Everything else is equal. Finished runs are
skipped. ``--set name=value`` changes a setting of all runs (``--set epochs=1``); with ``--set eval.every_epochs=1``
a second table shows the metrics after every epoch. To choose settings, test on training classes: ``--set
data.validation_classes=0.2 --set eval.split=validation``. ``--only=A|B`` selects rows; ``--list`` prints the commands.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from rows import DATA, METRICS, Overrides
from run import ROOT, command, folder_of

KNOWN = {"plain": METRICS["plain+mixup"], "ism": METRICS["ism+mixup"]}
STARTS: dict[str, Overrides] = {
    "whitened, 2 epochs": {"model.semantic_init": "whiten", "epochs": 2, "optim.warmup_epochs": 0},
    "random, 2 epochs": {"model.semantic_init": "random", "epochs": 2, "optim.warmup_epochs": 0},
    "random, 2 + 2 epochs": {"model.semantic_init": "random", "epochs": 4, "optim.warmup_epochs": 2},
    "whitened, 2 + 2 epochs": {"model.semantic_init": "whiten", "epochs": 4, "optim.warmup_epochs": 2},
}
COLUMNS = ("R@1", "MAP@R")
SHOWN = (*COLUMNS, "NMI", "minutes")  # of the first table; what was not measured (eval.cluster=False) stays empty
Found = dict[str, dict[str, float]]  # metrics by seed


def rows(extra: Overrides) -> dict[str, Overrides]:
    """The settings of every fine-tuned row."""
    return {
        f"{metric}, {start}": {**settings, **how, **extra}
        for metric, settings in KNOWN.items()
        for start, how in STARTS.items()
    }


def finished(run: list[str], workdir: Path, listed: bool) -> bool:
    """Runs a command unless it is finished; the log goes to its folder."""
    if listed:
        print(shlex.join(run))
        return False
    if (workdir / "result.json").exists():
        return True
    print(workdir, flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir.with_name(f"{workdir.name}.log"), "w") as log:
        code = subprocess.run(run, cwd=ROOT, stdout=log, stderr=log).returncode
    if code:
        print(f"  exit code {code}, see {log.name}", flush=True)
    return not code


def measured(workdir: Path) -> dict[str, float]:
    """The metrics at the end of a run, and its minutes from start to end."""
    result = json.loads((workdir / "result.json").read_text())
    return {**result["final"], "minutes": result["seconds"] / 60}


def cell(runs: Found, name: str) -> str:
    if any(name not in run for run in runs.values()):
        return ""
    values = [run[name] * (1 if name == "minutes" else 100) for run in runs.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def by_step(out: Path, rows: list[str]) -> list[str]:
    """The metrics of every row at each evaluation, mean over the seeds; step 0 is the start."""
    lines = []
    for row in rows:
        found: dict[int, list[dict[str, float]]] = {}
        for log in sorted((out / folder_of(row)).glob("seed*/metrics.jsonl")):
            for line in map(json.loads, log.read_text().splitlines()):
                if f"eval/{COLUMNS[0]}" in line:
                    found.setdefault(line["step"], []).append(line)
        for step, logged in sorted(found.items()):
            values = " | ".join(f"{100 * statistics.mean(line[f'eval/{c}'] for line in logged):.1f}" for c in COLUMNS)
            lines.append(f"| {row} | {step} | {len(logged)} | {values} |")
    return [f"| row | step | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|", *lines]


def difference(one: Found, other: Found, name: str) -> str:
    """Mean of the paired differences in points, with its standard error; empty without a common seed."""
    gains = [100 * (other[seed][name] - one[seed][name]) for seed in one if seed in other]
    if not gains:
        return ""
    error = f" (standard error {statistics.stdev(gains) / len(gains) ** 0.5:.1f})" if len(gains) > 1 else ""
    return f"{statistics.mean(gains):+.1f}{error}"


def table(peers: list[dict], found: dict[str, Found]) -> list[str]:
    """The table of all rows, and the paired differences of fine-tuned ones."""
    lines = [f"| row | seeds | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 2) + "|"]
    for peer in peers:
        lines.append(
            f"| {peer['method']}, not trained | 1 | {' | '.join(cell({'': peer['found']}, c) for c in SHOWN)} |"
        )
    for row, runs in found.items():
        lines.append(f"| {row} | {len(runs)} | {' | '.join(cell(runs, column) for column in SHOWN)} |")
    others = [("random, 2 epochs", "whitened, 2 epochs"), ("random, 2 + 2 epochs", "whitened, 2 + 2 epochs")]
    others.append(("random, 2 + 2 epochs", "whitened, 2 epochs"))
    pairs = [(f"{metric}, {one}", f"{metric}, {other}") for metric in KNOWN for one, other in others]
    pairs += [(f"plain, {start}", f"ism, {start}") for start in STARTS]
    for one, other in pairs:
        if one in found and other in found and (told := difference(found[one], found[other], COLUMNS[0])):
            more = difference(found[one], found[other], COLUMNS[1])
            lines.append(f"* {other} minus {one}, same seed: {COLUMNS[0]} {told}, {COLUMNS[1]} {more}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=sorted(DATA), required=True)
    parser.add_argument("--trunk", default="", help="weights to start from; default: those of the data's settings")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the image sets")
    parser.add_argument("--out", type=Path, default=Path("runs/closed_form"))
    parser.add_argument("--only", default="", help="fine-tuned rows whose name contains this")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    given = parser.parse_args()
    extra: Overrides = dict(text.split("=", 1) for text in given.set)
    if given.trunk:
        extra["model.init_from"] = str(Path(given.trunk).resolve())
    elif "model.init_from" not in DATA[given.data]["overrides"]:
        parser.error(f"--trunk is missing: the settings of {given.data} name no weights to start from")
    out, root = (given.out / given.data).resolve(), given.root.resolve()
    make = lambda row, overrides, seed, workdir: command(given.data, row, overrides, seed, root, out, workdir)

    fitted = out / "closed_form"
    run = make("closed form", {"ism.enabled": False, "eval.untrained": True, **extra}, 0, fitted)
    run[run.index("idml_jax.main")] = "idml_jax.fit"
    peers = []
    if finished(run, fitted, given.list):
        peers = json.loads((fitted / "result.json").read_text())["peers"]
        for peer in peers:
            peer["found"] = peer.pop(str(extra.get("eval.split", "test")))
        peers[-1]["found"]["minutes"] = measured(fitted)["minutes"]  # of the run that measures all of them
    found: dict[str, Found] = {}
    for seed in given.seeds.split(","):
        for row, overrides in rows(extra).items():
            workdir = out / folder_of(row) / f"seed{seed}"
            if any(part in row for part in given.only.split("|")) and finished(
                make(row, overrides, int(seed), workdir), workdir, given.list
            ):
                found.setdefault(row, {})[seed] = measured(workdir)
    if not given.list:
        print("\n".join(table(peers, found)))
        print("\n".join(by_step(out, list(found))))
    sys.exit(0)


if __name__ == "__main__":
    main()
