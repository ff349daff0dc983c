"""Omniglot, handwritten characters of alphabets never seen in training, at 32 pixels with a four-layer network.

    python -m idml_jax.main --config=configs/omniglot.py --config.data.root=data/omniglot_small --workdir=runs/omniglot

Measured on two busy cores: six and a half minutes, R@1 18.8 % before and 80 % after, MAP@R 42 % (see docs/results.md).
The folder holds ``train/<Alphabet>.<character>/`` and ``test/...``. Plain instead of introspective:
``--config.ism.enabled=False``; another seed: ``--config.seed=1``.
"""

from idml_jax.training.config import default_config


def get_config(arg: str = ""):
    """No variants."""
    if arg:
        raise ValueError(f"configs/omniglot.py:{arg}: there are no variants")
    config = default_config()
    config.batch_size = 128
    config.epochs = 20
    config.data.root = "data/omniglot_small"
    config.data.image_size = 32
    config.data.resize = 32
    config.data.channels = 1
    config.data.mean = (0.92,)
    config.data.std = (0.26,)
    config.data.crop_scale = (0.6, 1.0)
    config.data.flip = False
    config.data.rotation = 10.0
    config.model.name = "convnet4"
    config.model.embedding_dim = 64
    config.model.uncertainty_dim = 64
    config.model.batchnorm = "live"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 0
    config.optim.proxy_lr_factor = 10.0
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 5
    return config
