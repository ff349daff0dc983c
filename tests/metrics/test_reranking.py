"""Re-ranking and expansion against dense references of the published formulas."""

import numpy as np
import pytest

from idml_jax.metrics.reranking import Reciprocal, augmented, expanded, reciprocal


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def clouds(size, seed=0, classes=6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size)
    x = np.random.default_rng(9).normal(size=(classes, 6))[labels] + 0.8 * rng.normal(size=(size, 6))
    return unit(x.astype(np.float32)), labels


def dense(every, k1, k2, weight):
    """All distances after re-ranking [N, N], from the formulas with sets and dense vectors."""
    every = every.astype(np.float64)
    d = 1 - every @ every.T
    size = len(d)
    order = np.argsort(d - 10 * np.eye(size), axis=1, kind="stable")  # each row itself first
    near = lambda p, k: set(order[p, : k + 1].tolist())
    mutual = lambda p, k: {q for q in near(p, k) if p in near(q, k)}
    v = np.zeros((size, size))
    for p in range(size):
        members = mutual(p, k1)
        wide = set(members)
        for q in members:
            more = mutual(q, round(k1 / 2))
            if len(more & members) >= 2 / 3 * len(more):
                wide |= more
        for q in wide:
            v[p, q] = np.exp(-d[p, q])
    v /= v.sum(axis=1, keepdims=True)
    v = np.stack([v[order[p, :k2]].mean(axis=0) for p in range(size)])
    jaccard = np.asarray([[1 - np.minimum(a, b).sum() / np.maximum(a, b).sum() for b in v] for a in v])
    return (1 - weight) * jaccard + weight * d


@pytest.mark.parametrize("setting", [Reciprocal(), Reciprocal(5, 1, 0.0), Reciprocal(8, 3, 0.7), Reciprocal(100, 6)])
def test_k_reciprocal_against_the_dense_formulas(setting):
    x, _ = clouds(30 if setting.k1 > 69 else 70)
    k1 = min(setting.k1, len(x) - 1)
    wanted = dense(x, k1, setting.k2, setting.weight)
    np.fill_diagonal(wanted, np.inf)
    found = reciprocal(x, depth=25, setting=setting)
    np.testing.assert_allclose(found.distance, np.sort(wanted, axis=1)[:, :25], atol=2e-5)
    np.testing.assert_allclose(np.take_along_axis(wanted, found.index, axis=1), found.distance, atol=2e-5)
    # Queries beside a gallery, two of which are in the gallery themselves.
    if len(x) < 70:
        return
    own = np.full(20, -1)
    own[:2] = 3, 4
    queries, gallery = np.concatenate([x[[23, 24]], x[2:20]]), x[20:]
    found = reciprocal(queries, gallery, 10, own=own, setting=setting)
    every = np.concatenate([gallery, x[2:20]])
    wanted = dense(every, min(setting.k1, len(every) - 1), setting.k2, setting.weight)
    wanted = wanted[[3, 4, *range(50, 68)], :50]
    wanted[[0, 1], [3, 4]] = np.inf
    np.testing.assert_allclose(found.distance, np.sort(wanted, axis=1)[:, :10], atol=2e-5)


def test_expansion_and_augmentation_against_loops():
    (x, _), (gallery, _) = clouds(20), clouds(40, 1)
    got = expanded(x, gallery, 5, 2.0, own=np.r_[7, np.full(19, -1)])
    for i, q in enumerate(x):
        order = [j for j in np.argsort(-gallery @ q, kind="stable") if not (i == 0 and j == 7)][:5]
        wanted = unit(q + sum(max(0.0, gallery[j] @ q) ** 2 * gallery[j] for j in order))
        np.testing.assert_allclose(got[i], wanted, atol=1e-5)
    got = augmented(3 * gallery, 4)
    for i, q in enumerate(gallery):
        order = [j for j in np.argsort(-gallery @ q, kind="stable") if j != i][:4]
        wanted = unit(sum(w * gallery[j] for w, j in zip((5, 4, 3, 2, 1), [i, *order], strict=True)))
        np.testing.assert_allclose(got[i], wanted, atol=1e-5)
    np.testing.assert_allclose(augmented(gallery[:1]), gallery[:1], atol=1e-6)
    np.testing.assert_allclose(expanded(x[:1], gallery[:1], own=np.zeros(1, int)), x[:1], atol=1e-6)


def test_re_ranking_helps_where_classes_are_curves():
    x, labels = clouds(300, 3)
    before = labels[np.argsort(-(x @ x.T) + 10 * np.eye(300), axis=1)[:, :10]] == labels[:, None]
    after = labels[reciprocal(x).index] == labels[:, None]
    assert after.mean() > before.mean()


def test_wrong_settings_are_refused():
    x, _ = clouds(9)
    for call in (
        lambda: reciprocal(x, setting=Reciprocal(0)),
        lambda: reciprocal(x, setting=Reciprocal(4, 9)),
        lambda: reciprocal(x, setting=Reciprocal(weight=2)),
        lambda: reciprocal(x, depth=9),
        lambda: expanded(x, x, 0),
        lambda: expanded(x, x, alpha=-1),
        lambda: augmented(x, 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
