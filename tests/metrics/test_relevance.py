"""Several labels per image, groups, and queries in the gallery, against definitions written out."""

import numpy as np
import pytest

from idml_jax.losses import pairs_from_label_sets
from idml_jax.metrics import relevance, retrieval
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.summary import full_report, retrieval_report

RNG = np.random.default_rng(0)
SEMANTIC = RNG.normal(size=(24, 4)).astype(np.float32)
SETS = np.stack([RNG.integers(0, 4, 24), RNG.integers(4, 7, 24)], axis=1)
SETS[::3, 1] = -1
GROUPS = RNG.integers(0, 3, 24)


def naive(queries, rows, relevant, hidden):
    """R@1, RP, MAP@R and mAP."""
    found = []
    for query in range(len(queries)):
        distance = np.linalg.norm(rows - queries[query], axis=1)
        order = [row for row in np.argsort(distance, kind="stable") if not hidden[query, row]]
        hits = np.asarray([relevant[query, row] for row in order])
        count = int(hits.sum())
        if not count:
            continue
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        near = slice(0, count)
        found.append(
            [hits[0], hits[near].mean(), (precision * hits)[near].sum() / count, (precision * hits).sum() / count]
        )
    return dict(zip(("R@1", "RP", "MAP@R", "mAP"), np.mean(found, axis=0), strict=True))


def sharing(one, other):
    return np.asarray([[bool(set(a[a >= 0]) & set(b[b >= 0])) for b in other] for a in one])


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_as_defined(gallery, groups):
    whole = Embedded(SEMANTIC, SETS[:, 0], sets=SETS, groups=GROUPS if groups else None, ids=np.arange(24))
    of = lambda rows: Embedded(*(None if x is None else x[rows] for x in whole))
    queries, searched = (of(np.arange(8)), of(np.arange(5, 24))) if gallery else (whole, None)
    side = whole if searched is None else searched
    same = sharing(queries.sets, side.sets)
    hidden = queries.ids[:, None] == side.ids[None, :]
    if groups:
        hidden |= same & (queries.groups[:, None] == side.groups[None, :])
    expected = naive(queries.semantic, side.semantic, same, hidden)
    found = retrieval_report(queries, (1, 2), searched)
    lone = found["lone_queries"] / found["queries"]
    expected["R@1"] *= 1 - lone  # a lone query is a miss
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    assert ("CMC@1" in found) == groups
    report, warnings = full_report(queries, searched, ks=(1, 2))
    assert report["R@1"] == found["R@1"] and "left out" in warnings[-1] and "NMI" not in report


def test_one_label_per_image_is_the_ordinary_case():
    labels = RNG.integers(0, 5, 24)
    plain = retrieval.retrieval_metrics(SEMANTIC, labels, ks=(1, 2))
    special = relevance.short_report(Embedded(SEMANTIC, labels, sets=labels[:, None]), None, (1, 2))
    assert {name: pytest.approx(value, nan_ok=True) for name, value in plain.items()} == {n: special[n] for n in plain}
    assert not relevance.is_special(Embedded(SEMANTIC, labels, ids=np.arange(24)))


def test_relation_of_several_labels():
    found = pairs_from_label_sets(SETS)
    expected = sharing(SETS, SETS) & ~np.eye(24, dtype=bool)
    np.testing.assert_array_equal(found.positive, expected)
    np.testing.assert_array_equal(found.negative, ~expected & ~np.eye(24, dtype=bool))
    proxies = pairs_from_label_sets(SETS, np.arange(7))
    np.testing.assert_array_equal(proxies.positive, sharing(SETS, np.arange(7)[:, None]))
