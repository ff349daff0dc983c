"""The metric in closed form: exactness, shrinkage, rank, and the choice on held-out classes."""

import numpy as np
import pytest

from idml_jax.metrics.class_folds import Candidate, best_of, fold_classes, held_out_scores
from idml_jax.metrics.closed_form import METHODS, ClosedForm, moments, statistics, unit_rows


def drawn(classes=8, per_class=30, width=6, seed=0):
    """Features [n, d] whose classes share one covariance that is not round, and labels [n]."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width))
    labels = np.repeat(np.arange(classes), per_class)
    means = rng.normal(size=(classes, width)) * 2 + 5
    return means[labels] + rng.normal(size=(len(labels), width)) @ mix, labels


def chunks(rows, labels, size=37):
    return [(rows[i : i + size], labels[i : i + size]) for i in range(0, len(rows), size)]


def form_of(rows, labels, **options):
    return ClosedForm(statistics(moments(chunks(rows, labels), int(labels.max()) + 1)), **options)


def covariances(rows, labels):
    """Within-class (unbiased) and total covariance, written out."""
    centred = np.concatenate([rows[labels == c] - rows[labels == c].mean(0) for c in np.unique(labels)])
    return centred.T @ centred / (len(rows) - len(np.unique(labels))), np.cov(rows.T, bias=True)


def test_statistics_are_those_written_out():
    rows, labels = drawn()
    found = statistics(moments(chunks(rows + 1e3, labels), 8))
    within, total = covariances(rows, labels)
    np.testing.assert_allclose(found.within, within, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.share * found.within + found.between.T @ found.between, total, atol=1e-8)
    np.testing.assert_allclose(found.mean, rows.mean(0) + 1e3)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_whitened_covariance_within_classes(shrinkage):
    rows, labels = drawn()
    within, total = covariances(rows, labels)
    kernel = form_of(rows, labels).whiten(shrinkage, 6).kernel
    shrunk = within + shrinkage * np.trace(within) / 6 * np.eye(6)
    np.testing.assert_allclose(kernel.T @ shrunk @ kernel, np.eye(6), atol=1e-9)
    white = kernel.T @ total @ kernel  # its axes are principal axes, the largest first
    np.testing.assert_allclose(white, np.diag(np.sort(np.diag(white))[::-1]), atol=1e-9)
    narrow = form_of(rows, labels).whiten(shrinkage, 2)
    np.testing.assert_allclose(narrow.kernel, kernel[:, :2], atol=1e-9)


def test_total_whitening_and_lda():
    rows, labels = drawn(classes=4)
    _, total = covariances(rows, labels)
    kernel = form_of(rows, labels).pca(0.0, 6).kernel
    np.testing.assert_allclose(kernel.T @ total @ kernel, np.eye(6), atol=1e-9)
    lda = form_of(rows, labels).lda(0.1, 6)
    assert lda.used == 3 and not lda.kernel[:, 3:].any()  # classes - 1
    many = form_of(*drawn(classes=8)).lda(0.1, 6)  # more classes than dimensions: the other way to the same axes
    assert many.used == 6


def test_embeddings():
    rows, labels = drawn()
    found = form_of(rows, labels).whiten(0.1, 3)
    expected = (rows - rows.mean(0)) @ found.kernel
    np.testing.assert_allclose(found(rows), expected / np.linalg.norm(expected, axis=1, keepdims=True))
    uncentred = ClosedForm(statistics(moments(chunks(rows, labels), 8, unit=True)), centre=False).whiten(0.1, 3)
    np.testing.assert_allclose(uncentred(rows), uncentred(unit_rows(rows)), atol=1e-12)  # the length does not matter


def test_more_dimensions_than_images():
    rows, labels = drawn(classes=3, per_class=4, width=50)
    for method in METHODS:
        found = form_of(rows, labels).project(method, 0.3, 40)
        assert np.isfinite(found.kernel).all() and found.used <= 11 and not found.kernel[:, 11:].any()
    with pytest.raises(ValueError, match="has rank 9 of 50"):
        form_of(rows, labels).whiten(0.0, 5)


def test_lone_classes_and_duplicates():
    rows, labels = drawn()
    lone, more = np.vstack([rows, rows[:1] + 9]), np.append(labels, 8)
    one, other = statistics(moments(chunks(rows, labels), 8)), statistics(moments(chunks(lone, more), 9))
    assert (one.lone, other.lone) == (0, 1)
    np.testing.assert_allclose(one.within, other.within)
    np.testing.assert_allclose(other.mean, lone.mean(0))
    twice = statistics(moments(chunks(np.vstack([rows, rows]), np.append(labels, labels)), 8))
    np.testing.assert_allclose(twice.mean, one.mean)
    with pytest.raises(ValueError, match="no class has two images"):
        statistics(moments(chunks(rows[::30], np.arange(8)), 8))
    with pytest.raises(ValueError, match="all images of a class have the same"):
        statistics(moments(chunks(rows[labels * 30], labels), 8))
    broken = rows.copy()
    broken[41, 2] = np.nan
    with pytest.raises(ValueError, match="row 41"):
        moments(chunks(broken, labels), 8)


def test_folds():
    counts = np.array([3, 1, 2, 5, 2, 4, 1, 2, 6, 2])
    fold_of = fold_classes(counts, 4, seed=1)
    assert sorted(set(fold_of)) == [0, 1, 2, 3]
    assert min(np.bincount(fold_of[counts > 1])) >= 2
    assert (fold_of == fold_classes(counts, 4, seed=1)).all()
    assert set(fold_classes(np.array([2, 2, 2, 1]), 4, 0)) == {0}  # too few to hold some out


def test_choice_is_of_the_candidate_that_does_best_on_held_out_classes():
    # Nine of ten dimensions are the same noise in all classes; the features' own distance is drowned in it.
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 10)
    noise = rng.normal(size=(120, 10)) * np.append(np.full(9, 5.0), 0.3)
    rows = (noise + np.outer(labels * 1.0, np.eye(10)[9])).astype(np.float32)
    sums = moments(chunks(rows, labels), 12, fold_classes(np.bincount(labels), 3, 0))
    grid = [Candidate("whiten", shrinkage, 4) for shrinkage in (1000.0, 0.01)]
    scores = held_out_scores(sums, labels, lambda some: rows[some], [Candidate("zero_shot"), *grid])
    assert best_of(scores, "whiten", "MAP@R") == grid[1]
    assert scores[grid[1]]["MAP@R"] > scores[Candidate("zero_shot")]["MAP@R"] + 0.2
    # What is held out is not learned from.
    fold = 0
    some = sums.fold_of[labels] != fold
    kept = np.unique(labels[some])
    direct = statistics(moments(chunks(rows[some], np.searchsorted(kept, labels[some])), len(kept)))
    by_fold = statistics(sums, np.arange(3) != fold)
    np.testing.assert_allclose(by_fold.within, direct.within, atol=1e-9)
    np.testing.assert_allclose(by_fold.mean, direct.mean, atol=1e-9)
