"""Your own images: one folder per class, named by ``--config.data.root=``.

    python -m idml_jax.main --config=configs/folder.py --config.data.root=PATH --workdir=runs/mine

``PATH/train/<class>/`` and ``PATH/test/<class>/`` (or ``val``; or ``query`` and ``gallery``, where queries search
the gallery) are used as they are; ``PATH/<class>/`` alone is split by class, the first half in the order of names for
training (``--config.data.train_classes=``). The network is a ResNet-18 for images of 64 pixels that trains from
scratch; ``configs/folder.py:large`` is the protocol's ResNet-50 at 224 pixels, meant for a GPU or TPU. A truncated file
or one that is not an image stops the run with its name; ``--config.data.on_corrupt=skip`` skips and counts such files.
"""

from idml_jax.training.config import default_config


def get_config(arg: str = ""):
    """``arg``: empty, or ``large``."""
    if arg not in ("", "large"):
        raise ValueError(f"configs/folder.py:{arg}: known variants: large")
    config = default_config()
    config.data.name = "folder"
    if arg == "large":
        return config
    config.batch_size = 64
    config.epochs = 30
    config.data.image_size = 64
    config.data.resize = 72
    config.data.crop_scale = (0.3, 1.0)
    config.model.name = "resnet10_small"
    config.model.embedding_dim = 128
    config.model.uncertainty_dim = 128
    config.model.batchnorm = "live"
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 0
    config.optim.proxy_lr_factor = 10.0
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 1
    return config
