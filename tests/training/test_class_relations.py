"""Hierarchies of classes and matrices of related classes: the loss of a run, its doors, and what is refused."""

import csv
import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_made import small_config
from test_runtime import objective

from idml_jax import ism, losses
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.losses.class_relation import ClassRelation, levels_of_names
from idml_jax.runtime import sharding
from idml_jax.training import data_record, train, workdir
from idml_jax.training.config import default_config
from idml_jax.training.tasks.class_relations import matrix_from, relation_of
from idml_jax.training.tasks.matrices import related
from idml_jax.training.tasks.terms import Term

NAMES = ["cat/lion", "cat/lynx", "dog/fox", "owl"]
LABELS = jnp.array([0, 0, 1, 1, 2, 2, 3, 3])


def embeddings(n=8):
    keys = jax.random.split(jax.random.key(0))
    return Embedding(ism.l2_normalize(jax.random.normal(keys[0], (n, 8))), 0.3 * jax.random.normal(keys[1], (n, 4)))


@pytest.mark.parametrize("name", ["proxy_anchor", "sup_con", "soft_triple"])
def test_the_loss_is_the_sum_over_the_levels(name):
    relation = ClassRelation(levels=levels_of_names(NAMES, "/"), weights=(0.25, 0.75))
    rule = objective(loss=name, num_classes=4)
    leveled = dataclasses.replace(rule, relation=relation)
    embedding, params = embeddings(), jax.jit(rule.init)(jax.random.key(1))
    mask = jnp.arange(8) < 7  # the last image is padding

    def alone(classes):
        """The loss where classes of one number are one class; proxies keep their places."""
        if name == "sup_con":
            return rule(params, embedding, classes[LABELS], mask=mask)
        centres = rule.centres
        columns = jnp.repeat(classes, centres)
        pairs = losses.pairs_from_labels(classes[LABELS], columns)
        pairs = losses.Pairs(*(x & mask[:, None] for x in pairs))
        proxies = ism.l2_normalize(params["proxies"].reshape(-1, rule.dim))
        matrix = rule.metric.similarity(embedding, Embedding(proxies, None))
        return losses.LOSSES[name].function(matrix, pairs)

    found = jax.jit(lambda: leveled(params, embedding, LABELS, mask=mask))()
    families, species = jnp.array([0, 0, 1, 2]), jnp.arange(4)
    expected = 0.25 * alone(families) + 0.75 * alone(species)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(float(found) - float(alone(species))) > 1e-3


def test_levels_over_eight_devices_and_a_memory_are_those_of_one():
    relation = ClassRelation(levels=levels_of_names(NAMES, "/"), weights=(0.5, 0.5))
    terms = (Term("contrastive"), Term("proxy_anchor"))
    rule = objective(loss="contrastive", num_classes=4, memory_size=16, terms=terms, relation=relation)
    mesh = sharding.data_mesh()
    split = dataclasses.replace(rule, rows=mesh)
    embedding, params = embeddings(), jax.jit(rule.init)(jax.random.key(1))
    store = rule.remember(rule.init_memory(), embeddings(), LABELS[::-1])
    value = lambda rule: jax.value_and_grad(lambda e: rule(params, e, LABELS, store=store, step=3))
    (one, gradient), (eight, of_eight) = jax.jit(lambda e: (value(rule)(e), value(split)(e)))(embedding)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-6), gradient, of_eight)


