"""The settings of a run: their defaults, their check, and what a workdir remembers of them."""

import inspect
from typing import Any

from ml_collections import ConfigDict

from idml_jax.data.images.transforms import CHANGES
from idml_jax.losses import LOSSES

SPLIT_CLASSES = 50_000  # from so many on, proxies are split over devices by default
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def loss_options(name: str) -> dict[str, Any]:
    """The settings of a loss with their defaults, read from its signature."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and isinstance(p.default, int | float) and p.name != "dimension"
    }


def network_options(model: ConfigDict) -> dict[str, Any]:
    """What ``models.create_model`` and ``create_classifier`` both take of ``config.model``."""
    names = ("uncertainty_dim", "uncertainty_hidden", "uncertainty_scale", "pooling", "dtype", "remat")
    return {"frozen_statistics": model.batchnorm != "live", **{name: model[name] for name in names}}


def learns_uncertainty(config: ConfigDict) -> bool:
    """Whether anything teaches the uncertainty head: the metric or the order of the images."""
    return bool(config.ism.enabled or config.ism.ranking)


def default_config() -> ConfigDict:
    """Every setting with its default: the paper's protocol for retrieval (METHOD: ResNet-50, AdamW, ProxyAnchor)."""
    config = ConfigDict()
    config.task = "retrieval"  # or classification: softmax, of the training classes
    config.seed = 0
    config.batch_size = 120
    config.epochs = 60
    config.max_steps = 0  # end earlier, after so many steps; 0: after all epochs
    config.debug = ""  # checks by jax: nans, infs, leaks, ranks, transfers, several of them with commas, or all; slow

    config.data = ConfigDict()
    config.data.name = "folder"  # or glyphs, tfds, cub, cars, sop, inshop, cifar10, cifar100, imagenet
    config.data.root = ""  # of an image folder
    config.data.data_dir = ""  # of prepared tfds data sets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.variant = ""  # which tfds data set, which prepared image folder, or which variant of the glyphs
    config.data.train_classes = 0.5  # share (or number) of classes to train on where the data has no split
    config.data.validation_classes = 0.0  # share of the training classes to hold out
    config.data.validation_images = 0.0  # classification: share of every class's training images to hold out
    config.data.on_corrupt = "refuse"  # or skip
    config.data.on_small_class = "refuse"  # or skip, keep: classes with a single image
    config.data.transform = "retrieval"  # or imagenet, cifar
    config.data.image_size = 224
    config.data.resize = 256  # shorter side before the central crop of a test picture
    config.data.channels = 3  # or 1
    config.data.crop_scale = (0.08, 1.0)
    config.data.crop_ratio = (3 / 4, 4 / 3)
    config.data.flip = True
    config.data.rotation = 0.0  # degrees, of retrieval
    config.data.color_jitter = 0.4  # of imagenet: brightness, contrast, saturation
    config.data.corrupt = 0.0  # share of the training pictures that are blurred, noised, occluded or cropped
    config.data.corrupt_kinds = CHANGES
    config.data.lighting = 0.1  # of imagenet: deviation of the multiples of the principal components of colour
    config.data.pad = 4  # pixels around a picture before the crop, of cifar
    config.data.resample = "fast"  # or exact: Pillow's pixels, slower
    config.data.mean = IMAGENET_MEAN
    config.data.std = IMAGENET_STD
    config.data.per_class = -1  # K of P x K batches; 0: plain shuffling; -1: 4 for losses on pairs, else 0
    config.data.threads = 4
    config.data.prefetch = 4  # batches
    config.data.workers = 0  # processes that decode, for hosts with many cores

    config.model = ConfigDict()
    config.model.name = "resnet50"
    config.model.embedding_dim = 512
    config.model.uncertainty_dim = 512
    config.model.uncertainty_head = "mlp"  # or linear, none
    config.model.uncertainty_hidden = 128
    config.model.uncertainty_scale = 1.0  # on the initial weights of the last uncertainty layer
    config.model.pooling = "avg_max"  # or avg, max, token (the class token of a transformer)
    config.model.batchnorm = "frozen"  # or frozen_statistics (scale and bias learn), live
    config.model.dtype = "float32"  # or bfloat16, of the trunk
    config.model.remat = False  # keep no activations inside a block, compute them again: less memory, slower
    config.model.init_from = ""  # weights to start from: .safetensors, .pth, a run's folder; see idml_jax.pretrained
    config.model.init_parts = "trunk"  # of it; or semantic (with the semantic head), all (with both heads)

    config.ism = ConfigDict()
    config.ism.enabled = True
    config.ism.variant = "relative"  # or absolute, released
    config.ism.temperature = 5.0
    config.ism.ranking = 0.0  # weight of the loss by which u learns to order images by how hard they are
    config.ism.prior = 0.0  # weight of the pull of the length of u towards 1, where a loss lets u collapse

    config.loss = ConfigDict()
    config.loss.name = "proxy_anchor"
    config.loss.learned = "none"  # or shared, per_class: the margin loss's beta
    for name in LOSSES:
        config.loss[name] = ConfigDict(loss_options(name))

    config.memory = ConfigDict()  # cross-batch memory, for losses on pairs
    config.memory.size = 0  # embeddings; 0: no memory
    config.memory.warmup_epochs = 1  # before it is used

    config.mixup = ConfigDict()  # of retrieval
    config.mixup.enabled = True
    config.mixup.alpha = 1.0

    config.classification = ConfigDict()  # of that task
    config.classification.mixing = "none"  # or mixup, cutmix
    config.classification.alpha = 1.0  # of their Beta distribution
    config.classification.probability = 1.0  # of being mixed
    config.classification.per_sample = False  # every picture mixed in its own way; else the batch in one
    config.classification.label_smoothing = 0.0

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or sgd
    config.optim.learning_rate = 6e-4
    config.optim.weight_decay = 1e-4
    config.optim.momentum = 0.9  # of sgd
    config.optim.schedule = "step"  # or cosine, constant
    config.optim.step_epochs = 5
    config.optim.step_factor = 0.5
    config.optim.step_at = ()  # of step: epochs at which the rate falls, in place of every step_epochs
    config.optim.ema = 0.0  # decay of moving averages of the weights, by which the run is evaluated; 0: none
    config.optim.warmup_epochs = 5  # in which only heads and proxies train
    config.optim.proxy_lr_factor = 100.0
    config.optim.loss_lr_factor = 1.0  # of other numbers that a loss learns
    config.optim.clip_value = 10.0
    config.optim.accumulate = 1  # parts in which the trunk sees a batch; the loss is still over all of it

    config.sharding = ConfigDict()
    config.sharding.proxies = "auto"  # split over devices from 50,000 classes on; or split, whole (on every device)

    config.eval = ConfigDict()
    config.eval.every_epochs = 1
    config.eval.batch_size = 128
    config.eval.split = "test"  # or validation
    config.eval.ks = (1, 2, 4, 8)
    config.eval.untrained = True  # measure the random network first
    config.eval.best_metric = "R@1"  # classification: top1 or top5
    # Of the evaluation at the end:
    config.eval.cluster = True  # NMI, AMI and F1 of k-means
    config.eval.ambiguity_images = 500  # test pictures that are mixed, cropped, blurred, noised, occluded; 0: none
    config.eval.precision = 0.9  # of the answers, wanted of the threshold that held-out classes choose

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1
    config.checkpoint.keep_latest = 2  # the one before is used should the newest be damaged
    config.checkpoint.keep_best = 1

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.tensorboard = True
    return config
