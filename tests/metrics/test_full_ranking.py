"""Metrics of the whole ranking against loops and pytorch-metric-learning."""

import numpy as np
import pytest

from idml_jax.metrics.full_ranking import (
    Groups,
    average_precision,
    class_recall,
    precision_at,
    rank_all,
    summarise,
)
from idml_jax.metrics.retrieval import retrieval_metrics, retrieval_ranks


def naive(x, labels, gallery=None, gallery_labels=None, groups=None):
    """Per query the sorted list of hits, and nothing else."""
    same_set = gallery is None
    rows, row_labels = (x, labels) if same_set else (gallery, gallery_labels)
    hits = []
    for i, query in enumerate(np.asarray(x, np.float64)):
        keep = np.ones(len(rows), bool)
        if same_set:
            keep[i] = False
        if groups is not None:
            mine, others = groups.queries, groups.queries if same_set else groups.gallery
            keep &= ~((row_labels == labels[i]) & (others == mine[i]))
        squared = np.sum((np.asarray(rows, np.float64)[keep] - query) ** 2, axis=1)
        hits.append((row_labels[keep] == labels[i])[np.argsort(squared, kind="stable")])
    return hits


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["one set", "gallery", "groups", "gallery with groups"])
def test_against_loops(kind, ties):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 90)
    labels[0] = 77  # a lone query
    x = rng.normal(size=(90, 4)) + 0.7 * rng.normal(size=(78, 4))[labels]
    x = (np.round(x) if ties else x).astype(np.float32)
    cameras = np.asarray(["left", "right", "top"])[rng.integers(0, 3, 90)]
    args, groups = (x, labels), Groups(cameras) if "groups" in kind else None
    if "gallery" in kind:
        args = x[:30], labels[:30], x[30:], labels[30:]
        groups = groups and Groups(cameras[:30], cameras[30:])
    found = rank_all(*args, groups=groups)
    hits = naive(*args, groups=groups)
    for i, row in enumerate(hits):
        np.testing.assert_array_equal(found.ranks[found.starts[i] : found.starts[i + 1]], np.flatnonzero(row) + 1)
    assert (found.found == [len(row) for row in hits]).all()
    for k in (1, 5, 1000):
        np.testing.assert_allclose(precision_at(found, k), [row[:k].mean() for row in hits])
    precision = [np.cumsum(row) / np.arange(1, len(row) + 1) for row in hits]
    wanted = [p[row].mean() if row.any() else np.nan for row, p in zip(hits, precision, strict=True)]
    np.testing.assert_allclose(average_precision(found), wanted)
    report = summarise(found, (1, 3), cmc=True)
    some = [row for row in hits if row.any()]
    assert report["CMC@3"] == pytest.approx(np.mean([row[:3].any() for row in some]))
    assert report["CMC_queries"] == len(some) < len(hits)
    assert report["mAP"] == pytest.approx(np.nanmean(wanted)) and set(report) >= {"P@1", "P@3", "CMC@1"}
    if groups is None:
        np.testing.assert_array_equal(found.first_hit, retrieval_ranks(*args).first_hit)
    by_class = class_recall(found)
    assert sum(row.queries for row in by_class) == len(args[0])
    assert [row.recall for row in by_class] == sorted(row.recall for row in by_class)
    total = sum(row.recall * row.queries for row in by_class)
    assert total == pytest.approx(sum(bool(len(row)) and bool(row[0]) for row in hits))
    if groups is None:
        assert total / len(hits) == pytest.approx(retrieval_metrics(*args)["R@1"])


def test_wrong_groups_are_refused():
    x, labels = np.eye(4, dtype=np.float32), np.zeros(4)
    for groups, message in (
        (Groups(np.zeros(3)), "groups.queries"),
        (Groups(np.zeros(4), np.zeros(4)), "groups.gallery"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_all(x, labels, groups=groups)
    with pytest.raises(ValueError, match="text"):
        rank_all(x, labels, x, labels, groups=Groups(np.zeros(4), np.asarray(["a"] * 4)))
