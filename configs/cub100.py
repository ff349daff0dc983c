"""CUB at 227 pixels with a ResNet-50: the 100-class subset of birds, or any folder with the same layout.

    python -m idml_jax.main --config=configs/cub100.py --config.data.root=data/cub100 --workdir=runs/cub100

The first half of the classes trains, the second half tests. The settings are the protocol's for IDML-ProxyAnchor on
CUB-200-2011, from random weights (the paper starts from ImageNet's, so expect less). Meant for a GPU or TPU;
``configs/cub100.py:cpu`` runs sixteen steps on small batches and one evaluation, to try it on a laptop. On two busy
cores the first step finished after 67 s, then about one image per second; the loss, averaged over pairs of steps, was
11.8, 9.9, 9.7, 9.5, 9.7 and 10.1 in the first twelve steps; embedding the 2,953 test images took seven minutes.
"""

from idml_jax.training.config import default_config


def get_config(arg: str = ""):
    """``arg``: empty, or ``cpu``."""
    if arg not in ("", "cpu"):
        raise ValueError(f"configs/cub100.py:{arg}: known variants: cpu")
    config = default_config()
    config.data.root = "data/cub100"
    config.data.image_size = 227
    config.data.resize = 256
    # From random weights BatchNorm has to learn; with pretrained ones set it to "frozen".
    config.model.batchnorm = "live"
    config.optim.warmup_epochs = 0
    config.model.dtype = "bfloat16"
    if arg == "cpu":
        config.model.dtype = "float32"
        config.batch_size = 16
        config.optim.learning_rate = 1e-4  # small batches
        config.epochs = 1
        config.max_steps = 16
        config.mixup.enabled = False
        config.eval.batch_size = 16
        config.eval.untrained = False
        config.eval.ambiguity_images = 0
        config.log.every_steps = 2
    return config
