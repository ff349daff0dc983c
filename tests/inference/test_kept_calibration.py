"""Calibrations that the commands keep: the same as new ones, for the same images and settings only."""

import dataclasses
import io

import chex
import jax
import numpy as np
import pytest

from idml_jax.inference import kept_calibration
from idml_jax.ism import Metric
from idml_jax.metrics import calibration
from idml_jax.metrics.calibration import HeldOut
from idml_jax.metrics.embedded import Embedded
from idml_jax.runtime import compiled


def held_out(several=False, classes=12):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 6)
    vectors = rng.normal(size=(classes, 8))[labels] + 0.9 * rng.normal(size=(len(labels), 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    sets = np.stack([labels, np.full_like(labels, -1)], axis=1) if several else None
    ids = np.asarray([f"image {i}" for i in range(len(labels))], object)
    return HeldOut(Embedded(vectors, labels, rng.normal(size=(len(labels), 3)).astype(np.float32), sets=sets, ids=ids))


@pytest.fixture
def fits(monkeypatch, tmp_path):
    """Counts fits in a process that is a command."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    monkeypatch.setattr(compiled, "_ours", True)
    made = []

    def of(found, metric=Metric(), names=None, balanced=False):  # noqa: B008 (immutable)
        def fit():
            made.append(1)
            known = calibration.answer(found, metric, balanced=balanced)
            return calibration.fit(known, names)

        return kept_calibration.kept(found, metric, names or (), (True, balanced), fit)

    return of, made


@pytest.mark.parametrize("several", [False, True])
def test_a_kept_calibration_is_the_one_that_was_fitted(fits, several):
    of, made = fits
    first, second = of(held_out(several)), of(held_out(several))
    assert len(made) == 1 and (first.open is None) == several
    assert second.setting == first.setting and second.model.names == first.model.names
    chex.assert_trees_all_equal(first, second)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert getattr(one, "dtype", type(one)) == getattr(other, "dtype", type(other))


def test_whatever_it_depends_on_makes_another(fits):
    of, made = fits
    base = held_out()
    of(base)
    queries = base.queries
    nearby = queries.semantic.copy()
    nearby[0, 0] = np.nextafter(nearby[0, 0], 2)
    others = [
        base._replace(queries=queries._replace(semantic=nearby)),
        base._replace(queries=queries._replace(labels=queries.labels[::-1].copy())),
        base._replace(queries=queries._replace(uncertainty=None)),
        base._replace(gallery=queries, own=np.arange(len(queries.labels))),
    ]
    for other in others:
        of(other)
    of(base, metric=dataclasses.replace(Metric(), temperature=4.0))
    of(base, names=("margin_2", "margin_10"))
    of(base, balanced=True)
    assert len(made) == len(others) + 4
    of(base)
    assert len(made) == len(others) + 4


def test_a_damaged_file_is_replaced(fits, tmp_path):
    of, made = fits
    first = of(held_out())
    (file,) = (tmp_path / "idml_jax" / "calibrations").iterdir()
    whole = file.read_bytes()
    for content in (b"", b"not an archive", whole[: len(whole) // 2], whole[:-100] + b"\0" * 100):
        file.write_bytes(content)
        chex.assert_trees_all_equal(of(held_out()).doubt, first.doubt)
    assert len(made) == 5 and of(held_out()).setting == first.setting and len(made) == 5
    with np.load(io.BytesIO(whole)) as arrays:
        parts = {name: arrays[name] for name in arrays.files}
    wrong = ({"model.names": np.asarray([], str)}, {"model.names": np.asarray("x")}, {"doubt": parts["doubt"][1:]})
    for number, change in enumerate(wrong, 6):
        np.savez(file, **{**parts, **change})
        chex.assert_trees_all_equal(of(held_out()).doubt, first.doubt)
        assert len(made) == number


def test_only_commands_keep_and_only_where_they_may(fits, monkeypatch, tmp_path):
    of, made = fits
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
    of(held_out())
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    monkeypatch.setattr(compiled, "_ours", False)  # a program of the user's own
    of(held_out())
    assert len(made) == 2 and not list(tmp_path.iterdir())
    monkeypatch.setattr(compiled, "_ours", True)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    of(held_out())
    assert len(made) == 3
