"""Wrong training labels and damaged training pictures: plain against introspective, controls, other losses, rates.

    python benchmarks/experiments/label_noise.py --table=noise --data=omniglot --seeds=0,1,2,3,4 --root=data
    python benchmarks/experiments/label_noise.py --table=noise --data=birds_whitened --seeds=0,1,2,3,4 --root=data
    python benchmarks/experiments/label_noise.py --table=damage --data=glyphs --seeds=0,1,2,3,4
    python benchmarks/experiments/label_noise.py --table=rates --data=omniglot --noise=0.4 --seeds=0,1,2 --figure=r.png
    python benchmarks/experiments/label_noise.py --table=noise --data=omniglot --noise=0.4 --seeds=0,1,2 --own-rate

Tables: ``noise`` plain and introspective, both with Mixup, for each share of wrong labels (``--noise``); ``damage`` the
same for each share of damaged training pictures of the glyphs; ``more`` other losses, forms, temperatures, without
Mixup, classification; ``controls`` a slower pace and PRISM; ``alive`` settings that keep u alive; ``rates`` R@1 on
held-out classes against the learning rate, plain and introspective. ``--own-rate`` gives every metric the rate that was
best in ``rates`` for the same data and share of wrong labels (run that first).

Labels of test and held-out classes are always right. The wrong labels of a seed are the same in all rows, so
differences are paired by seed. ``birds_whitened`` starts from ROOT/resnet50_v1.safetensors (imagenet_trunk.py) and the
whitened head, ``birds_lite`` from EfficientNet-Lite0; their checkpoints are removed when a run is finished. Finished
runs are skipped, failed ones are named at the end. ``--only`` selects rows whose name contains it (several with |),
``--set name=value`` changes a setting of all runs, ``--list`` prints the commands and runs nothing, ``--show`` only
makes the table. ``--results FILE`` adds the metrics of every finished run to a file of JSON lines, does not repeat the
runs that stand there, and makes the table from them, too. The published runs, since this file is kept:

    python benchmarks/experiments/label_noise.py --table=noise --data=omniglot --show \\
        --results=benchmarks/experiments/results/label_noise.jsonl

About the controls: AdamW divides the gradient by its own size, so a constant factor on the loss changes nothing but
the rounding (row ``loss x SCALE`` shows that); a slower pace is a smaller learning rate (row ``rate x SCALE``).
``SCALE`` should be the mean of ISM's factor H over the training pairs, as measured by who_is_uncertain.py. Uncertainty
also makes all similarities larger, as another margin does: rows ``margin`` (the default is 0.1). The row ``u without
effect`` has the introspective network, so its initial weights and random numbers, but the plain metric's values.
"""

import argparse
import ast
import json
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from closed_form import Found, cell, difference
from kept import Kept
from rows import COLLAPSING, DATA, FIRST, METRICS, Overrides
from run import ROOT, command, folder_of

