"""The vote of the nearest images, and the search that hides classes, against naive loops."""

import numpy as np
import pytest

from idml_jax.metrics import density, uncertainty, visible, vote
from idml_jax.metrics.embedded import Embedded, scores_of
from idml_jax.metrics.vote import Vote


def data(n=60, classes=5, d=4, seed=0):
    """Unequal classes around shared centres, with copies, ties and two lone classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    rows = np.random.default_rng(9).normal(size=(classes, d))[labels] + 0.6 * rng.normal(size=(n, d))
    rows[7], rows[8] = rows[3], rows[3]
    labels[7] = (labels[3] + 1) % classes
    labels[[10, 11]] = classes, classes + 1
    return rows.astype(np.float32), labels


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def naive_order(rows, i, seen):
    distance = np.linalg.norm(rows[i].astype(np.float64) - rows.astype(np.float64), axis=1)
    return sorted(seen, key=lambda j: (distance[j], j))


@pytest.mark.parametrize("tile", [2**22, 200])
def test_hidden_classes_are_not_found(tile, monkeypatch):
    monkeypatch.setattr(visible, "_TILE", tile)
    monkeypatch.setattr(visible, "_GATHERED", tile)
    rows, labels = data()
    own = np.where(np.arange(60) % 4, np.arange(60), -1)
    hidden = np.column_stack([labels, (labels + 1) % 5])
    found = visible.nearest_of_other_classes(rows, hidden, rows + 50, labels, 6, own=own)
    sizes = visible.visible_rows(hidden, labels, own)
    for i in range(60):
        seen = [j for j in range(60) if j != own[i] and labels[j] not in hidden[i]]
        assert sizes[i] == len(seen)
        distance = np.linalg.norm(rows[i].astype(np.float64) - (rows + 50).astype(np.float64), axis=1)
        assert found.index[i].tolist() == sorted(seen, key=lambda j: (distance[j], j))[:6]
        np.testing.assert_allclose(found.distance[i], distance[found.index[i]], rtol=1e-6)
    with pytest.raises(ValueError, match="the rows that every query sees"):
        visible.nearest_of_other_classes(rows, hidden, rows, labels, 59)


@pytest.mark.parametrize("setting", [Vote(7, 8.0), Vote(20, 30.0, balanced=True), Vote(1, 0.0)])
def test_votes_and_scores_are_those_of_loops(setting):
    rows, labels = data()
    own = np.arange(60)
    found = uncertainty.nearest_twenty(rows)
    ballot = vote.cast(rows, rows, labels, found, setting, own)
    scores = scores_of(Embedded(rows, labels), setting=setting)
    shares = []
    for i in range(60):
        order = naive_order(rows, i, [j for j in range(60) if j != i])
        weights = {}
        for j in order[: setting.k]:
            weight = np.exp(setting.temperature * cosine(rows[i], rows[j]))
            if setting.balanced:
                weight /= sum(labels[j] == labels[other] for other in range(60) if other != i)
            weights[labels[j]] = weights.get(labels[j], 0.0) + weight
        share = {c: w / sum(weights.values()) for c, w in weights.items()}
        shares.append(share)
        answer = labels[order[0]]
        assert ballot.winner[i] == max(share, key=lambda c: (round(share[c], 9), -list(share).index(c)))
        assert ballot.share_of(labels)[i] == pytest.approx(share.get(labels[i], 0.0))
        assert ballot.share[i][ballot.first[i]].sum() == pytest.approx(1.0)
        rival = max([s for c, s in share.items() if c != answer], default=0.0)
        assert scores["vote_share"][i] == pytest.approx(np.log((1 - share[answer] + 0.01) / (share[answer] + 0.01)))
        assert scores["vote_rival"][i] == pytest.approx(np.log((rival + 0.01) / (share[answer] + 0.01)))
        assert scores["agreement"][i] == pytest.approx(np.mean(labels[order[: setting.k]] != answer))
        other = next(j for j in order if labels[j] != answer)
        margin = cosine(rows[i], rows[other]) - cosine(rows[i], rows[order[0]])
        assert scores["class_margin"][i] == pytest.approx(margin, abs=1e-6)
        near = naive_order(rows, order[0], [j for j in range(60) if j not in (i, order[0])])
        dense = cosine(rows[order[0]], rows[near[9]]) - cosine(rows[i], rows[order[0]])
        assert scores["answer_density"][i] == pytest.approx(dense, abs=1e-6)
    lone = np.asarray([np.sum(labels == c) == 1 for c in labels])
    assert lone.sum() == 2
    quality = vote.accuracy(ballot, labels, labels, lone)
    best = [sorted(s, key=lambda c, s=s: (-round(s[c], 9), list(s).index(c))) for s in shares]
    assert quality["top1"] == pytest.approx(np.mean([b[0] == c for b, c in zip(best, labels, strict=True)]))
    assert quality["top5"] == pytest.approx(np.mean([c in b[:5] for b, c in zip(best, labels, strict=True)]))
    terms = [0.99 * s.get(c, 0) + 0.01 / 7 for s, c, alone in zip(shares, labels, lone, strict=True) if not alone]
    assert quality["nll"] == pytest.approx(-np.mean(np.log(terms)))
    gap, top = 0.0, np.asarray([s[b[0]] for s, b in zip(shares, best, strict=True)])
    right = np.asarray([b[0] == c for b, c in zip(best, labels, strict=True)])
    for number in range(15):
        inside = (top > number / 15) & (top <= (number + 1) / 15 + 1e-12)
        gap += abs(np.sum(right[inside] - top[inside])) / 60
    assert quality["ece"] == pytest.approx(gap, abs=1e-6)


def test_deep_margins_look_beyond_the_twenty_nearest_and_not_at_an_absent_class():
    rng = np.random.default_rng(0)
    # 40 of one class close together, then one of a class that is taken away, then others far off.
    rows = np.concatenate([rng.normal(0, 0.01, (40, 3)), rng.normal(0.1, 0.01, (2, 3)), rng.normal(1, 0.1, (30, 3))])
    rows = np.add(rows, np.eye(3)[0]).astype(np.float32)
    labels = np.repeat([0, 1, 2], [40, 2, 30])
    query, absent = rows[40:41], np.asarray([1])
    found = visible.nearest_of_other_classes(query, absent[:, None], rows, labels, 20)
    assert (labels[found.index] == 0).all()
    margin = vote.label_scores(query, rows, labels, found, absent=absent)["class_margin"][0]
    nearest_two = max((j for j in range(72) if labels[j] == 2), key=lambda j: -np.linalg.norm(rows[j] - query[0]))
    expected = cosine(query[0], rows[nearest_two]) - cosine(query[0], rows[found.index[0, 0]])
    assert margin == pytest.approx(expected, abs=1e-6)
    # Every row of the other class is the query's own: there is no rival.
    own = np.asarray([40])
    few, names = rows[:41], np.asarray([0] * 40 + [1])
    near = uncertainty.nearest_twenty(query, few, own=own)
    assert vote.label_scores(query, few, names, near, own=own)["class_margin"][0] == pytest.approx(
        -1 - cosine(query[0], few[near.index[0, 0]])
    )
    assert "class_margin" not in vote.label_scores(query, few[:40], names[:40], near)
    assert density.density_score(query, few[:5], names[:5], uncertainty.nearest_twenty(query, few[:5])) == {}


def test_unanimous_votes_are_equal_whatever_the_distances():
    rows = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    labels = np.zeros(200, int)
    setting = Vote(k=7, temperature=3.0)
    scores = scores_of(Embedded(rows[200:], labels[:100]), Embedded(rows[:200], labels), setting=setting)
    assert len(np.unique(scores["vote_share"])) == len(np.unique(scores["vote_rival"])) == 1
    # Of two classes with equal votes the nearest image's wins.
    found = uncertainty.nearest_twenty(rows[200:], rows[:200])
    ballot = vote.cast(rows[200:], rows[:200], np.arange(200) % 2, found, Vote(k=20, temperature=0.0))
    equal = np.isclose(ballot.share[:, 0], 0.5)
    assert equal.any()
    np.testing.assert_array_equal(ballot.winner[equal], ballot.labels[equal, 0])


def test_settings():
    rows, labels = data()
    found = uncertainty.nearest_twenty(rows)
    with pytest.raises(ValueError, match="k from 1 on"):
        vote.cast(rows, rows, labels, found, Vote(0))
    setting = vote.chosen(rows, labels, rows, labels, found)
    right = labels[found.index[:, 0]] == labels
    quality = lambda s: uncertainty.r_auroc(-vote.cast(rows, rows, labels, found, s).share[:, 0], right)
    tried = [quality(Vote(k, t)) for k in vote.NEIGHBOURS for t in vote.TEMPERATURES]
    assert quality(setting) == max(tried)
    assert vote.chosen(rows, np.zeros(60, int), rows, np.ones(60, int), found) == Vote()


def test_a_balanced_vote_does_not_favour_large_classes():
    # Nine images of a large class around one of a small class; the query lies on the latter.
    rows = np.concatenate([np.eye(2)[[0]], np.tile([[0.8, 0.6]], (9, 1))]).astype(np.float32)
    labels = np.asarray([1] + [0] * 9)
    query = np.asarray([[0.99, 0.1]], np.float32)
    found = uncertainty.nearest_twenty(query, rows)
    assert vote.cast(query, rows, labels, found, Vote(10, 5.0)).winner == 0
    assert vote.cast(query, rows, labels, found, Vote(10, 5.0, balanced=True)).winner == 1
    assert vote.chosen(query, np.asarray([1]), rows, labels, found, balanced=True).balanced
