"""Trains every loss, plain and introspective, in short equal runs and prints one table.

    python benchmarks/loss_rows.py --root=data/omniglot_small --out=runs/loss_rows --epochs=5

A check that all rows learn, not a comparison of losses: nothing is tuned, and one seed says little.
"""

import argparse
import runpy
from pathlib import Path

from idml_jax.errors import run_command
from idml_jax.losses import LOSSES
from idml_jax.training import train

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of omniglot_small")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixup", action="store_true")
    arguments = parser.parse_args()
    get_config = runpy.run_path(str(ROOT / "configs" / "omniglot.py"))["get_config"]

    columns = ("R@1", "R@2", "RP", "MAP@R")
    print(f"| loss | metric | untrained R@1 | {' | '.join(columns)} | seconds |", flush=True)
    print("|---|---|---|" + "---|" * (len(columns) + 1), flush=True)
    for name in LOSSES:
        for introspective in (False, True):
            config = get_config()
            config.data.root = arguments.root
            config.seed = arguments.seed
            config.epochs = config.eval.every_epochs = arguments.epochs
            config.mixup.enabled = arguments.mixup
            config.loss.name = name
            config.ism.enabled = introspective
            config.log.tensorboard = False
            kind = "introspective" if introspective else "plain"
            result = train.train_and_evaluate(config, Path(arguments.out) / f"{name}_{kind}")
            figures = " | ".join(f"{100 * result['final'][c]:.1f}" for c in columns)
            untrained = 100 * result["untrained"]["R@1"]
            print(f"| {name} | {kind} | {untrained:.1f} | {figures} | {result['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    run_command(main)
