"""Search off the origin, among duplicates and among collapsed rows, against brute force in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idml_jax.ism import Embedding, Metric
from idml_jax.metrics import introspective, nearest, retrieval

WIDTH, ROWS = 8, 48  # one shape, so that few programs are compiled


def squares(a, b):
    return np.sum(np.square(a[:, None].astype(np.float64) - b[None].astype(np.float64)), axis=-1)


def brute_force(queries, gallery, k, own):
    distances = squares(queries, gallery)
    distances[np.arange(len(queries))[own >= 0], own[own >= 0]] = np.inf
    index = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.sqrt(np.take_along_axis(distances, index, axis=1)), index


def rows_of(seed, kind):
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(ROWS, WIDTH))
    if kind == "collapsed":  # unit rows that a network has drawn to one point
        rows = rng.normal(size=WIDTH) + 1e-5 * noise
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    elif kind == "clusters":
        rows = rng.normal(size=(4, WIDTH))[rng.integers(0, 4, ROWS)] + 1e-6 * noise
    elif kind == "outlier":
        rows = 0.05 * noise
        rows[rng.integers(ROWS)] += 1e5
    elif kind == "whole":  # whole numbers: many equal distances
        rows = rng.integers(0, 3, (ROWS, WIDTH)) + 1000.0
    else:
        rows = kind + 0.05 * noise
    rows = rows.astype(np.float32)
    if rng.random() < 0.5:
        rows[rng.integers(0, ROWS, ROWS // 3)] = rows[0]
    return rows


KINDS = st.sampled_from([0.0, 30.0, 1e3, "collapsed", "clusters", "outlier", "whole"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), KINDS, st.sampled_from([1, 5, 40]), st.sampled_from(["same", "gallery", "own"]))
def test_neighbours_are_those_of_float64_in_the_order_of_their_distances(seed, kind, k, mode):
    rows = rows_of(seed, kind)
    queries, gallery, own = rows, None, np.arange(ROWS)
    if mode != "same":
        queries, gallery = rows_of(seed, kind)[::-1] + np.float32(0), rows
        own = np.full(ROWS, -1) if mode == "gallery" else np.arange(ROWS)[::-1].copy()
    found = retrieval.neighbours(queries, gallery, k, own=own if mode == "own" else None)
    distance, index = brute_force(queries, rows, k, own)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.distance, distance.astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 30.0, 1e3, "collapsed", "whole"]))
def test_retrieval_metrics_off_the_origin(seed, kind):
    rows, labels = rows_of(seed, kind), np.random.default_rng(seed).integers(0, 6, ROWS)
    got = retrieval.retrieval_ranks(rows, labels)
    distances = squares(rows, rows)
    np.fill_diagonal(distances, np.inf)
    same = (labels[:, None] == labels[None]) & ~np.eye(ROWS, dtype=bool)
    # The rounding that the ranks may suffer: of the spread, not of the length of the rows.
    slack = 1e-5 * np.square(np.linalg.norm(rows - np.median(rows, axis=0), axis=1).max())
    for i in np.flatnonzero(same.any(axis=1)):
        nearest_hit = distances[i][same[i]].min()
        low = np.sum(distances[i] < nearest_hit - slack) + 1
        high = np.sum(distances[i] <= nearest_hit + slack)
        assert low <= got.first_hit[i] <= high


def test_blobs_far_from_the_origin_are_told_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), 8)
    rows = rng.normal(size=(6, WIDTH))[labels] + 0.01 * rng.normal(size=(ROWS, WIDTH))
    for offset in (0.0, 30.0, 1e3):
        metrics = retrieval.retrieval_metrics((rows + offset).astype(np.float32), labels, ks=(1,))
        assert metrics["R@1"] == metrics["RP"] == metrics["MAP@R"] == 1


def test_the_introspective_ranking_does_not_depend_on_the_origin():
    rng = np.random.default_rng(0)
    labels, u = rng.integers(0, 6, ROWS), rng.normal(size=(ROWS, 4)).astype(np.float32)
    rows = np.round(0.05 * rng.normal(size=(ROWS, WIDTH)) * 2**14) / 2**14  # what float32 still holds at 1000
    by = lambda x: introspective.ranks_by_metric(Metric(), Embedding(x.astype(np.float32), u), labels)
    near = by(rows)
    for offset in (30.0, 1000.0):
        np.testing.assert_array_equal(by(rows + offset).first_hit, near.first_hit)
        np.testing.assert_allclose(by(rows + offset).average_precision, near.average_precision)


def test_the_centre_moves_near_rows_without_rounding_and_leaves_centred_rows_alone():
    rng = np.random.default_rng(0)
    assert not nearest.centre(rng.normal(size=(100, 4)).astype(np.float32)).any()
    rows = (1000 + rng.normal(size=(100, 4))).astype(np.float32)
    origin = nearest.centre(rows)
    assert np.array_equal((rows - origin).astype(np.float64), rows.astype(np.float64) - origin)
    whole = rng.integers(10, 13, (100, 4)).astype(np.float32)
    assert np.array_equal(nearest.centre(whole), np.round(nearest.centre(whole)))
    huge = np.full((3, 2), 5e18, np.float32)
    assert np.isfinite(nearest.moved(huge)[0][1]).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_few_rows(rows):
    points = 30 + np.arange(rows, dtype=np.float32)[:, None]
    found = retrieval.neighbours(points, points, rows)
    np.testing.assert_array_equal(found.index[0], np.arange(rows))
