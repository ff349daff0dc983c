"""Glyphs, the built-in characters: a small network on images of 32 pixels, training and test classes disjoint.

    python -m idml_jax.main --config=configs/glyphs.py --workdir=runs/glyphs
    python -m idml_jax.main --config=configs/glyphs.py:quick --workdir=runs/glyphs_quick   (launch/quickstart.sh)

The data is drawn on first use. Measured with ``quick`` on two cores: 3 min 12 s in total, R@1 5.9 % before and 62.7 %
after (plain: 62.8 %), rank correlation of the uncertainty with the true ambiguity 0.56.

Plain instead of introspective: ``--config.ism.enabled=False``.
"""

from idml_jax.training.config import default_config


def get_config(arg: str = ""):
    """``arg``: empty, or ``quick`` for a run of two minutes on two cores."""
    if arg not in ("", "quick"):
        raise ValueError(f"configs/glyphs.py:{arg}: known variants: quick")
    config = default_config()
    config.batch_size = 128
    config.epochs = 8 if arg == "quick" else 30
    config.data.name = "glyphs"
    config.data.variant = "default"
    config.data.image_size = 32
    config.data.resize = 32
    config.data.channels = 1
    config.data.mean = (0.5,)
    config.data.std = (0.3,)
    config.data.crop_scale = (0.8, 1.0)
    config.data.flip = False
    config.data.rotation = 10.0
    config.model.name = "convnet4"
    config.model.embedding_dim = 64
    config.model.uncertainty_dim = 64
    config.model.batchnorm = "live"
    config.optim.learning_rate = 3e-3
    config.optim.warmup_epochs = 0
    config.optim.schedule = "cosine"
    config.optim.proxy_lr_factor = 10.0
    config.eval.every_epochs = 2 if arg == "quick" else 5
    config.checkpoint.every_epochs = config.eval.every_epochs
    return config
