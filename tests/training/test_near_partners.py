"""``sharding.partners=near``: partners of Mixup and CutMix that devices need not exchange whole batches for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs_made import small_config
from test_runtime import batch, objective, setup, tiny
from test_runtime import fresh as fresh_of

from idml_jax import mixing
from idml_jax.data.samplers import BalancedSampler, ShuffledSampler
from idml_jax.errors import UserError
from idml_jax.runtime import sharding
from idml_jax.training import steps, train, workdir
from idml_jax.training.tasks.softmax_loss import Softmax

partners = lambda n, per_class=1: np.asarray(mixing.near_rows(np.arange(n), per_class))


@pytest.mark.parametrize("n,per_class", [(16, 1), (48, 4), (40, 2), (120, 4), (12, 4)])
def test_partners_are_a_permutation_of_few_hops_onto_other_classes(n, per_class):
    found, own = partners(n, per_class), np.arange(n)
    assert sorted(found) == list(own)
    assert np.all((found - own) % n <= per_class**2)
    assert np.all(found // per_class != own // per_class) and np.all(found != own)
    # The images of a class meet different classes, and are themselves the partners of different classes.
    wanted = min(per_class, n // per_class - 1)
    for direction in (found, np.argsort(found)):
        classes = (direction // per_class).reshape(-1, per_class)
        assert {len(set(row)) for row in classes} == {wanted}
    if n > 2 and n // per_class > 2 * per_class:
        assert np.all(found[found] != own)  # no two images are each other's partners


def test_over_many_batches_every_image_meets_every_other_alike():
    shuffled = ShuffledSampler(8, 8, seed=0)
    met = np.zeros((8, 8))
    for step in range(420):
        records = shuffled.batch(step)
        np.add.at(met, (records, records[partners(8)]), 1)
    assert np.all(np.diag(met) == 0)
    others = met[~np.eye(8, dtype=bool)]
    assert np.abs(others - 60).max() < 5 * np.sqrt(60)
    labels = np.arange(24) // 4
    balanced = BalancedSampler(labels, 12, 2, seed=0)
    met = np.zeros((24, 24))
    for step in range(300):
        records = balanced.batch(step)
        np.add.at(met, (records, records[partners(12, 2)]), 1)
    same = labels[:, None] == labels[None]
    assert np.all(met[same] == 0)
    assert np.abs(met[~same] - 7.5).max() < 5.5 * np.sqrt(7.5)


def transfers(compiled):
    """Kind and number of rows of all transfers of images between devices in a program."""
    found = re.findall(r"= u8\[(\d+),[\d,]*\]\S* (all-gather|all-to-all|collective-permute)", compiled.as_text())
    return [(kind, int(rows)) for rows, kind in found]


@pytest.mark.parametrize("n,per_class", [(64, 1), (160, 4), (120, 4)])
def test_a_device_needs_few_images_of_others_and_their_number_changes_nothing(n, per_class):
    images = np.random.default_rng(0).integers(0, 256, (n, 2, 2, 1)).astype(np.uint8)
    place = NamedSharding(sharding.data_mesh(), PartitionSpec("data"))
    program = lambda near: jax.jit(
        lambda x, drawn: mixing.with_partners(x, drawn, near)[1], in_shardings=(place, None), out_shardings=place
    )
    compiled = program(per_class).lower(images, np.arange(n)).compile()
    sent = transfers(compiled)
    assert {kind for kind, _ in sent} == {"collective-permute"}
    assert sum(rows for _, rows in sent) <= per_class**2 * (per_class + 1) // 2
    np.testing.assert_array_equal(
        compiled(jax.device_put(images, place), jnp.arange(n)), images[partners(n, per_class)]
    )
    if per_class == 1:
        assert transfers(program(0).lower(images, np.arange(n)).compile()) == [("all-gather", n)]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["mixup", "cutmix"])
def test_the_whole_step_sends_few_images(what):
    changes = {"objective": Softmax(4, False, mixing="cutmix"), "mixup_alpha": 0.0} if what == "cutmix" else {}
    model = tiny(frozen=True)
    s = setup(model, near=1, **{"objective": objective()} | changes)
    if what == "cutmix":
        from idml_jax.models import EmbeddingModel
        from idml_jax.models.heads import ClassifierHead

        s = setup(EmbeddingModel(model.trunk, ClassifierHead(4, 4)), near=1, **changes)
    mesh = sharding.data_mesh()
    state = sharding.replicate(fresh_of(s), mesh)
    data = sharding.shard_batch({k: np.asarray(v) for k, v in batch(64).items()}, mesh)
    assert transfers(steps.jit_train_step.lower(state, data, setup=s).compile()) == [("collective-permute", 1)]


def test_an_older_run_keeps_its_partners(tmp_path):
    """Runs of before this setting existed drew partners from the whole batch."""
    stored = small_config(tmp_path).to_dict()
    workdir.write_json(tmp_path / "config.json", stored)
    assert workdir.read(tmp_path).sharding.partners == "near"
    del stored["sharding"]["partners"]
    workdir.write_json(tmp_path / "config.json", stored)
    assert workdir.read(tmp_path).sharding.partners == "any"


def test_settings_reach_the_step(image_folder):
    of = lambda **changes: train.build(small_config(image_folder, **changes)).setup.near
    assert of() == 1 and of(**{"loss.name": "contrastive"}) == 4
    assert of(**{"sharding.partners": "any"}) == 0
    with pytest.raises(UserError, match=r"config.sharding.partners = 'far'; known: any, near"):
        of(**{"sharding.partners": "far"})
