"""Which training images are uncertain: those with a wrong label, and the damaged ones? Early and late in training.

    python benchmarks/experiments/label_noise.py --table=noise --data=omniglot --noise=0.4 --seeds=0,1,2 --root=data
    python benchmarks/experiments/who_is_uncertain.py runs/label_noise/noise/omniglot/noise40

The folder is searched for finished runs; those with the same parent folder are seeds of one row. For every checkpoint
the training images are embedded (without augmentation), and the AUROC of each score for the truth is computed: 1 finds
all, 0.5 is chance.

* |u|: the length of the image's uncertainty.
* beta: the mean of || u + u' || over up to 20 other images of its class, as labelled.
* beta of pairs: of || u + u' || of pairs with the same given label, for pairs of which the true labels differ.
* loss: ProxyAnchor's terms of the image alone on the plain similarity (the small-loss trick); against the proxies, or,
  without proxies, the mean embeddings of the classes as labelled.
* neighbours: the share of its 10 nearest training images with another label.

``H`` is the mean of ISM's gradient factor over the pairs of image and own proxy, and of image and other proxy. The
values are kept in who_is_uncertain.json beside the result of each run; --again computes them anew.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np
from absl import logging as absl_logging
from jaxtyping import Bool, Float, Int

from idml_jax import ism
from idml_jax.ism import Embedding, Metric
from idml_jax.metrics.uncertainty import r_auroc
from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import Run, build
from idml_jax.training.tasks.metrics_of_run import metric_of

FILE = "who_is_uncertain.json"
SCORES = {"u": "|u|", "beta": "beta", "pairs": "beta of pairs", "loss": "loss", "neighbours": "neighbours"}
FACTORS = {"H own": "H, own proxy", "H others": "H, other proxies"}
TRUTHS = {"wrong": "wrong label", "damaged": "damaged"}
MEMBERS, NEAREST = 20, 10
ALPHA, MARGIN = 32.0, 0.1


def image_loss(similarity: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """ProxyAnchor's two terms of each image by itself: its own class, and the mean over the other classes."""
    own = similarity[np.arange(len(labels)), labels]
    others = np.logaddexp(0.0, ALPHA * (similarity + MARGIN))
    others[np.arange(len(labels)), labels] = 0.0
    return np.logaddexp(0.0, -ALPHA * (own - MARGIN)) + others.sum(axis=1) / (similarity.shape[1] - 1)


def class_means(semantic: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], count: int) -> np.ndarray:
    means = np.zeros((count, semantic.shape[1]))
    np.add.at(means, labels, semantic)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def other_members(labels: Int[np.ndarray, "n"], rng: np.random.Generator) -> list[Int[np.ndarray, "m"]]:
    """Up to 20 other images of each image's class."""
    by_class = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    return [rng.permutation(by_class[label][by_class[label] != i])[:MEMBERS] for i, label in enumerate(labels)]


