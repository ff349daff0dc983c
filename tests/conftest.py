"""Eight CPU devices for every test, set before jax is imported; small data sets and runs that tests share."""

import logging
import os
import sys

import compiler_options

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# With --slow the tests compile as users do. Child processes inherit the setting of the first process.
os.environ.setdefault("IDML_JAX_TESTS", "slow" if "--slow" in sys.argv else "quick")
os.environ["XLA_FLAGS"] += f" {compiler_options.of_tests(os.environ['IDML_JAX_TESTS'])}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
from absl import flags

# Grain's worker processes and tfds read absl flags, which only a main program parses.
flags.FLAGS.mark_as_parsed()
# A vector that silently broadcasts against a matrix is a bug that shape checks do not find.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: takes minutes; give --slow"))


def shapes_picture(label: int, rng: np.random.Generator, size: int = 24) -> np.ndarray:
    """A grey image whose class determines the direction and width of its stripes."""
    angle, width = (label % 4) * np.pi / 4, 3 + 2 * (label // 4)
    y, x = np.mgrid[:size, :size]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) / width * 2 * np.pi + rng.uniform(0, 6.28))
    return np.clip(128 + 50 * wave + rng.normal(0, 60, (size, size)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder with train/ and test/, each with eight classes of twelve striped images."""
    import cv2

    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, first in (("train", 0), ("test", 4)):
        for label in range(first, first + 8):
            folder = root / split / f"class_{label:02d}"
            folder.mkdir(parents=True)
            for i in range(12):
                cv2.imwrite(str(folder / f"{i:02d}.png"), shapes_picture(label, rng))
    return root


@pytest.fixture(scope="session")
def finished(image_folder, tmp_path_factory):
    """Workdir and result of a small uninterrupted run."""
    from runs_made import small_config

    from idml_jax.training import train

    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train.train_and_evaluate(small_config(image_folder), workdir)


@pytest.fixture
def command_line(monkeypatch):
    """Restores the state that the command line of ``main`` leaves in this process."""
    logger = logging.getLogger("idml_jax")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    for name in ("config", "workdir", "mode", "traceback"):
        if name not in flags.FLAGS:  # idml_jax.main was not imported
            continue
        flags.FLAGS[name].unparse()
        flags.FLAGS[name].value = flags.FLAGS[name].default
    flags.FLAGS.mark_as_parsed()
    sys.modules.pop("config_config", None)  # the settings file, into which the next one would be loaded
