"""Orders of records: properties that hold for every size, seed, step and number of hosts."""

import collections
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idml_jax.data import pipeline, samplers, sources
from idml_jax.data.images import transforms
from idml_jax.errors import UserError

SEEDS = st.integers(0, 2**31 - 1)


@given(size=st.integers(1, 300), batch=st.integers(1, 64), seed=SEEDS, epoch=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_shuffled_epoch_holds_every_image_at_most_once(size, batch, seed, epoch):
    batch = min(batch, size)
    sampler = samplers.ShuffledSampler(size, batch, seed)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    seen = np.concatenate([sampler.batch(step) for step in steps])
    # Drop last: all but the remainder, none twice; without a remainder every image once.
    assert len(seen) == size - size % batch == len(np.unique(seen)) and seen.min() >= 0 and seen.max() < size


def test_what_one_shuffled_epoch_drops_comes_in_others():
    sampler = samplers.ShuffledSampler(21, 10, 0)
    seen = np.bincount(np.concatenate([sampler.batch(step) for step in range(200)]), minlength=21)
    assert seen.sum() == 2000 and seen.min() > 80


@st.composite
def balanced(draw):
    classes = draw(st.integers(2, 40))
    per_batch, per_class = draw(st.integers(1, classes)), draw(st.integers(2, 5))
    sizes = draw(st.lists(st.integers(1, 7), min_size=classes, max_size=classes))
    labels = np.repeat(np.arange(classes), sizes)
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(labels)
    return labels, per_batch, per_class, draw(SEEDS)


@given(balanced(), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_every_class_once_per_class_epoch_whatever_their_number(case, class_epoch):
    labels, per_batch, per_class, seed = case
    classes = labels.max() + 1
    sampler = samplers.BalancedSampler(labels, per_batch * per_class, per_class, seed)
    # All batches that touch three class-epochs in a row, somewhere in the run.
    first, last = class_epoch * classes // per_batch, -(-(class_epoch + 3) * classes // per_batch)
    drawn = [sampler.batch(step) for step in range(first, last)]
    order = np.concatenate([labels[batch][::per_class] for batch in drawn])[class_epoch * classes - first * per_batch :]
    for start in (0, classes, 2 * classes):
        np.testing.assert_array_equal(np.sort(order[start : start + classes]), np.arange(classes))
    sizes = np.bincount(labels)
    for batch in drawn:
        members = batch.reshape(per_batch, per_class)
        assert len(set(labels[members[:, 0]])) == per_batch
        for row in members:
            assert len(set(labels[row])) == 1
            # Without replacement as far as the class reaches, completed with replacement.
            assert len(set(row)) == min(per_class, sizes[labels[row[0]]])


def test_small_classes_are_completed_evenly():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    sampler = samplers.BalancedSampler(labels, 8, 4, 0)
    counts = collections.Counter(np.concatenate([sampler.batch(step) for step in range(600)]).tolist())
    for image, size in enumerate(np.bincount(labels)[labels]):
        assert counts[image] == pytest.approx(2400 / size, rel=0.08)


@given(balanced(), st.lists(st.integers(0, 400), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_a_function_of_seed_and_step(case, steps):
    """Whatever was asked for before: in any order, by any number of copies, the same records."""
    labels, per_batch, per_class, seed = case
    make = lambda: (
        samplers.BalancedSampler(labels, per_batch * per_class, per_class, seed),
        samplers.ShuffledSampler(len(labels), min(7, len(labels)), seed),
    )
    for one, other in zip(make(), make(), strict=True):
        forward = {step: one.batch(step).copy() for step in steps}
        for function in (samplers._random_order, samplers._class_order, samplers._class_block):
            function.cache_clear()
        for step in reversed(steps):
            np.testing.assert_array_equal(other.batch(step), forward[step])


def test_different_seeds_give_different_orders():
    labels = np.repeat(np.arange(10), 5)
    for make in (
        lambda seed: samplers.BalancedSampler(labels, 8, 2, seed),
        lambda seed: samplers.ShuffledSampler(50, 8, seed),
    ):
        batches = {tuple(make(seed).batch(0)) for seed in range(20)}
        assert len(batches) == 20


class Photographs:
    """A source of real JPEG bytes in memory, of several sizes."""

    def __init__(self, count):
        rng = np.random.default_rng(0)
        self.labels = np.arange(count, dtype=np.int32) % 6
        self.encoded = []
        for _ in range(count):
            height, width = rng.integers(40, 120, 2)
            small = rng.integers(0, 256, (6, 8, 3), np.uint8)
            picture = cv2.resize(small, (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
            self.encoded.append(cv2.imencode(".jpg", picture)[1].tobytes())

    def __len__(self):
        return len(self.encoded)

    def read(self, index):
        return self.encoded[index]

    def name(self, index):
        return f"photograph {index}"


TRANSFORMS = {
    "retrieval": transforms.create("retrieval", size=24, resize=28, rotation=9.0)[0],
    "imagenet": transforms.create("imagenet", size=24, resize=28)[0],
    "cifar": transforms.create("cifar", size=24, resize=28)[0],
}


@pytest.fixture(scope="module")
def photographs():
    return Photographs(47)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("balanced", [True, False])
def test_four_hosts_together_give_the_batches_of_one(photographs, name, balanced):
    """Through Grain, including images, for any number of threads and any start of a host."""
    sampler = (
        samplers.BalancedSampler(photographs.labels, 12, 3, 1) if balanced else samplers.ShuffledSampler(47, 12, 1)
    )

    def run(start, stop, seed=5, **options):
        reading = pipeline.Reading(TRANSFORMS[name], **{"prefetch": 3, **options})
        return list(pipeline.train_batches(photographs, sampler, reading, seed=seed, start=start, stop=stop))

    whole = run(0, 7, threads=3)
    hosts = [
        run(0, 7, host=0, hosts=4, threads=1),
        run(0, 7, host=1, hosts=4, threads=2),
        run(0, 3, host=2, hosts=4, threads=4) + run(3, 7, host=2, hosts=4, threads=4, prefetch=1),
        run(0, 7, host=3, hosts=4, threads=2, prefetch=7),
    ]
    assert len(whole) == 7 and all(len(part) == 7 for part in hosts)
    for step, batch in enumerate(whole):
        assert batch["image"].shape == (12, 24, 24, 3) and batch["image"].dtype == np.uint8
        for key in batch:
            together = np.concatenate([part[step][key] for part in hosts])
            np.testing.assert_array_equal(together, batch[key])
        np.testing.assert_array_equal(batch["label"], photographs.labels[batch["index"]])
    assert any(np.any(a["image"] != b["image"]) for a, b in zip(whole, run(0, 7, seed=6, threads=2), strict=True))


def test_worker_processes_give_the_same(image_folder):
    source = sources.scan_folder(image_folder / "train")
    sampler = samplers.BalancedSampler(source.labels, 16, 4, 2)
    reading = pipeline.Reading(TRANSFORMS["imagenet"], channels=3, hosts=4)
    run = lambda **more: list(
        pipeline.train_batches(source, sampler, replace(reading, **more), seed=3, start=2, stop=7)
    )
    for host, workers in ((3, 2),):
        for a, b in zip(run(host=host, workers=workers), run(host=host, threads=2), strict=True):
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


def test_hosts_must_divide_the_batch(photographs):
    sampler = samplers.ShuffledSampler(47, 10, 0)
    with pytest.raises(UserError, match=r"config.batch_size \(10\) must be a multiple of the 4 hosts"):
        reading = pipeline.Reading(TRANSFORMS["cifar"], host=0, hosts=4)
        next(pipeline.train_batches(photographs, sampler, reading, seed=0, start=0, stop=1))


def test_a_damaged_photograph_is_named_in_training(photographs):
    damaged = Photographs(12)
    damaged.encoded[5] = damaged.encoded[5][:-200]
    sampler = samplers.ShuffledSampler(12, 12, 0)
    with pytest.raises(UserError, match=r"^photograph 5: not a readable image \(.*truncated"):
        reading = pipeline.Reading(TRANSFORMS["retrieval"])
        list(pipeline.train_batches(damaged, sampler, reading, seed=0, start=0, stop=1))