def neighbour_disagreement(semantic: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> np.ndarray:
    """Share of the 10 nearest other images with another label."""
    found = []
    for start in range(0, len(labels), 512):
        near = semantic[start : start + 512] @ semantic.T
        near[np.arange(len(near)), start + np.arange(len(near))] = -np.inf
        nearest = np.argpartition(-near, NEAREST, axis=1)[:, :NEAREST]
        found.append(np.mean(labels[nearest] != labels[start : start + 512, None], axis=1))
    return np.concatenate(found)


def auroc(score: Float[np.ndarray, "n"], found: Bool[np.ndarray, "n"]) -> float | None:
    value = r_auroc(score, ~found)
    return None if np.isnan(value) else value


def detection(
    embedding: Embedding,
    labels: Int[np.ndarray, "n"],
    centres: Float[np.ndarray, "c d"],
    truth: dict[str, np.ndarray],
    metric: Metric,
) -> dict[str, float | None]:
    """AUROC of every score for every truth, and the mean of H.

    Args:
      embedding: of the training images; without an uncertainty only the loss and the neighbours are scored.
      labels: as given.
      centres: of the classes, of length 1.
      truth: ``wrong`` and ``damaged`` [n] bool where known, and ``label``, the true labels.
      metric: of the run.
    """
    s = np.asarray(embedding.semantic, np.float64)
    similarity = s @ centres.T
    scores = {"loss": image_loss(similarity, labels), "neighbours": neighbour_disagreement(s, labels)}
    found: dict[str, float | None] = {}
    if embedding.uncertainty is not None:
        u = np.asarray(embedding.uncertainty, np.float64)
        length = np.linalg.norm(u, axis=1)
        members = other_members(labels, np.random.default_rng(0))
        betas = [np.linalg.norm(u[i] + u[some], axis=1) for i, some in enumerate(members)]
        scores |= {"u": length, "beta": np.array([b.mean() if len(b) else np.nan for b in betas])}
        if "label" in truth:
            differ = [truth["label"][some] != truth["label"][i] for i, some in enumerate(members)]
            found["wrong pairs"] = auroc(np.concatenate(betas), np.concatenate(differ))
        alpha = np.sqrt(np.maximum(2.0 - 2.0 * similarity, 0.0))
        relative = metric.form == "relative"
        factor = ism.gradient_factor(alpha, length[:, None], temperature=metric.temperature, relative=relative)
        own = np.zeros(similarity.shape, bool)
        own[np.arange(len(labels)), labels] = True
        found |= {"H own": float(np.mean(factor[own])), "H others": float(np.mean(factor[~own]))}
        found["length"] = float(length.mean())
    for name in TRUTHS:
        for score, values in scores.items():
            if name in truth:
                found[f"{name} {score}"] = auroc(np.nan_to_num(values), truth[name])
    return found


def truth_of(run: Run) -> dict[str, np.ndarray]:
    """What is known about the training images."""
    fields = run.splits.train.fields
    truth = {}
    if "wrong_label" in fields:
        truth |= {"wrong": fields["wrong_label"], "label": fields["true_label"]}
    if "ambiguity" in fields:
        truth["damaged"] = fields["ambiguity"] > 0
    return truth


def of_run(workdir: Path) -> dict[str, dict[str, float | None]]:
    """The values of every checkpoint, by epoch."""
    run = build(workdir_lib.read(workdir))
    train, truth = run.splits.train, truth_of(run)
    if not truth:
        sys.exit(f"{workdir}: nothing is known about its training images; needs data.label_noise or the glyphs")
    checkpoints = Checkpoints(workdir / "checkpoints", run.config.eval.best_metric, read_only=True)
    like, found = run.initial_state(), {}
    try:
        for step in sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()):
            state, _ = checkpoints.restore(step, like)
            embedded = run.evaluation(state.variables).embedder(train)
            if "proxies" in state.params:
                table = np.asarray(jax.device_get(state.params["proxies"]), np.float64)[: len(train.class_names)]
                centres = table / np.linalg.norm(table, axis=1, keepdims=True)
            else:
                centres = class_means(embedded.semantic, train.labels, len(train.class_names))
            epoch = step / run.sampler.steps_per_epoch
            found[f"{epoch:g}"] = detection(embedded.embedding, train.labels, centres, truth, metric_of(run.config))
    finally:
        checkpoints.close()
    return found


def table(rows: dict[str, list[dict[str, dict[str, float | None]]]]) -> list[str]:
    """One line per row, truth and epoch; mean and deviation over the runs."""
    columns = [*SCORES.values(), *FACTORS.values(), "mean length of u"]
    lines = [f"| row | found | epoch | runs | {' | '.join(columns)} |", "|---" * (len(columns) + 4) + "|"]
    for row, runs in rows.items():
        epochs = sorted({epoch for run in runs for epoch in run}, key=float)
        for truth, shown in TRUTHS.items():
            for epoch in epochs:
                values = [run[epoch] for run in runs if epoch in run and f"{truth} loss" in run[epoch]]
                if values:
                    names = [f"{truth} {score}" for score in SCORES] + [*FACTORS, "length"]
                    cells = [cell([v[n] for v in values if v.get(n) is not None]) for n in names]
                    lines.append(f"| {row} | {shown} | {epoch} | {len(values)} | {' | '.join(cells)} |")
    return lines


def cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+", help="of runs, at any depth")
    parser.add_argument("--again", action="store_true", help="compute stored values anew")
    given = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.ERROR)
    rows: dict[str, list[dict[str, dict[str, float | None]]]] = {}
    for folder in given.folder:
        for result in sorted(folder.rglob("result.json")):
            workdir, stored = result.parent, result.with_name(FILE)
            if given.again or not stored.exists():
                if not (workdir / "checkpoints").is_dir():
                    print(f"{workdir}: has no checkpoints any more; left out", file=sys.stderr)
                    continue
                values = of_run(workdir)
                stored.write_text(json.dumps(values, indent=1))
            below = workdir.parent.is_relative_to(folder) and workdir.parent != folder
            name = str(workdir.parent.relative_to(folder)) if below else folder.name
            rows.setdefault(name, []).append(json.loads(stored.read_text()))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
