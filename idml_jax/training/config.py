"""The settings of a run and their defaults."""

import inspect
from typing import Any

from ml_collections import ConfigDict

from idml_jax.data.images.transforms import CHANGES
from idml_jax.losses import LOSSES
from idml_jax.runtime.trackers import Tracking, names_of

SPLIT_CLASSES = 50_000  # number of classes from which proxies are split over devices by default
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def loss_options(name: str) -> dict[str, Any]:
    """The settings of a loss with their defaults, read from its signature."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and isinstance(p.default, int | float | tuple) and p.name != "dimension"
    }


def network_options(model: ConfigDict) -> dict[str, Any]:
    """The options of ``config.model`` that ``models.create_model`` and ``create_classifier`` share."""
    names = ("uncertainty_dim", "uncertainty_hidden", "uncertainty_scale", "pooling", "dtype", "remat")
    return {"frozen_statistics": model.batchnorm != "live", **{name: model[name] for name in names}}


def learns_uncertainty(config: ConfigDict) -> bool:
    """Whether any loss trains the uncertainty head: through the metric or the ranking loss."""
    return bool(config.ism.enabled or config.ism.ranking)


def starts_whitened(config: ConfigDict) -> bool:
    """Whether training starts from the semantic head in closed form (``model.semantic_init``)."""
    model = config.model
    if model.semantic_init == "auto":
        return bool(model.init_from) and model.init_parts == "trunk" and config.task == "retrieval"
    return model.semantic_init == "whiten"


def tracking_of(config: ConfigDict) -> Tracking:
    """What the trackers of a run are told about it."""
    log = config.log
    return Tracking(names_of(log.trackers), log.project, log.name, config.to_dict())


def default_config() -> ConfigDict:
    """Every setting with its default: the paper's protocol for retrieval (METHOD: ResNet-50, AdamW, ProxyAnchor)."""
    config = ConfigDict()
    config.task = "retrieval"  # or classification: softmax over the training classes
    config.seed = 0  # of all randomness: weights, order, augmentation, mixing
    config.batch_size = 120  # images per step, over all devices
    config.epochs = 60  # passes over the training images
    config.max_steps = 0  # number of steps after which to end; 0: after all epochs
    config.debug = ""  # jax's checks: nans, infs, leaks, ranks, transfers (comma-separated), or all; slow

    config.data = ConfigDict()
    config.data.name = (
        "folder"  # or glyphs, tfds, cub, cars, sop, inshop, market, inaturalist, cifar10, cifar100, imagenet
    )
    config.data.root = ""  # folder or table of images
    config.data.image_root = ""  # folder that relative paths of a table start from; empty: the table's own
    config.data.data_dir = ""  # folder of prepared tfds data sets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.variant = ""  # name of the tfds data set, prepared image folder, or variant of the glyphs
    config.data.train_classes = 0.5  # share (or number) of classes to train on where the data has no split
    config.data.validation_classes = 0.0  # share of the training classes to hold out
    config.data.validation_images = 0.0  # classification: share of every class's training images to hold out
    config.data.on_corrupt = "refuse"  # or skip
    config.data.on_small_class = "refuse"  # or skip, keep: classes with a single image
    config.data.transform = "retrieval"  # or imagenet, cifar
    config.data.image_size = 224  # side of the images that the network sees, in pixels
    config.data.resize = 256  # shorter side before the central crop of a test image
    config.data.channels = 3  # or 1
    config.data.crop_scale = (0.08, 1.0)  # range of a training crop's area, as a share of the image
    config.data.crop_ratio = (3 / 4, 4 / 3)  # range of a training crop's width over height
    config.data.flip = True  # mirror half of the training images
    config.data.rotation = 0.0  # degrees, for transform retrieval
    config.data.color_jitter = 0.4  # for transform imagenet: brightness, contrast, saturation
    config.data.corrupt = 0.0  # share of training images that are blurred, noised, occluded or cropped
    config.data.corrupt_kinds = CHANGES  # changes that data.corrupt chooses from
    config.data.label_noise = ConfigDict()  # wrong labels of training images on purpose; docs/wrong_labels.md
    config.data.label_noise.share = 0.0  # share of the training images that get the label of another class
    config.data.label_noise.seed = 0  # of the choice of images and labels
    config.data.label_noise.kind = "uniform"  # or confusable: among the classes that look most alike
    config.data.lighting = 0.1  # for transform imagenet: deviation along the principal components of colour
    config.data.pad = 4  # for transform cifar: pixels of padding before the crop
    config.data.resample = "fast"  # or exact: the pixels of Pillow, slower
    config.data.mean = IMAGENET_MEAN  # per channel, of images in [0, 1], for normalising
    config.data.std = IMAGENET_STD  # per channel, of images in [0, 1], for normalising
    config.data.per_class = -1  # K of P x K batches; 0: plain shuffling; -1: 4 for losses on pairs, else 0
    config.data.threads = 4  # number of reader and decoder threads
    config.data.prefetch = 4  # number of batches read ahead
    config.data.workers = 0  # number of decoding processes, for hosts with many cores; see docs/input_pipeline.md

    config.model = ConfigDict()
    config.model.name = "resnet50"  # or auto: network and image settings of the weights in init_from
    config.model.embedding_dim = 512  # width of the semantic embedding
    config.model.uncertainty_dim = 512  # width of the uncertainty embedding
    config.model.uncertainty_head = "mlp"  # or linear, none, scalar (a length alone, for task retrieval)
    config.model.uncertainty_hidden = 128  # width of the hidden layer of the uncertainty head mlp
    config.model.uncertainty_scale = 1.0  # factor on the initial weights of the last uncertainty layer
    # or avg, max, gem (learned power); of a transformer also token, mean_tokens; of CLIP projection
    config.model.pooling = "avg_max"
    config.model.batchnorm = "frozen"  # or frozen_statistics (scale and bias learn), live
    config.model.dtype = "float32"  # or bfloat16, of the trunk
    config.model.remat = False  # recompute activations inside a block for the gradient: less memory, slower
    config.model.init_from = ""  # weights to start from: owner/name on the hub, .safetensors, .pth, a run's folder
    config.model.init_parts = "trunk"  # or semantic (trunk and semantic head), all (trunk and both heads)
    config.model.input_layer = "match"  # or sum: kernels of colour weights summed for grey images
    config.model.init_origin = ConfigDict()  # written by a run; what is set must be true of the weights
    config.model.init_origin.file = ""  # name of the file
    config.model.init_origin.commit = ""  # of a repository on the hub
    config.model.init_origin.sha256 = ""  # of the file
    # The start of the semantic head: docs/closed_form.md
    config.model.semantic_init = "auto"  # whiten with pretrained weights; or random, whiten: closed form of the images
    config.model.whitened_shrinkage = 0.3  # lambda of a head that starts whitened; 0: chosen from fit.shrinkage
    config.model.whitened_uncertainty = 0.1  # factor on the initial length of u beside a head that starts whitened

    config.ism = ConfigDict()
    config.ism.enabled = True  # introspective: compare with the uncertainty; False: the plain metric
    config.ism.variant = "relative"  # or absolute, released
    config.ism.temperature = 5.0  # tau of the metric; the larger, the weaker the effect of the uncertainty
    config.ism.ranking = 0.0  # weight of the loss that orders images by difficulty through the length of u
    config.ism.prior = 0.0  # weight of the pull of u's length towards 1, for losses under which u collapses
    config.ism.prior_by = (
        "constant"  # or confusion: towards a length that doubles per deviation of the image's confusion
    )
    config.ism.negatives = "learn"  # or stop: pairs of different classes read u but do not teach it
    config.ism.attenuation = 0.0  # weight of the log term that an uncertain pair of one class costs

    config.loss = ConfigDict()
    config.loss.name = "proxy_anchor"  # or several joined by +, as in proxy_anchor+sup_con; see docs/losses.md
    config.loss.weights = ()  # of the losses that are joined by +; empty: 1 each
    config.loss.learned = "none"  # or shared, per_class: beta of the margin loss, slope and offset of hedged_instance
    config.loss.class_share = 1.0  # share of the classes that a batch is compared with in a step, for softmax losses
    config.loss.levels = ""  # text between the levels in class names, such as /: the loss is summed over the levels
    config.loss.level_weights = ()  # of the levels, from coarse to fine; empty: equal, with the sum 1
    config.loss.relation = ""  # CSV file: which classes are positives (1), negatives (0) or neither of each other
    config.loss.centre_spread = 0.0  # weight of the loss that merges proxies of a class (0.2 in SoftTriple's paper)
    config.loss.embedding_norm = 0.0  # weight of the mean squared length of s before it is normalised
    for name in LOSSES:
        config.loss[name] = ConfigDict(loss_options(name))

    config.memory = ConfigDict()  # cross-batch memory, for losses on pairs
    config.memory.size = 0  # number of embeddings; 0: no memory
    config.memory.warmup_epochs = 1  # epochs before it is used

    config.prism = ConfigDict()  # leaves out images whose label is probably wrong (PRISM), for task retrieval
    config.prism.share = 0.0  # expected share of wrong labels, left out of every batch; 0: off
    config.prism.window = 10  # number of batches whose thresholds are averaged; 1: each batch by itself
    config.prism.features = 4096  # number of past features that labels are judged by
    config.prism.warmup_epochs = 1  # epochs in which all images are kept

    config.mixup = ConfigDict()  # for task retrieval
    config.mixup.enabled = True  # train on blends of two images too
    config.mixup.alpha = 1.0  # parameter of the Beta distribution of the share of the first image
    config.classification = ConfigDict()  # for task classification
    config.classification.mixing = "none"  # or mixup, cutmix
    config.classification.alpha = 1.0  # parameter of the Beta distribution of the mixing share
    config.classification.probability = 1.0  # probability that a batch is mixed
    config.classification.per_sample = False  # mix every image in its own way; otherwise one way per batch
    config.classification.label_smoothing = 0.0  # share of the target spread evenly over all classes
    config.optim = ConfigDict()
    config.optim.name = "adamw"  # or sgd
    config.optim.learning_rate = 6e-4  # of trunk and heads
    config.optim.weight_decay = 1e-4  # of every parameter that learns; decoupled from the gradient for adamw
    config.optim.momentum = 0.9  # momentum of sgd
    config.optim.schedule = "step"  # or cosine, constant
    config.optim.step_epochs = 5  # epochs between two drops of the rate, for schedule step
    config.optim.step_factor = 0.5  # factor of each drop, for schedule step
    config.optim.step_at = ()  # epochs at which schedule step drops the rate, instead of every step_epochs
    config.optim.ema = 0.0  # decay of the moving averages of the weights used for evaluation; 0: none
    config.optim.warmup_epochs = 5  # epochs in which only heads and proxies train
    config.optim.trunk = "all"  # or none, last:N (the last N blocks): the part of the trunk that learns
    config.optim.cached_features = False  # with trunk=none: the heads learn from fit.views stored features per image
    config.optim.layer_decay = 1.0  # factor on the rate per block of the trunk, from the last one back; 1: none
    config.optim.proxy_lr_factor = 100.0  # factor on the learning rate of the proxies
    config.optim.loss_lr_factor = 1.0  # factor for other numbers that a loss learns
    config.optim.clip_value = 10.0  # largest absolute value of an entry of the gradient; 0: any
    config.optim.accumulate = 1  # number of parts of a batch in the trunk; the loss still sees the whole batch

    config.fit = ConfigDict()  # the metric in closed form, for idml_jax.fit and model.semantic_init
    config.fit.only = False  # set by idml_jax.fit: the run is the closed form, nothing is trained
    config.fit.method = "whiten"  # or lda, pca; for idml_jax.fit
    config.fit.shrinkage = (0.1, 0.3, 1.0, 3.0, 10.0)  # lambdas to choose from on held-out training classes
    config.fit.widths = ()  # for idml_jax.fit: widths to choose from in the same way; empty: model.embedding_dim
    config.fit.folds = 4  # folds of training classes, each held out once
    config.fit.select = "MAP@R"  # or R@1: the metric that chooses
    config.fit.views = 1  # features per training image: the test transform's and, above 1, the training transform's
    config.fit.unit = False  # statistics of features at length 1, without a mean

    config.sharding = ConfigDict()
    config.sharding.proxies = (
        "auto"  # split over devices from 50,000 classes on; or split, whole (a copy on every device)
    )
    config.sharding.partners = "near"  # partners of Mixup and CutMix, a few rows away; or any, from the whole batch

    config.eval = ConfigDict()
    config.eval.every_epochs = 1  # epochs between two evaluations
    config.eval.batch_size = 128  # images per step of an evaluation, over all devices
    config.eval.split = "test"  # or validation
    config.eval.ks = (1, 2, 4, 8)  # K of R@K
    config.eval.untrained = True  # measure the network before training too
    config.eval.best_metric = "R@1"  # for task classification: top1 or top5
    # For the evaluation at the end:
    config.eval.cluster = True  # NMI, AMI and F1 of k-means
    config.eval.ambiguity_images = (
        500  # number of test images that are mixed, cropped, blurred, noised, occluded; 0: none
    )
    config.eval.precision = 0.9  # precision of answers that the threshold, chosen on held-out classes, aims at

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1  # epochs between two checkpoints
    config.checkpoint.keep_latest = 2  # more than one, so that a damaged newest one can be replaced
    config.checkpoint.keep_best = 1  # number of checkpoints kept for their eval.best_metric
    config.log = ConfigDict()
    config.log.every_steps = 50  # steps between two rows of metrics.jsonl
    config.log.tensorboard = True  # also write TensorBoard's files
    config.log.trackers = ()  # also send metrics, settings and report to some of wandb, mlflow, trackio
    config.log.project = "idml_jax"  # project there; MLflow calls it an experiment
    config.log.name = ""  # name of the run there; empty: that of the run's folder
    return config