def write(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_related_classes_are_one_class_for_what_teaches_u():
    """Negatives that are stopped, the log term and the confusion read the relation, as the loss does."""
    matrix = np.eye(4, dtype=np.int8)
    matrix[0, 1] = matrix[1, 0] = 1
    labels, merged = jnp.array([0, 1, 2, 3, 2, 3, 2, 3]), jnp.array([0, 0, 2, 3, 2, 3, 2, 3])
    remedies = {"negatives": "stop", "attenuation": 0.5, "prior": 0.1, "prior_by": "confusion"}
    plain = objective(loss="sup_con", num_classes=4, **remedies)
    whole = dataclasses.replace(plain, relation=ClassRelation(matrix=matrix))

    @jax.jit
    def found(embedding):
        value = lambda rule, labels: jax.value_and_grad(lambda e: rule({}, e, labels))(embedding)
        confusions = whole.confusion({}, embedding, labels), plain.confusion({}, embedding, merged)
        return value(whole, labels), value(plain, merged), confusions

    one, two, confusions = found(embeddings())
    chex.assert_trees_all_close(one, two, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(*confusions, rtol=1e-5)
    assert np.linalg.norm(one[1].uncertainty, axis=1)[:2].min() > 1e-4


def test_related_at_some_level():
    pairs = lambda positive: losses.Pairs(jnp.array([positive]) > 0, jnp.array([positive]) == 0)
    levels = pairs([1, 1, 0]), pairs([1, 0, 0])
    found = related(pairs([1, 0, 0]), levels)
    assert found.positive.tolist() == [[True, True, False]]
    assert found.negative.tolist() == [[False, False, True]]
    assert related(levels[0], ()) is levels[0]


def test_a_run_finds_its_relation_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = default_config()
    config.loss.relation = "rel.csv"
    workdir.remember(config, tmp_path / "run")
    workdir.remember(config, tmp_path / "run")  # the same settings
    assert workdir.read(tmp_path / "run").loss.relation == str(tmp_path / "here" / "rel.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds a run with other settings: config.loss.relation"):
        workdir.remember(config, tmp_path / "run")


def test_a_matrix_of_classes_says_positive_negative_or_neither(tmp_path):
    path = write(tmp_path / "r.csv", [["", "b", "a", "c", "x"], ["a", "", "1", "0", ""], ["b", "1", "", "0", ""],
                                      ["c", "0", "0", "1", ""], ["x", "", "", "", "1"]])  # fmt: skip
    matrix = matrix_from(path, ["a", "b", "c"])
    np.testing.assert_array_equal(matrix, [[1, -1, 0], [-1, 1, 0], [0, 0, 1]])
    valid = losses.pairs_from_labels(jnp.arange(3))
    (pairs,) = ClassRelation(matrix=matrix).pairs(valid, jnp.arange(3), jnp.arange(3))
    assert not pairs.positive.any()  # an image is no positive of itself
    np.testing.assert_array_equal(pairs.negative, [[0, 0, 1], [0, 0, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    "rows,message",
    [
        ([["", "a", "b"], ["a", "1", "0"]], "1 of 2 training classes are missing from its lines, such as b"),
        ([["", "a"], ["a", "1"], ["b", "0"]], "missing from its columns, such as b"),
        ([["", "a", "b"], ["a", "1", "0"], ["b", "1", "1"]], "related in one way"),
        ([["", "a", "b"], ["a", "1", "x"], ["b", "x", "1"]], "a and b have 'x'; a cell is 1"),
        ([["", "a", "b"], ["a", "0", "0"], ["b", "0", "1"]], "a is not related to itself"),
        ([["", "a", "b"], ["a", "1"], ["b", "0", "1"]], "line 2 has 2 cells, the first line 3"),
        ([["", "a", "b"], ["a", "1", "0"], ["a", "1", "0"]], "line 3 has the class a a second time"),
        ([["", "a", "a"], ["a", "1", "0"]], "the class a twice"),
        ([], "needs a line of class names"),
    ],
)
def test_a_wrong_matrix_is_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        matrix_from(write(tmp_path / "r.csv", rows), ["a", "b"])


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"loss.levels": "|"}, r"no class has '\|' in its name"),
        ({"loss.levels": "/", "loss.level_weights": (1.0,)}, "one number for each of the 2 levels"),
        ({"loss.levels": "/", "loss.level_weights": (0.0, 0.0)}, "one of them must be above 0"),
        ({"loss.levels": "/", "loss.level_weights": (1.0, -1.0)}, "finite numbers of at least 0"),
        ({"loss.level_weights": (1.0, 1.0)}, "level_weights needs config.loss.levels"),
        ({"loss.levels": "/", "loss.relation": "r.csv"}, "give one"),
        ({"loss.relation": "missing.csv"}, "missing.csv.*cannot be read"),
        ({"loss.relation": "r.csv", "loss.level_weights": (1.0,)}, "level_weights is for config.loss.levels"),
        ({"loss.name": "cosface", "loss.class_share": 0.5, "loss.levels": "/"}, "class_share draws classes"),
        ({"task": "classification", "loss.levels": "/"}, "is for config.task = 'retrieval'"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        relation_of(small_config("x", **changes), NAMES)
    with pytest.raises(UserError, match="the class 'cat/' has an empty level"):
        relation_of(small_config("x", **{"loss.levels": "/"}), ["cat/", "cat/lion"])


def test_a_run_with_levels_trains_and_is_not_resumed_with_another_relation(image_folder, tmp_path):
    table = [["path", "label", "split"]]
    for part in ("train", "test"):
        for file in sorted((image_folder / part).glob("*/*")):
            kind = "even" if int(file.parent.name[-1]) % 2 else "odd"
            table.append([file.relative_to(image_folder), f"{kind}/{file.parent.name}", part])
    root = write(image_folder / "levels.csv", table)
    config = small_config(root, **{"epochs": 1, "max_steps": 2, "optim.warmup_epochs": 0, "loss.levels": "/"})
    config.eval.untrained, config.model.semantic_init = False, "random"
    result = train.train_and_evaluate(config, tmp_path / "run")
    assert np.isfinite(result["final"]["R@1"])
    run = train.build(config)
    names = list(run.splits.train.class_names)
    assert run.setup.objective.relation.levels.shape == (len(names), 2) and run.relation
    other = write(tmp_path / "r.csv", [["", *names], *([a, *("1" if a == b else "" for b in names)] for a in names)])
    config = small_config(root, **{"loss.relation": str(other)})
    before = train.build(config).relation
    write(other, [["", *names], *([a, *("1" if a == b else "0" for b in names)] for a in names)])
    assert train.build(config).relation != before
    with pytest.raises(UserError, match="the relation of the classes"):
        data_record.check(run.splits, tmp_path / "run", relation=before)
