"""Mean directions of the classes and the scores from them, against naive loops."""

import numpy as np
import pytest

from idml_jax.metrics import class_means, uncertainty, visible
from idml_jax.metrics.label_errors import own_class_cosines


def data(n=60, classes=6, d=5, seed=0):
    """Unequal classes, one of a single row."""
    rng = np.random.default_rng(seed)
    labels = 3 * rng.choice(classes, n, p=np.arange(1, classes + 1) / 21)
    rows = np.random.default_rng(9).normal(size=(16, d))[labels] + 0.8 * rng.normal(size=(n, d))
    labels[10] = 100
    return rows.astype(np.float32), labels


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def mean_of(rows, labels, label, left_out):
    """The mean of the unit rows of a class without one of them; None if none remain."""
    chosen = [row / np.linalg.norm(row) for i, row in enumerate(rows) if labels[i] == label and i != left_out]
    return np.mean(chosen, axis=0) if chosen else None


@pytest.mark.parametrize("tile", [2**22, 40])
@pytest.mark.parametrize("case", ["own", "not own", "absent", "some own"])
def test_scores_are_those_of_loops(case, tile, monkeypatch):
    monkeypatch.setattr(class_means, "_TILE", tile)
    rows, labels = data()
    exact = rows.astype(np.float64)
    own = np.arange(60) if case != "some own" else np.where(np.arange(60) % 2, np.arange(60), -1)
    own = None if case == "not own" else own
    absent = labels if case == "absent" else None
    hidden = np.zeros((60, 0), int) if absent is None else absent[:, None]
    found = visible.nearest_of_other_classes(rows, hidden, rows, labels, 5, own=own)
    scores = class_means.mean_scores(rows, rows, labels, found, own, absent=absent)
    for i in range(60):
        answer, left_out = labels[found.index[i, 0]], -1 if own is None else own[i]
        near = cosine(exact[i], mean_of(exact, labels, answer, left_out))
        others = [c for c in set(labels) - {answer} if absent is None or c != absent[i]]
        means = [mean for c in others if (mean := mean_of(exact, labels, c, left_out)) is not None]
        assert scores["mean_distance"][i] == pytest.approx(1 - near, abs=1e-5)
        assert scores["mean_margin"][i] == pytest.approx(max(cosine(exact[i], m) for m in means) - near, abs=1e-5)


def test_few_classes():
    rows, _ = data()
    found = uncertainty.nearest_twenty(rows)
    one = class_means.mean_scores(rows, rows, np.zeros(60, int), found, np.arange(60))
    assert set(one) == {"mean_distance"}
    # The only image of the other class is the query itself: there is no rival.
    two = class_means.mean_scores(rows, rows, np.eye(60, dtype=int)[3], found, np.arange(60))
    assert two["mean_margin"][3] == pytest.approx(-1 - (1 - two["mean_distance"][3]))
    assert (two["mean_margin"][:3] > -2).all()


def test_cosines_to_the_others_of_a_class():
    rows, labels = data()
    found = own_class_cosines(rows, labels)
    assert np.flatnonzero(np.isnan(found)).tolist() == [10]
    assert found[0] == pytest.approx(cosine(rows[0].astype(float), mean_of(rows, labels, labels[0], 0)), abs=1e-6)
    means = class_means.class_means(rows, labels)
    assert means.labels.tolist() == sorted(set(labels.tolist())) and means.sizes.sum() == 60
    place = means.codes[0]
    expected = mean_of(rows, labels, labels[0], -1)
    np.testing.assert_allclose(means.directions[place], expected / np.linalg.norm(expected), atol=1e-6)
