"""Classification metrics by hand, against naive numpy, in batches with a padded tail."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idml_jax.metrics.classification import batch_sums, classification_metrics, finish


def naive(logits, labels):
    logits = np.asarray(logits, np.float64)
    probability = np.exp(logits - logits.max(1, keepdims=True))
    probability /= probability.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    order = np.argsort(-logits, axis=1)
    confidence, right = probability.max(1), order[:, 0] == labels
    ece = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return {
        "top1": right.mean(),
        "top5": np.mean([label in best[:5] for label, best in zip(labels, order, strict=True)]),
        "nll": -np.log(probability[rows, labels]).mean(),
        "ece": ece,
        "count": len(labels),
    }


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 16), st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_against_naive_with_a_padded_tail(size, seed, scale):
    rng = np.random.default_rng(seed)
    logits, labels = scale * rng.normal(size=(size, 7)).astype(np.float32), rng.integers(0, 7, size)
    filled = np.full((16, 7), np.nan, np.float32)  # whatever padding holds must not show
    filled[:size] = logits
    mask = np.arange(16) < size
    result = classification_metrics(filled, np.pad(labels, (0, 16 - size), constant_values=-1), mask)
    assert result == pytest.approx(naive(logits, labels), rel=1e-4, abs=1e-5)


def test_batches_add_up():
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(50, 10)).astype(np.float32), rng.integers(0, 10, 50)
    total = None
    for start in range(0, 64, 16):
        part = np.zeros((16, 10), np.float32), np.zeros(16, np.int32), np.zeros(16, bool)
        size = max(0, min(16, 50 - start))
        part[0][:size], part[1][:size], part[2][:size] = logits[start : start + 16], labels[start : start + 16], True
        sums = jax.jit(batch_sums)(*part)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    assert finish(total) == pytest.approx(classification_metrics(logits, labels), rel=1e-5)


def test_by_hand():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]]))
    result = classification_metrics(logits, [0, 1, 0, 1])
    assert result["top1"] == 0.5 and result["top5"] == 1.0 and result["count"] == 4
    assert result["nll"] == pytest.approx(-np.log([0.7, 0.5, 0.1, 0.3]).mean())
    assert result["ece"] == pytest.approx((0.3 + 0.5 + 0.8 + 0.6) / 4)
    assert all(type(value) in (float, int) for value in result.values())


def test_certainty_falls_into_the_last_bin():
    logits = np.array([[200.0, 0.0], [200.0, 0.0]])
    result = classification_metrics(logits, [0, 1])
    assert result["ece"] == pytest.approx(0.5)


def test_an_edge_belongs_to_the_bin_below():
    # Confidence 0.4 = 6/15 and 0.41: two bins with gaps 0.6 and 0.41 (in one bin they would partly cancel).
    logits = np.log(np.array([[0.4, 0.3, 0.3], [0.41, 0.3, 0.29]]))
    assert classification_metrics(logits, [0, 1])["ece"] == pytest.approx((0.6 + 0.41) / 2)


def test_a_constant_output_is_not_right():
    assert classification_metrics(np.zeros((4, 8)), [0, 1, 2, 3])["top1"] == 0
    assert classification_metrics(np.zeros((4, 8)), [0, 1, 2, 3])["top5"] == 0
    assert classification_metrics(np.full((4, 8), np.nan), [0, 1, 2, 3])["top1"] == 0


def test_low_precision_logits():
    result = classification_metrics(jax.numpy.asarray([[1.0, 0.0], [0.0, 2.0]], "bfloat16"), [0, 1])
    assert result["top1"] == 1 and result["nll"] == pytest.approx(np.log1p(np.exp([-1.0, -2.0])).mean(), rel=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((0, 3)), []), "logits: expected shape"),
        ((np.zeros(3), [0]), "logits: expected shape"),
        ((np.zeros((2, 3)), [0]), "labels: expected shape"),
        ((np.zeros((2, 3)), [0, 3]), "labels: expected 0 to 2"),
        ((np.zeros((2, 3)), [0, -1]), "labels: expected 0 to 2"),
        ((np.zeros((2, 3)), [0, 1], [True]), "mask: expected shape"),
        ((np.zeros((2, 3)), [0, 1], [False, False]), "mask: no row counts"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(*arguments)
