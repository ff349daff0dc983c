"""Runs the rows of a table one after the other, each in a separate process; finished rows are skipped.

    python benchmarks/experiments/run.py --table=A --data=omniglot --seeds=0,1,2 --root=data --out=runs/experiments
    python benchmarks/experiments/tables.py --out=runs/experiments

Tables: A accuracy of the first seven losses, L of the others, B uncertainty, K classification, U what keeps u alive,
P a trunk for ``--data=tiny_pretrained``. ``--data=birds_imagenet`` needs ROOT/resnet50_v1.safetensors
(imagenet_trunk.py).

Every other loss, plain and introspective, on Omniglot, with the table at the end:

    python benchmarks/experiments/run.py --table=L --data=omniglot --seeds=0,1 --root=data --out=runs/experiments

``--steps=1`` ends each run after one step, to see that all rows work. ``--only=ism`` selects the rows whose name
contains it; ``--list`` prints the commands and runs nothing.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from rows import DATA, LATER, TABLES

ROOT = Path(__file__).resolve().parent.parent.parent
COMMON = {"eval.untrained": False, "eval.every_epochs": 1000, "checkpoint.every_epochs": 1000, "log.tensorboard": False}


def folder_of(row: str) -> str:
    return row.replace(" ", "_").replace(",", "").replace("/", "-")


def command(data: str, row: str, overrides: dict, seed: int, root: Path, out: Path, workdir: Path) -> list[str]:
    """The command line of a run, as a user would type it."""
    setting = DATA[data]
    fields = {**COMMON, **setting["overrides"], **overrides, "seed": seed}
    fields = {
        name: value.format(out=out, root=root) if isinstance(value, str) else value for name, value in fields.items()
    }
    config = setting["config"].format(row=row.split(", ")[0])
    if setting["root"]:
        fields["data.root"] = str(root / setting["root"])
    variant = fields.pop("variant", None)
    program = ["benchmarks/experiments/variants.py", f"--variant={variant}"] if variant else ["-m", "idml_jax.main"]
    return [
        sys.executable,
        *program,
        f"--config=configs/{config}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=sorted(TABLES), required=True)
    parser.add_argument("--data", choices=sorted(DATA), required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the image sets")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--only", default="", help="rows whose name is or contains this; several with |")
    parser.add_argument("--steps", type=int, default=0, help="steps after which every run ends; 0: all")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args()
    failed = 0
    for seed in arguments.seeds.split(","):
        rows = TABLES[arguments.table]()
        if arguments.steps:
            rows = {name: {**overrides, "max_steps": arguments.steps} for name, overrides in rows.items()}
        for name, overrides in rows.items():
            if not any(part == name or (part not in rows and part in name) for part in arguments.only.split("|")):
                continue
            workdir = arguments.out / arguments.table / arguments.data / folder_of(name) / f"seed{seed}"
            workdir = workdir.resolve()
            run = command(
                arguments.data, name, overrides, int(seed), arguments.root.resolve(), arguments.out.resolve(), workdir
            )
            if arguments.list:
                print(shlex.join(run))
            elif not (workdir / "result.json").exists():
                print(f"{arguments.data} {name} seed {seed}", flush=True)
                workdir.mkdir(parents=True, exist_ok=True)
                with open(workdir / "log.txt", "w") as log:
                    code = subprocess.run(run, cwd=ROOT, stdout=log, stderr=log).returncode
                if code:
                    failed += 1
                    print(f"  exit code {code}, see {workdir}/log.txt", flush=True)
    if arguments.table == "L" and not arguments.list:
        from tables import accuracy_of  # it imports this module

        print("\n".join(accuracy_of(arguments.out, "L", arguments.data, LATER, ("plain", "ism"))))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
