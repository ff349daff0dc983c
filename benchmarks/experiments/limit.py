"""Estimates, for a trained run, an upper bound on any uncertainty that depends on the image alone.

    python benchmarks/experiments/limit.py --workdir=runs/experiments/B/omniglot/ism+mixup/seed0

Logistic regression on the pooled feature, and on u, is fitted on the right and wrong answers of half of the TEST
classes and evaluated on the other half, so it has more information than a fair method. The same is done for the scores
of the answer, which use the gallery. Results are means over six random halves, in both directions.
"""

import argparse

import jax
import numpy as np

from idml_jax.data import pipeline
from idml_jax.inference import model as trained
from idml_jax.metrics import retrieval, uncertainty
from idml_jax.metrics.confidence import confidence, fit_confidence
from idml_jax.metrics.embedded import Embedded, scores_of
from idml_jax.metrics.introspective import LEARNED
from idml_jax.models import EmbeddingModel
from idml_jax.training import build as run_lib
from idml_jax.training import config as config_lib
from idml_jax.training import steps


def across_classes(scores, correct, labels, ridge):
    """R-AUROC of a model that is fitted on half of the classes and evaluated on the others."""
    classes, rng, values = np.unique(labels), np.random.default_rng(0), []
    for _ in range(6):
        half = np.isin(labels, rng.permutation(classes)[: len(classes) // 2])
        for known, asked in ((half, ~half), (~half, half)):
            model = fit_confidence({k: v[known] for k, v in scores.items()}, correct[known], ridge)
            doubt = 1 - confidence(model, {k: v[asked] for k, v in scores.items()})
            values.append(uncertainty.r_auroc(doubt, correct[asked]))
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    model = trained.load(parser.parse_args().workdir)
    built = run_lib.build(model.config)
    setup, source = built.setup, built.splits.test

    @jax.jit
    def embed(variables, images):
        features = setup.model.apply(
            variables, steps.normalize(images, setup.mean, setup.std), False, method=EmbeddingModel.features
        )
        heads = {"params": {"heads": variables["params"]["heads"]}}
        return features, setup.model.apply(heads, features, method=EmbeddingModel.embed)

    parts = []
    reading = pipeline.Reading(built.test_transform, channels=model.config.data.channels, threads=2)
    for batch in pipeline.eval_batches(source, reading, batch_size=128):
        parts.append(jax.tree.map(np.asarray, embed(model.variables, batch["image"])))
    features = np.concatenate([f for f, _ in parts])[: len(source)]
    out = {k: np.concatenate([o[k] for _, o in parts])[: len(source)] for k in parts[0][1]}
    taught = config_lib.learns_uncertainty(model.config)
    embedded = Embedded(out["semantic"], source.labels, out["uncertainty"] if taught else None, out["semantic_norm"])
    correct = retrieval.retrieval_ranks(embedded.semantic, embedded.labels).nearest_correct
    scores = scores_of(embedded, None, model.metric)
    columns = lambda x: {str(i): column for i, column in enumerate(x.T)}
    direction = features / np.linalg.norm(features, axis=1, keepdims=True)
    print(f"R@1 {correct.mean():.3f}, {len(correct)} queries")
    rows = {
        "feature, its direction": (columns(direction), 100.0),
        "feature": (columns(features), 100.0),
        **({"u": (columns(out["uncertainty"]), 100.0)} if taught else {}),
        "baseline scores of the answer": ({k: v for k, v in scores.items() if k not in LEARNED}, 1.0),
        "all scores of the answer": (scores, 1.0),
    }
    for name, (some, ridge) in rows.items():
        print(f"{name:28s} {across_classes(some, correct, source.labels, ridge):.3f}", flush=True)


if __name__ == "__main__":
    main()
