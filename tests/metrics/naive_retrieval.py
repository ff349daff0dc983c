"""Retrieval metrics one query at a time, in float64 numpy: the reference that the tests compare with."""

import numpy as np


def naive_ranks(embeddings, labels, gallery=None, gallery_labels=None):
    """Columns as in `retrieval.Ranks`."""
    same_set = gallery is None
    if same_set:
        gallery, gallery_labels = embeddings, labels
    rows = []
    for i, query in enumerate(np.asarray(embeddings, np.float64)):
        keep = np.arange(len(gallery)) != i if same_set else np.full(len(gallery), True)
        squared = np.sum((np.asarray(gallery, np.float64)[keep] - query) ** 2, axis=1)
        hits = (np.asarray(gallery_labels)[keep] == labels[i])[np.argsort(squared, kind="stable")]
        r = int(hits.sum())
        nearest = np.sqrt(squared.min())
        if r == 0:
            rows.append((0, False, np.nan, np.nan, 0, nearest))
            continue
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        average = np.sum(precision[:r] * hits[:r]) / r
        rows.append((int(np.argmax(hits)) + 1, bool(hits[0]), hits[:r].mean(), average, r, nearest))
    return [np.array(column) for column in zip(*rows, strict=True)]


def naive_metrics(embeddings, labels, gallery=None, gallery_labels=None, ks=(1, 2, 4, 8)):
    first, _, r_precision, average, positives, _ = naive_ranks(embeddings, labels, gallery, gallery_labels)
    found = positives > 0
    result = {f"R@{k}": np.mean(found & (first <= k)) for k in ks}
    result["RP"] = r_precision[found].mean() if found.any() else np.nan
    result["MAP@R"] = average[found].mean() if found.any() else np.nan
    result["MRR"] = np.sum(1 / first[found]) / len(first)
    return {**result, "queries": len(first), "lone_queries": int(np.sum(~found))}
