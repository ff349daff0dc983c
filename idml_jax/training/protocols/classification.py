"""Settings for classification (Wang et al. 2023; the networks and schedules are those of CutMix, Yun et al. 2019): what
the files in ``configs/`` for CIFAR and ImageNet have in common.

    configs/cifar100.py:baseline      plain softmax
    configs/cifar100.py:mixup         with Mixup (every batch, Beta(1, 1))
    configs/cifar100.py:cutmix        with CutMix (CIFAR: every second batch, ImageNet: every batch; Beta(1, 1))
    configs/cifar100.py:cutmix,ism    introspective; also baseline,ism and mixup,ism: six rows for a data set
    ...,resnet                        CIFAR: a ResNet-110 in place of the PyramidNet-200
    ...,resnet50                      CIFAR: a ResNet-50 with a small stem, as the published table names its rows
    ...,epochs90                      ImageNet: 90 epochs, times 0.1 every 30, in place of 300, every 75
    ...,quick                         a small network for a few epochs, to see everything work
"""

from ml_collections import ConfigDict

from idml_jax.training.config import default_config

MIXING = ("baseline", "mixup", "cutmix")
# Statistics of the training images of each set.
CIFAR_COLOURS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_WORDS = {
    "cifar10": ("ism", "resnet", "resnet50", "quick"),
    "cifar100": ("ism", "resnet", "resnet50", "quick"),
    "imagenet": ("ism", "epochs90", "quick"),
}


def classification_config(dataset: str, arg: str) -> ConfigDict:
    """The settings of a run.

    Args:
      dataset: ``cifar10``, ``cifar100`` or ``imagenet``.
      arg: at most one word of ``MIXING`` (default: ``baseline``) and any of the set's other words, comma-separated.

    Returns:
      The settings, all of which can still be overridden.

    Raises:
      ValueError: for an unknown word, or words that exclude each other.
    """
    words = [word for word in arg.split(",") if word]
    known = (*MIXING, *_WORDS[dataset])
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"unknown variant {unknown[0]!r}; known: {', '.join(known)}, joined by commas")
    for group in (MIXING, ("resnet", "resnet50", "quick")):
        if len(chosen := [word for word in group if word in words]) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other")
    mixing = next((word for word in MIXING if word in words), "baseline")

    config = default_config()
    config.task = "classification"
    config.data.name = dataset
    config.mixup.enabled = False
    config.classification.mixing = "none" if mixing == "baseline" else mixing
    config.ism.enabled = "ism" in words
    config.model.uncertainty_head = "linear"
    config.model.pooling = "avg"
    config.model.batchnorm = "live"
    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.warmup_epochs = 0
    config.optim.clip_value = 0.0
    config.optim.schedule = "step"
    config.optim.step_factor = 0.1
    config.eval.best_metric = "top1"
    config.eval.untrained = False
    if dataset == "imagenet":
        _imagenet(config, "epochs90" in words)
    else:
        _cifar(config, words)
    if "quick" in words:
        _make_quick(config)
    return config


def _imagenet(config: ConfigDict, short: bool) -> None:
    config.batch_size = 256
    config.epochs = 90 if short else 300
    config.data.transform = "imagenet"
    config.data.threads = 16
    config.model.name = "resnet50"
    config.model.uncertainty_dim = 512
    config.model.dtype = "bfloat16"
    config.optim.learning_rate = 0.1
    config.optim.step_epochs = 30 if short else 75


def _cifar(config: ConfigDict, words: list[str]) -> None:
    config.batch_size = 64
    config.epochs = 300
    config.data.transform = "cifar"
    config.data.image_size = config.data.resize = 32
    config.data.mean, config.data.std = CIFAR_COLOURS[config.data.name]
    config.model.name = {"resnet": "cifar_resnet110", "resnet50": "resnet50_small"}.get(
        next((word for word in ("resnet", "resnet50") if word in words), ""), "pyramidnet200"
    )
    config.model.uncertainty_dim = 128
    config.classification.probability = 0.5 if config.classification.mixing == "cutmix" else 1.0
    config.optim.learning_rate = 0.25 if config.model.name == "pyramidnet200" else 0.1
    config.optim.step_at = (150, 225)


def _make_quick(config: ConfigDict) -> None:
    """Shrinks the run for a laptop: minutes instead of days."""
    config.batch_size = 128
    config.epochs = 3
    config.optim.learning_rate = 0.1
    config.optim.schedule = "cosine"
    config.optim.step_at = ()
    config.model.dtype = "float32"
    config.data.threads = 4
    config.model.name = "convnet4"
    if config.data.name == "imagenet":
        config.data.image_size, config.data.resize = 64, 72
