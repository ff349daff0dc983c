"""Does a risk head find wrong answers? AUROC on test classes beside |u| and the norms, and the ceiling of the image.

    python benchmarks/experiments/risk_heads.py runs/omniglot runs/birds --seeds=0,1,2

Each folder is a finished run of task retrieval. Heads of several seeds are fitted as ``python -m idml_jax.risk`` does
(the features are computed once and stay in the folder; no head is stored), and evaluated on the run's test images.

The ceiling is what no honest method may do: the same head, fitted on the true losses of half of the test classes and
evaluated on the other half, both ways. It says how much can be known about a wrong answer from the image alone.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
from absl import logging as absl_logging

from idml_jax.errors import quiet_libraries
from idml_jax.metrics.class_folds import fold_classes
from idml_jax.metrics.uncertainty import r_auroc
from idml_jax.runtime.files import user_path
from idml_jax.runtime.progress import show_progress
from idml_jax.training import risk
from idml_jax.training.features import FeatureEmbedder, features_of
from idml_jax.training.risk import Pictures, Settings
from idml_jax.training.semantic_init import FOLDER, network_of

SHOWN = {
    "risk": "risk head", "held_out": "left-out training classes", "ceiling": "ceiling", "uncertainty": "norm of u",
    "norm": "norm of s",
    "feature_norm": "norm of the feature", "nearest_distance": "distance", "vote_share": "vote",
}  # fmt: skip


def ceiling(run: risk.Run, variables: object, workdir: Path, settings: Settings, epochs: int) -> float:
    """AUROC for wrong answers of heads fitted on half of the test classes, on the other half; mean of both ways."""
    evaluation, config = run.evaluation(variables), run.config
    source = evaluation.source
    features = features_of(evaluation.embedder, network_of(config), source, workdir / FOLDER / config.eval.split)
    embedded = FeatureEmbedder.over(evaluation.embedder, ((source, features),))(source)
    everyone = np.arange(len(source))
    losses = risk.answer_losses(embedded.semantic, embedded.semantic, source.labels, everyone)
    half = fold_classes(np.bincount(source.labels), 2, settings.seed)[source.labels]
    pictures, found = Pictures(features.rows(everyone), losses, half), []
    for fold in (0, 1):
        head = risk.trained(pictures.of(half != fold), settings, epochs, settings.seed)[-1]
        own = pictures.of((half == fold) & np.isfinite(losses))
        found.append(r_auroc(risk.risks(head, own.features), own.losses <= 0))
    return statistics.mean(found)


def of_run(workdir: Path, seeds: list[int], settings: Settings) -> list[dict[str, float]]:
    """The values of every seed."""
    with quiet_libraries():
        run, variables, _ = risk.restored(workdir)
        found = []
        for seed in seeds:
            settings = dataclasses.replace(settings, seed=seed)
            pictures, images = risk.pictures_of(run, variables, workdir, settings)
            head, about = risk.fit_head(pictures, images, settings)
            report = risk.measured(run, variables, workdir, head)
            values = {name: report[key] for name in SHOWN if (key := f"R-AUROC({name})") in report}
            left_out = [value for value in about["held_out/clean"] if not np.isnan(value)]
            values |= {"held_out": max(left_out)} if left_out else {}
            values["ceiling"] = ceiling(run, variables, workdir, settings, about["epochs"])
            found.append({"R@1": report["R@1"], "epochs": about["epochs"], **values})
    return found


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [f"| run | seeds | R@1 | {' | '.join(SHOWN.values())} |", "|---" * (len(SHOWN) + 3) + "|"]
    for name, runs in found.items():
        cells = [cell([run[n] for run in runs if n in run]) for n in SHOWN]
        lines.append(f"| {name} | {len(runs)} | {100 * runs[0]['R@1']:.1f} | {' | '.join(cells)} |")
    return lines


def cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f}" + (f" ± {spread:.3f}" if spread > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="folder of a finished run")
    parser.add_argument("--seeds", default="0,1,2")
    for name in ("epochs", "crops", "corrupted"):
        parser.add_argument(
            f"--{name}", type=int, default=getattr(Settings(), name), help="see python -m idml_jax.risk"
        )
    parser.add_argument("--out", type=Path, help="JSON file for the values")
    given = parser.parse_args()
    show_progress()
    absl_logging.set_verbosity(absl_logging.ERROR)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    settings = Settings(epochs=given.epochs, crops=given.crops, corrupted=given.corrupted)
    found = {}
    for workdir in given.run:
        found[workdir.name] = of_run(user_path(workdir), seeds, settings)
        print("\n".join(table(found)), flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