SHORT: Overrides = {"eval.cluster": False, "eval.ambiguity_images": 0}
WHITENED = {"model.semantic_init": "whiten", "epochs": 2, "optim.warmup_epochs": 0}
DATA["birds_whitened"] = {**DATA["birds_imagenet"], "overrides": {**DATA["birds_imagenet"]["overrides"], **WHITENED}}
# The same from EfficientNet-Lite0 (extra `weights`), which takes a third of the time.
LITE = {"model.name": "auto", "model.init_from": "efficientnet_lite0"}
DATA["birds_lite"] = {**DATA["birds_whitened"], "overrides": {**DATA["birds_whitened"]["overrides"], **LITE}}
# Training classes as classes of a classifier: every fourth image of a class is a test image.
DATA["omniglot_classes"] = {
    "config": "omniglot.py",
    "root": "omniglot_classes",
    "overrides": {"epochs": 12, "task": "classification", "eval.best_metric": "top1", "mixup.enabled": False},
}
# Epochs between two checkpoints, for who_is_uncertain.py; without an entry only the last is kept, and then removed.
KEPT = {"omniglot": 3, "glyphs": 2}
BEST_OF = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors of the usual learning rate
USUAL_RATE = {"omniglot": 2e-3, "glyphs": 3e-3, "birds_whitened": 1e-4, "birds_lite": 1e-4}
PLAIN, ISM = "plain+mixup", "ism+mixup"
BOTH = {name: ("noise", name) for name in (PLAIN, ISM)}
# Rows of a table whose runs are those of another table: that table and its row.
SHARED = {
    "more": BOTH,
    "controls": BOTH,
    "damage": {f"{name}, damaged 30 %": found for name, found in BOTH.items()},
    "alive": {f"proxy_anchor/{name}": found for name, found in BOTH.items()}
    | {f"{loss}/{name}": ("more", f"{loss}/{name}") for loss in COLLAPSING for name in BOTH},
}
HELD_OUT: Overrides = {"data.validation_classes": 0.2, "eval.split": "validation"}
CLASSIFIER = {
    "plain": {"ism.enabled": False, "model.uncertainty_head": "none"},
    "ism": {"ism.enabled": True, "model.uncertainty_head": "linear"},
    "plain, label smoothing": {
        "ism.enabled": False, "model.uncertainty_head": "none", "classification.label_smoothing": 0.1,
    },
}  # fmt: skip
Rows = dict[str, Overrides]


def noise_rows(given: argparse.Namespace) -> Rows:
    return {name: METRICS[name] for name in (PLAIN, ISM)}


def damage_rows(given: argparse.Namespace) -> Rows:
    variants = {"0": "damaged_0", "30": "default", "60": "damaged_60", "90": "damaged_90"}
    return {
        f"{name}, damaged {percent} %": {**METRICS[name], "data.variant": variant}
        for percent, variant in variants.items()
        for name in (PLAIN, ISM)
    }


def more_rows(given: argparse.Namespace) -> Rows:
    if given.data == "omniglot_classes":
        return CLASSIFIER
    rows: Rows = {name: METRICS[name] for name in (PLAIN, ISM, "plain", "ism")}
    for loss in FIRST:
        if loss != "proxy_anchor":
            rows |= {f"{loss}/{name}": {"loss.name": loss, **METRICS[name]} for name in (PLAIN, ISM)}
    rows["released"] = {**METRICS[ISM], "ism.variant": "released"}
    rows["absolute, tau 2"] = {**METRICS[ISM], "ism.variant": "absolute", "ism.temperature": 2.0}
    return rows | {f"tau {tau:g}": {**METRICS[ISM], "ism.temperature": tau} for tau in (1.0, 2.0, 20.0)}


def control_rows(given: argparse.Namespace) -> Rows:
    rate, plain = USUAL_RATE.get(given.data, 1e-3), METRICS[PLAIN]
    rows = {PLAIN: plain, ISM: METRICS[ISM]}
    rows[f"plain, loss x {given.scale:g}"] = {**plain, "loss.weights": (given.scale,)}
    for factor in dict.fromkeys((given.scale, 0.5)):
        rows[f"plain, rate x {factor:g}"] = {**plain, "optim.learning_rate": factor * rate}
    for margin in (0.0, 0.2):
        rows[f"plain, margin {margin:g}"] = {**plain, "loss.proxy_anchor.margin": margin}
    rows["ism, u without effect"] = {**METRICS[ISM], "ism.temperature": 1e6}
    prism: Overrides = {"prism.share": "{noise}"}
    for kind, more in (("prism", prism), ("prism after 4 epochs", {**prism, "prism.warmup_epochs": 4})):
        rows |= {f"{name}, {kind}": {**METRICS[f"{name}+mixup"], **more} for name in ("plain", "ism")}
    return rows


