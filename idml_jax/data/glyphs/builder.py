"""The built-in data set `glyphs`: characters of many scripts and faces, with the true ambiguity of every image.

A tfds builder that needs neither a download nor TensorFlow:

    builder = glyphs.prepare("~/data")
    records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
"""

import contextlib
import dataclasses
import io
import itertools
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.utils import tqdm_utils

from idml_jax.data.files import expand
from idml_jax.data.glyphs import draw as glyphs_draw
from idml_jax.data.glyphs import examples
from idml_jax.data.glyphs.examples import Series

KINDS = glyphs_draw.KINDS
_SPLITS = ("train", "test")


@dataclasses.dataclass(eq=False, kw_only=True)
class GlyphsConfig(tfds.core.BuilderConfig):
    """The parameters of a variant of the set. A custom config needs a `name` that is not taken.

    Attributes:
      train_classes: number of characters in the train split.
      test_classes: number of characters in the test split, none of which is in train.
      images_per_class: number of images per character.
      image_size: width and height of an image in pixels, at least 16.
      seed: seed of the choice of characters and of every image, >= 0.
      degraded: share in [0, 1] of images that are not clean, in both splits.
      train_degraded: the share in the train split, if it differs; below 0: ``degraded``. A larger share degrades more
        of the same images.

    Raises:
      ValueError: if a value is out of range.
    """

    train_classes: int = 300
    test_classes: int = 200
    images_per_class: int = 20
    image_size: int = 32
    seed: int = 0
    degraded: float = 0.3
    train_degraded: float = -1.0

    def __post_init__(self) -> None:
        # A blend needs a second class in its split.
        for field, least in (("train_classes", 2), ("test_classes", 2), ("images_per_class", 1), ("image_size", 16)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if not 0 <= self.degraded <= 1:
            raise ValueError(f"degraded is a share in [0, 1], got {self.degraded}.")
        if not self.train_degraded <= 1:
            raise ValueError(f"train_degraded is a share in [0, 1], or below 0, got {self.train_degraded}.")

    def share_of(self, split: str) -> float:
        """The share of images of a split that are not clean."""
        return self.train_degraded if split == "train" and self.train_degraded >= 0 else self.degraded

    def parameters(self) -> dict[str, int | float]:
        """All parameters that the images depend on, by name; one at its default that earlier sets lack is left out."""
        unnamed = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
        if self.train_degraded < 0:
            unnamed.add("train_degraded")
        return {key: value for key, value in vars(self).items() if key not in unnamed}


def choose_classes(config: GlyphsConfig) -> dict[str, list[int]]:
    """The code points of each split, ascending: all characters are put in a random order, which is cut twice.

    So both splits mix all scripts in the same proportions and share no character. Each character draws its own position
    in the order: if a new version of a font or a library adds or drops a character, the others keep their positions.

    Raises:
      ValueError: if more classes are requested than the fonts have.
      FileNotFoundError: if a font is missing.
    """
    codes = list(glyphs_draw.characters())
    wanted = config.train_classes + config.test_classes
    if wanted > len(codes):
        raise ValueError(f"{wanted} classes were asked for, the fonts have {len(codes)} characters that differ enough.")
    order = sorted(codes, key=lambda code: np.random.default_rng([config.seed, code]).random())
    parts = order[: config.train_classes], order[config.train_classes : wanted]
    return {split: sorted(part) for split, part in zip(_SPLITS, parts, strict=True)}


class Glyphs(tfds.core.GeneratorBasedBuilder):
    """Characters in 6 to 21 faces each, dark ink on lighter paper, in small rotations, shears, stretches and sizes.

    Each example holds
      image: uint8 [S, S, 1], stored as PNG.
      label: the character, named like 'U+0416 CYRILLIC CAPITAL LETTER ZHE'. Train has 0 to T - 1, test the rest.
      kind: how the image was changed: 'clean', 'blur', 'occlusion', 'noise' or 'blend'.
      ambiguity: float32 in [0, 1]: 0 for a clean image, 1 if the character can no longer be recognised.
      other_label: int64, the second character of a blend (from the same split), otherwise -1.

    A share `degraded` of the images of each split is degraded by one of the four kinds with equal probability. The
    ambiguity a is uniform in [0, 1) and sets the strength:
      blur: a Gaussian with sigma a S / 4.
      occlusion: a patch of a flat shade hides the share a of the ink, coming from one side.
      noise: (1 - w) image + w noise with w = sqrt(a), noise of mean 0.5 and deviation 0.25 (white is 1).
      blend: (1 - w) ink + w ink of the other character with w = sqrt(a) / 2, the label being that of the heavier one;
        at a = 1 the two cannot be told apart.
    The scales make the kinds comparable: a small network trained on 150 of the characters in all these states
    misclassified about the share a of the images at ambiguity a (within 0.2; for blends about a / 2, as every second
    guess between two characters is right).

    Deterministic: an image depends on the seed, the split, the character and its index (for a blend also on the second
    character). Its bytes also depend on the versions of Pillow, OpenCV, NumPy and matplotlib (the source of the fonts),
    which `info.metadata` records. Two preparations hold the same records in the same order; the files can differ, as
    protobuf serialises the fields of a record in an order that varies between processes.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (tfds wants a plain attribute)
    BUILDER_CONFIGS = [  # noqa: RUF012
        GlyphsConfig(name="default", description="300 + 200 characters, 20 pictures each."),
        GlyphsConfig(
            name="tiny",
            train_classes=8,
            test_classes=6,
            images_per_class=6,
            description="8 + 6 characters, 6 pictures each: for tests.",
        ),
        *(
            GlyphsConfig(
                name=f"damaged_{percent}",
                train_degraded=percent / 100,
                description=f"As default, with {percent} % of the training pictures damaged and an equal test split.",
            )
            for percent in (0, 60, 90)
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        side = config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 1), dtype=np.uint8, encoding_format="png"),
                    # _split_generators sets the names: choosing the characters takes seconds, and reading must be fast.
                    "label": tfds.features.ClassLabel(num_classes=config.train_classes + config.test_classes),
                    "ambiguity": tfds.features.Scalar(dtype=np.float32),
                    "kind": tfds.features.ClassLabel(names=KINDS),
                    "other_label": tfds.features.Scalar(dtype=np.int64),
                }
            ),
            supervised_keys=("image", "label"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, object]]]]:
        del dl_manager  # nothing to download
        classes = choose_classes(self.builder_config)
        codes = classes["train"] + classes["test"]
        self.info.features["label"].names = [f"U+{code:04X} {unicodedata.name(chr(code))}" for code in codes]
        self.info.metadata["parameters"] = self.builder_config.parameters()
        self.info.metadata["drawn_with"] = glyphs_draw.versions()
        # The processes that draw are started once; tfds takes one split after the other.
        blocks = examples.drawn([series_of(self.builder_config, split, classes[split]) for split in _SPLITS])
        places = [(split, position) for split in _SPLITS for position in range(len(classes[split]))]
        numbered = zip(places, blocks, strict=True)
        return {split: self._generate_examples(split, classes[split], codes, numbered) for split in _SPLITS}

    def _generate_examples(
        self, split: str, codes: list[int], all_codes: list[int], numbered: Iterator
    ) -> Iterator[tuple[str, dict]]:
        first_label = all_codes.index(codes[0])
        for (drawn, position), images in itertools.islice(numbered, len(codes)):
            assert drawn == split
            for index, image in enumerate(images):
                label = first_label + position
                yield (
                    f"{split}_{label}_{index}",
                    {
                        "image": io.BytesIO(image.png),
                        "label": label,
                        "ambiguity": np.float32(image.ambiguity),
                        "kind": KINDS[image.kind],
                        "other_label": -1 if image.other < 0 else first_label + image.other,
                    },
                )


def series_of(config: GlyphsConfig, split: str, codes: list[int]) -> Series:
    """The images of a split, to be drawn."""
    share, number = config.share_of(split), _SPLITS.index(split)
    return Series(config.seed, number, share, config.image_size, config.images_per_class, codes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses tfds' progress bars and download messages."""
    shown = getattr(tqdm_utils, "_active", True)  # tfds has a setter only
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(shown)


def _is_there(builder: Glyphs) -> bool:
    return builder.data_path.exists() and builder.is_prepared()  # is_prepared warns if there is no folder


def prepare(data_dir: str | Path, config: str | GlyphsConfig = "default") -> Glyphs:
    """Returns the builder of a prepared set, drawing it into `data_dir` first if it does not exist.

    The set appears under `data_dir/glyphs/<config>/<version>` in one step when it is complete; an interrupted run
    leaves at most a folder `incomplete.*` next to it, which is never read.

    Args:
      data_dir: folder of data sets, made if missing; `~` is expanded.
      config: the name of a predefined variant ('default', 'tiny') or a custom config.

    Raises:
      ValueError: if the name is unknown, there are fewer characters than requested classes, or a set of that name with
        other parameters already exists.
      FileNotFoundError: if matplotlib's fonts are missing.
      OSError: if `data_dir` cannot be written.
    """
    known = {known.name: known for known in Glyphs.BUILDER_CONFIGS}
    if isinstance(config, str):
        if config not in known:
            raise ValueError(f"No glyphs config {config!r}; known: {', '.join(known)}.")
        config = known[config]
    data_dir = expand(data_dir)
    # By its name where it has one: a worker process of the reader makes the builder again from what is given here.
    given = config.name if known.get(config.name) is config else config
    builder = Glyphs(data_dir=data_dir, config=given)
    if not _is_there(builder):
        classes = config.train_classes + config.test_classes
        logging.info("Drawing %d glyphs into %s", classes * config.images_per_class, builder.data_dir)
        try:
            # Without this flag tfds asks Google's servers for a prepared copy.
            download = tfds.download.DownloadConfig(try_download_gcs=False)
            with _quiet(), tempfile.TemporaryDirectory() as folder:  # tfds makes its download folders in any case
                builder.download_and_prepare(download_dir=folder, download_config=download, file_format="array_record")
        except OSError:
            # Another process may have finished the same set in the meantime: then the rename fails.
            builder = Glyphs(data_dir=data_dir, config=given)
            if not _is_there(builder):
                raise
    drawn = dict(builder.info.metadata or {}).get("parameters")
    if drawn != config.parameters():
        raise ValueError(
            f"{builder.data_dir} holds a set with other parameters: {drawn}, not {config.parameters()}. "
            "Give the config another name, or delete that folder."
        )
    return builder
