"""Agreement with pytorch-metric-learning's AccuracyCalculator on data without ties."""

import numpy as np
import pytest

from idml_jax.metrics.clustering import ami, nmi
from idml_jax.metrics.full_ranking import precision_at, rank_all, summarise
from idml_jax.metrics.retrieval import retrieval_metrics

REASON = "PyTorch and pytorch-metric-learning are not installed (extra 'parity')"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("pytorch_metric_learning", reason=REASON)
from pytorch_metric_learning.distances import LpDistance  # noqa: E402
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # noqa: E402
from pytorch_metric_learning.utils.inference import CustomKNN  # noqa: E402

pytestmark = pytest.mark.torch
NAMES = {
    "R@1": "precision_at_1",
    "RP": "r_precision",
    "MAP@R": "mean_average_precision_at_r",
    "MRR": "mean_reciprocal_rank",
}


def calculator(include, **options):
    return AccuracyCalculator(include=include, knn_func=CustomKNN(LpDistance(normalize_embeddings=False)), **options)


def blobs(seed, size, classes, spread):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size)
    centres = np.random.default_rng(99).normal(size=(classes, 24))
    return (centres[labels] + spread * rng.normal(size=(size, 24))).astype(np.float32), labels


def assert_agree(ours, theirs):
    # They leave lone queries out everywhere; here R@K and MRR count them as misses.
    seen = (ours["queries"] - ours["lone_queries"]) / ours["queries"]
    theirs = {name: theirs[column] * (seen if name in ("R@1", "MRR") else 1) for name, column in NAMES.items()}
    assert {name: ours[name] for name in NAMES} == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("size, classes", [(300, 60), (1200, 150), (900, 9)])
def test_same_set(size, classes):
    rows, labels = blobs(0, size, classes, 1.5)
    # Their reciprocal rank sees k neighbours only, so it is asked for with all of them.
    theirs = calculator(tuple(NAMES.values()), k=size - 1).get_accuracy(rows, labels)
    assert_agree(retrieval_metrics(rows, labels), theirs)


def test_query_and_gallery():
    queries, gallery = blobs(1, 200, 40, 1.5), blobs(2, 700, 40, 1.5)
    theirs = calculator(tuple(NAMES.values()), k=700).get_accuracy(*queries, *gallery)
    assert_agree(retrieval_metrics(*queries, *gallery), theirs)


def test_average_precision_over_all_ranks():
    rows, labels = blobs(4, 200, 20, 1.5)
    theirs = calculator(("mean_average_precision", "precision_at_1"), k=None).get_accuracy(rows, labels)
    found = rank_all(rows, labels)
    some = np.diff(found.starts) > 0  # they leave lone queries out
    assert summarise(found, (1,))["mAP"] == pytest.approx(theirs["mean_average_precision"], abs=1e-6)
    assert precision_at(found, 1)[some].mean() == pytest.approx(theirs["precision_at_1"], abs=1e-6)


def test_clusters():
    _, labels = blobs(3, 1000, 30, 1.0)
    clusters = np.where(np.random.default_rng(0).random(1000) < 0.6, labels, 7)
    accuracy = calculator(("NMI", "AMI"))
    assert nmi(labels, clusters) == pytest.approx(accuracy.calculate_NMI(labels, clusters), abs=1e-9)
    assert ami(labels, clusters) == pytest.approx(accuracy.calculate_AMI(labels, clusters), abs=1e-9)