def alive_rows(given: argparse.Namespace) -> Rows:
    stop: Overrides = {"ism.negatives": "stop"}
    remedies: Rows = {
        "": {},
        "negatives stopped": stop,
        "negatives stopped, attenuation 0.1": {**stop, "ism.attenuation": 0.1},
        "negatives stopped, attenuation 1": {**stop, "ism.attenuation": 1.0},
        "attenuation 0.1": {"ism.attenuation": 0.1},
        "prior by confusion 0.1": {"ism.prior": 0.1, "ism.prior_by": "confusion"},
        "scalar": {"model.uncertainty_head": "scalar"},
        "scalar, negatives stopped, attenuation 0.1": {
            "model.uncertainty_head": "scalar", **stop, "ism.attenuation": 0.1,
        },
    }  # fmt: skip
    rows: Rows = {}
    for loss in ("proxy_anchor", *COLLAPSING):
        rows[f"{loss}/{PLAIN}"] = {"loss.name": loss, **METRICS[PLAIN]}
        for name, remedy in remedies.items():
            rows[f"{loss}/{ISM}{', ' * bool(name)}{name}"] = {"loss.name": loss, **METRICS[ISM], **remedy}
    return rows


def rate_rows(given: argparse.Namespace) -> Rows:
    usual = USUAL_RATE[given.data]
    return {
        f"{name}, rate {factor * usual:g}": {**METRICS[name], **HELD_OUT, "optim.learning_rate": factor * usual}
        for factor in BEST_OF
        for name in (PLAIN, ISM)
    }


TABLES = {
    "noise": noise_rows, "damage": damage_rows, "more": more_rows, "controls": control_rows, "alive": alive_rows,
    "rates": rate_rows,
}  # fmt: skip


def place(given: argparse.Namespace, table: str, noise: float) -> Path:
    kind = "" if given.kind == "uniform" or not noise else f"_{given.kind}"
    return given.out / table / given.data / f"noise{round(100 * noise)}{kind}"


def row_folder(given: argparse.Namespace, name: str, noise: float) -> Path:
    """Folder of a row's runs, perhaps shared with another table."""
    table, row = SHARED.get(given.table, {}).get(name, (given.table, name))
    return place(given, table, noise) / folder_of(row)


def settings(given: argparse.Namespace, overrides: Overrides, noise: float, seed: int) -> Overrides:
    """The settings of a run, besides those of its data set."""
    fields: Overrides = {**SHORT, **overrides}
    if noise:
        fields |= {"data.label_noise.share": noise, "data.label_noise.seed": seed}
        fields |= {"data.label_noise.kind": given.kind} if given.kind != "uniform" else {}
    if given.data in KEPT:
        fields |= {"checkpoint.every_epochs": KEPT[given.data], "checkpoint.keep_latest": 20}
    fields = {k: noise if v == "{noise}" else v for k, v in fields.items()}
    if not noise:
        fields = {name: value for name, value in fields.items() if not name.startswith("prism.")}
    return {**fields, **dict(text.split("=", 1) for text in given.set)}


def rows_of(given: argparse.Namespace, noise: float) -> Rows:
    """The rows of the table; with ``--own-rate`` each metric has the rate that was best on held-out classes."""
    rows = TABLES[given.table](given)
    if given.own_rate:
        rows = {
            f"{name}, own rate": {**row, "optim.learning_rate": best_rate(given, name, noise)}
            for name, row in rows.items()
        }
    parts = given.only.split("|")
    return {name: row for name, row in rows.items() if any(part == name or part in name for part in parts)}


def best_rate(given: argparse.Namespace, metric: str, noise: float) -> float:
    """The learning rate with the best mean R@1 on held-out classes."""
    found = {}
    for factor in BEST_OF:
        rate = factor * USUAL_RATE[given.data]
        runs = results(given, place(given, "rates", noise) / folder_of(f"{metric}, rate {rate:g}"))
        if runs:
            found[rate] = statistics.mean(run["R@1"] for run in runs.values())
    if len(found) < len(BEST_OF):
        sys.exit(
            f"--own-rate: run --table=rates --data={given.data} --noise={noise:g} first ({len(found)} rates found)"
        )
    return max(found, key=lambda rate: found[rate])


