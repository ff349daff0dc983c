"""Splits and counts of the complete benchmarks, and descriptions of incomplete sets."""

from collections.abc import Mapping
from typing import NamedTuple


class Count(NamedTuple):
    """Number of images and classes of a split."""

    images: int
    classes: int


class Benchmark(NamedTuple):
    """Properties of a data set that are known before its files are read.

    Attributes:
      title: full name.
      splits: counts of the complete set by split name.
      train_classes: if the protocol splits by class number, the last class number for training.
      shared_classes: whether test images show the classes of the training images (classification).
      tfds_names: names of the tfds sets with the same images.
      group: pattern whose first group, in the name of an image's file, is the camera: a query does not find images of
        its class and camera.
    """

    title: str
    splits: Mapping[str, Count]
    train_classes: int | None = None
    shared_classes: bool = False
    tfds_names: tuple[str, ...] = ()
    group: str = ""


BENCHMARKS: dict[str, Benchmark] = {
    "cub": Benchmark(
        "CUB-200-2011",
        {"train": Count(5864, 100), "test": Count(5924, 100)},
        train_classes=100,
        tfds_names=("caltech_birds2011",),
    ),
    "cars": Benchmark(
        "Cars196",
        {"train": Count(8054, 98), "test": Count(8131, 98)},
        train_classes=98,
        tfds_names=("cars196",),
    ),
    "sop": Benchmark(
        "Stanford Online Products",
        {"train": Count(59551, 11318), "test": Count(60502, 11316)},
        tfds_names=("stanford_online_products",),
    ),
    "inshop": Benchmark(
        "In-shop Clothes Retrieval",
        {"train": Count(25882, 3997), "query": Count(14218, 3985), "gallery": Count(12612, 3985)},
    ),
    # The gallery with its distractors (one class) and without its junk images.
    "market": Benchmark(
        "Market-1501",
        {"train": Count(12936, 751), "query": Count(3368, 750), "gallery": Count(15913, 751)},
        group=r"_c(\d+)",
    ),
    "inaturalist": Benchmark(
        "iNaturalist 2018 for retrieval",
        {"train": Count(325846, 5690), "test": Count(136093, 2452)},
    ),
    "cifar10": Benchmark(
        "CIFAR-10",
        {"train": Count(50000, 10), "test": Count(10000, 10)},
        shared_classes=True,
        tfds_names=("cifar10",),
    ),
    "cifar100": Benchmark(
        "CIFAR-100",
        {"train": Count(50000, 100), "test": Count(10000, 100)},
        shared_classes=True,
        tfds_names=("cifar100",),
    ),
    "imagenet": Benchmark(
        "ImageNet-1K",
        {"train": Count(1281167, 1000), "validation": Count(50000, 1000)},
        shared_classes=True,
        tfds_names=("imagenet2012",),
    ),
}


def differences(dataset: str, found: Mapping[str, Count]) -> list[str]:
    """Describes how the counts of a set differ from those of the complete set.

    Args:
      dataset: key of ``BENCHMARKS``; other names have no expected counts.
      found: counts by split. ImageNet may lack its validation split (train-only).

    Returns:
      One phrase per difference, e.g. ``train: 5,863 of 5,864 images``; empty if the set is complete.
    """
    if dataset not in BENCHMARKS:
        return []
    expected = BENCHMARKS[dataset].splits
    phrases = []
    for split, wanted in expected.items():
        if split not in found:
            if not (dataset == "imagenet" and split == "validation"):
                phrases.append(f"{split}: missing")
            continue
        for what in ("images", "classes"):
            have, want = getattr(found[split], what), getattr(wanted, what)
            if have != want:
                phrases.append(f"{split}: {have:,} of {want:,} {what}")
    return phrases
