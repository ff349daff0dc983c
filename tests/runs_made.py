"""Small runs that several tests share. As a program it trains one: ``python runs_made.py IMAGES WORKDIR EPOCHS``."""

import json
import sys

import jax
import numpy as np

from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.training import train
from idml_jax.training.config import default_config


def small_config(folder, **changes):
    config = default_config()
    config.batch_size = 32
    config.epochs = 3
    config.data.root = str(folder)
    config.data.image_size = config.data.resize = 16
    config.data.channels = 1
    config.data.mean, config.data.std = (0.5,), (0.25,)
    config.data.crop_scale = (0.6, 1.0)
    config.data.flip = False
    config.model.name = "convnet_tiny"
    config.model.embedding_dim = config.model.uncertainty_dim = 16
    config.model.uncertainty_hidden = 16
    config.model.batchnorm = "live"
    config.model.semantic_init = "random"
    config.optim.warmup_epochs = 1
    config.optim.learning_rate = 3e-3
    config.optim.proxy_lr_factor = 10.0
    config.eval.batch_size = 40
    config.log.tensorboard = False
    config.log.every_steps = 2
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last_state(config, workdir):
    run = train.build(config)
    checkpoints = Checkpoints(workdir / "checkpoints", "R@1", read_only=True)
    state, record = checkpoints.restore(checkpoints.latest, run.initial_state())
    checkpoints.close()
    return jax.tree.map(np.asarray, state), record


def assert_same_run(config, one, other):
    (expected, expected_record), (got, record) = last_state(config, one), last_state(config, other)
    jax.tree.map(np.testing.assert_array_equal, expected, got)
    assert record == expected_record
    timeless = lambda workdir: [
        {k: v for k, v in row.items() if k != "train/images_per_second"} for row in rows(workdir)
    ]
    assert timeless(other) == timeless(one)
    return got


if __name__ == "__main__":
    train.train_and_evaluate(small_config(sys.argv[1], epochs=int(sys.argv[3])), sys.argv[2])