def results(given: argparse.Namespace, folder: Path) -> Found:
    """Final metrics of finished runs by seed, those of ``--results`` and those in the folder."""
    found = given.kept.of(str(folder.relative_to(given.out)))
    here = {
        path.parent.name.removeprefix("seed"): json.loads(path.read_text())["final"]
        for path in sorted(folder.glob("seed*/result.json"))
        if made_with(path, given.set)
    }
    return {**found, **here}


def made_with(result: Path, wanted: list[str]) -> bool:
    """Whether a finished run has the settings of ``--set``."""
    config = json.loads(result.read_text())["config"]
    for name, value in (text.split("=", 1) for text in wanted):
        found = config
        for part in name.split("."):
            found = found[part]
        try:
            expected = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            expected = value
        if found != (list(expected) if isinstance(expected, tuple) else expected):
            return False
    return True


def run_all(given: argparse.Namespace) -> list[str]:
    """Runs what is not finished; returns the failed ones."""
    failed = []
    for seed in given.seeds.split(","):
        for noise in given.noise:
            for name, overrides in rows_of(given, noise).items():
                workdir = row_folder(given, name, noise) / f"seed{seed}"
                fields = settings(given, overrides, noise, int(seed))
                run = command(given.data, name, fields, int(seed), given.root.resolve(), given.out, workdir)
                short = str(workdir.relative_to(given.out))
                result = workdir / "result.json"
                if given.list:
                    print(shlex.join(run))
                    continue
                if short in given.kept:
                    continue
                if result.exists() and not made_with(result, given.set):
                    sys.exit(f"{workdir} holds a run without {' '.join(given.set)}; give another --out")
                if not result.exists() and not finish(run, workdir, given.data):
                    failed.append(str(workdir))
                given.kept.add(short, result)
    return failed


def finish(run: list[str], workdir: Path, data: str) -> bool:
    """Runs a command; its log stands beside its folder. Prints the CPU time."""
    workdir.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    log = workdir.with_name(f"{workdir.name}.log")
    with open(log, "w") as file:
        code = subprocess.run(run, cwd=ROOT, stdout=file, stderr=file).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{workdir}: {seconds:.0f} s of CPU time" + (f"; exit code {code}, see {log}" if code else ""), flush=True)
    if not code and data not in KEPT:
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return not code


