"""Folders of links into Tiny ImageNet: disjoint classes for retrieval, and the same training classes for pretraining.

    python benchmarks/experiments/tiny_folders.py --source=data/tinyimagenet32 --out=data --images=100

Every second class in sorted order, starting with the first, is a training class; the others are test classes.
``tiny_retrieval`` has ``train/`` (``--images`` images per class) and ``test/`` (the 50 validation images of the test
classes); ``tiny_classes`` has all 500 images of the training classes, and their validation images as ``test/``.
"""

import argparse
from pathlib import Path


def link(source: Path, target: Path, images: int | None = None) -> int:
    target.mkdir(parents=True, exist_ok=True)
    chosen = sorted(source.iterdir())[:images]
    for path in chosen:
        if not (target / path.name).exists():
            (target / path.name).symlink_to(path.resolve())
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100, help="training images of a class, for retrieval")
    arguments = parser.parse_args()
    classes = sorted(path.name for path in (arguments.source / "train").iterdir())
    count = {}
    for name, split, folder, chosen, images in (
        ("tiny_retrieval", "train", "train", classes[0::2], arguments.images),
        ("tiny_retrieval", "test", "val", classes[1::2], None),
        ("tiny_classes", "train", "train", classes[0::2], None),
        ("tiny_classes", "test", "val", classes[0::2], None),
    ):
        for wnid in chosen:
            made = link(arguments.source / folder / wnid, arguments.out / name / split / wnid, images)
            count[name, split] = count.get((name, split), 0) + made
    for (name, split), images in count.items():
        print(f"{arguments.out / name / split}: {images} images")


if __name__ == "__main__":
    main()