def table(given: argparse.Namespace) -> list[str]:
    """One line per row and share of wrong labels, and the paired differences to the plain row."""
    measure = "top1" if given.data == "omniglot_classes" else "R@1"
    columns = (measure, "nll") if measure == "top1" else (measure, "MAP@R")
    head = ["wrong labels", "row", "seeds", *columns, f"{measure} minus plain", "mean length of u"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for noise in given.noise:
        found: dict[str, Found] = {}
        for name in rows_of(given, noise):
            runs = results(given, row_folder(given, name, noise))
            if runs:
                found[name] = runs
        for name, runs in found.items():
            plain = peer(name, found)
            told = difference(found[plain], runs, measure) if plain else ""
            length = [run[k] for run in runs.values() for k in ("uncertainty_mean", "mean_u") if run.get(k) is not None]
            cells = [f"{100 * noise:.0f} %", name, str(len(runs)), *(cell(runs, column) for column in columns)]
            lines.append(f"| {' | '.join([*cells, told, f'{statistics.mean(length):.3f}' if length else ''])} |")
    return lines


def peer(name: str, found: dict[str, Found]) -> str | None:
    """The plain row that a row is compared with: the same in all but the metric, or else the table's plain row."""
    if name.split("/")[-1].startswith(PLAIN):
        return None
    same = re.sub(r"\bism\b", "plain", name, count=1)
    loss = name.split("/")[0] + "/" if "/" in name else ""
    end = ", own rate" if name.endswith(", own rate") else ""
    candidates = (same, f"{loss}{PLAIN}{end}", f"{PLAIN}{end}", "plain")
    return next((one for one in candidates if one in found and one != name), None)


def draw_rates(given: argparse.Namespace) -> None:
    """R@1 on held-out classes against the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rates = [factor * USUAL_RATE[given.data] for factor in BEST_OF]
    figure, axes = plt.subplots(1, len(given.noise), figsize=(4.2 * len(given.noise), 3.2), sharey=True, squeeze=False)
    for axis, noise in zip(axes[0], given.noise, strict=True):
        # The second line a little to the right, so that its bars are seen beside those of the first.
        for metric, colour, style, right in ((PLAIN, "#64748b", "--", 1.0), (ISM, "#c2410c", "-", 1.04)):
            points = []
            for rate in rates:
                runs = results(given, place(given, "rates", noise) / folder_of(f"{metric}, rate {rate:g}"))
                values = [100 * run["R@1"] for run in runs.values()]
                if values:
                    points.append(
                        (right * rate, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0)
                    )
            if points:
                name = "plain" if metric == PLAIN else "introspective"
                axis.errorbar(
                    *zip(*points, strict=True), color=colour, linestyle=style, marker="o", capsize=3, label=name
                )
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.set_title(f"{given.data}, {100 * noise:.0f} % wrong labels (mean and deviation)", fontsize=10)
        axis.set_xlabel("learning rate", fontsize=9)
        axis.grid(color="#e2e8f0", linewidth=0.8)
    axes[0][0].set_ylabel("R@1 on held-out classes (%)", fontsize=9)
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(given.figure, dpi=130)
    print(given.figure)


def classes_folder(root: Path) -> None:
    """The training classes of Omniglot for a classifier, ROOT/omniglot_classes: a fourth of the images tests."""
    target = root / "omniglot_classes"
    if target.exists():
        return
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for folder in sorted((root / "omniglot_small" / "train").iterdir()):
        for i, file in enumerate(sorted(folder.iterdir())):
            place = unfinished / ("test" if i % 4 == 3 else "train") / folder.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place / file.name)
    unfinished.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=sorted(TABLES), required=True)
    parser.add_argument("--data", choices=sorted(DATA), required=True)
    parser.add_argument("--noise", default="", help="shares of wrong labels; default 0,0.2,0.4,0.6 (damage: 0)")
    parser.add_argument("--kind", default="uniform", help="data.label_noise.kind: uniform or confusable")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--scale", type=float, default=0.7, help="for the controls: factor of the pace")
    parser.add_argument("--own-rate", action="store_true", help="the best rate of each metric, from --table=rates")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the image sets")
    parser.add_argument("--out", type=Path, default=Path("runs/label_noise"))
    parser.add_argument("--results", type=Path, help="file of JSON lines for the metrics of finished runs")
    parser.add_argument("--only", default="", help="rows whose name is or contains this; several with |")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all runs")
    parser.add_argument("--figure", type=Path, help="of --table=rates: file of the plot")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--show", action="store_true", help="make the table of finished runs, run nothing")
    given = parser.parse_args()
    given.out = given.out.resolve()
    given.kept = Kept(given.results, given.set)
    default = "0" if given.table == "damage" else "0.4" if given.table in ("more", "controls", "alive") else ""
    given.noise = [float(text) for text in (given.noise or default or "0,0.2,0.4,0.6").split(",")]
    if given.own_rate and given.table != "noise":
        parser.error("--own-rate is for --table=noise")
    able = {"damage": ["glyphs"], "rates": sorted(USUAL_RATE)}.get(given.table, sorted(DATA))
    if given.table in ("controls", "alive"):  # for retrieval
        able.remove("omniglot_classes")
    if given.data not in able:
        parser.error(f"--table={given.table} is for --data={', '.join(able)}")
    if given.data == "omniglot_classes" and not given.list:
        classes_folder(given.root)
    failed = [] if given.show else run_all(given)
    if not given.list:
        print("\n".join(table(given)))
        if given.figure:
            draw_rates(given)
    if failed:
        print(f"{len(failed)} runs failed:", *failed, sep="\n  ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
