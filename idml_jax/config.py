"""The settings of a run: their defaults, their check, and what a workdir remembers of them."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from idml_jax import watch
from idml_jax.data.resample import METHODS
from idml_jax.data.transforms import CHANGES, TRANSFORMS
from idml_jax.errors import UserError
from idml_jax.losses import LOSSES
from idml_jax.mixing import METHODS as MIXING

SPLIT_CLASSES = 50_000  # from so many on, proxies are split over devices by default
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Fields that change how a run is carried out but not what comes out: a resumed run may differ in them.
FREE_FIELDS = (
    "data.root", "data.data_dir", "data.threads", "data.prefetch", "data.workers", "log.every_steps", "log.tensorboard",
    "checkpoint.keep_latest", "checkpoint.keep_best", "eval.batch_size", "debug",
)  # fmt: skip


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


def _choice(config: ConfigDict, field: str, known: tuple[str, ...]) -> None:
    value = _get(config, field)
    if value not in known:
        raise UserError(f"config.{field} = {value!r}; known: {', '.join(known)}")


def _at_least(config: ConfigDict, field: str, low: float) -> None:
    value = _get(config, field)
    if not low <= value < math.inf:  # false for NaN too
        raise UserError(f"config.{field} = {value} must be at least {low:g}{'' if value < low else ', and finite'}")


def _get(config: ConfigDict, field: str) -> Any:
    for part in field.split("."):
        config = config[part]
    return config


def validate(config: ConfigDict) -> None:
    """Checks what the types of the fields do not: ranges, names and what must fit together.

    Raises:
      UserError: naming the first bad field, its value and what would be right.
    """
    for field in ("batch_size", "epochs", "data.threads", "data.prefetch", "eval.every_epochs", "eval.batch_size",
                  "checkpoint.every_epochs", "checkpoint.keep_latest", "checkpoint.keep_best", "log.every_steps",
                  "model.embedding_dim", "model.uncertainty_dim", "model.uncertainty_hidden", "data.image_size",
                  "optim.step_epochs", "optim.accumulate"):  # fmt: skip
        _at_least(config, field, 1)
    for field in ("seed", "max_steps", "optim.warmup_epochs", "optim.learning_rate", "optim.weight_decay",
                  "optim.clip_value", "optim.proxy_lr_factor", "optim.loss_lr_factor", "data.workers", "data.rotation",
                  "data.pad", "ism.ranking", "ism.prior", "mixup.alpha", "memory.size", "memory.warmup_epochs",
                  "eval.ambiguity_images"):  # fmt: skip
        _at_least(config, field, 0)
    watch.debug_checks(config.debug)
    _choice(config, "loss.name", tuple(sorted(LOSSES)))
    _choice(config, "model.batchnorm", ("frozen", "frozen_statistics", "live"))
    _choice(config, "model.dtype", ("float32", "bfloat16"))
    _choice(config, "model.uncertainty_head", ("mlp", "linear", "none"))
    _choice(config, "model.pooling", ("avg", "max", "avg_max", "token"))
    _choice(config, "model.init_parts", ("trunk", "semantic", "all"))
    _choice(config, "sharding.proxies", ("auto", "split", "whole"))
    _choice(config, "eval.split", ("test", "validation"))
    _choice(config, "data.transform", TRANSFORMS)
    _choice(config, "data.resample", METHODS)
    for field in ("color_jitter", "lighting"):
        if not 0 <= config.data[field] <= 1:
            raise UserError(f"config.data.{field} = {config.data[field]} must be in [0, 1]")
    if config.data.transform != "retrieval" and config.data.rotation:
        raise UserError(f"config.data.rotation = {config.data.rotation} needs config.data.transform = 'retrieval'")
    if config.data.transform == "imagenet" and config.data.lighting and config.data.channels != 3:
        raise UserError("config.data.lighting is of colours; config.data.channels = 1 needs config.data.lighting=0.0")
    if config.data.channels not in (1, 3):
        raise UserError(f"config.data.channels = {config.data.channels}; known: 1 (grey), 3 (colour)")
    for field in ("mean", "std"):
        if len(config.data[field]) != config.data.channels:
            raise UserError(
                f"config.data.{field} has {len(config.data[field])} values for {config.data.channels} channels"
            )
    if min(config.data.std) <= 0:
        raise UserError(f"config.data.std = {tuple(config.data.std)} must be above 0")
    if config.data.resize < config.data.image_size:
        raise UserError(
            f"config.data.resize ({config.data.resize}) must be at least config.data.image_size "
            f"({config.data.image_size})"
        )
    for field in ("crop_scale", "crop_ratio"):
        if len(config.data[field]) != 2:
            raise UserError(f"config.data.{field} = {tuple(config.data[field])} must be two numbers, low and high")
    low, high = config.data.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"config.data.crop_scale = {(low, high)} must be two shares of the area, 0 < low <= high <= 1")
    low, high = config.data.crop_ratio
    if not 0 < low <= high:
        raise UserError(f"config.data.crop_ratio = {(low, high)} must be two ratios, 0 < low <= high")
    if config.mixup.enabled and not config.mixup.alpha > 0:
        raise UserError("config.mixup.alpha must be above 0; config.mixup.enabled=False turns Mixup off")
    if config.ism.enabled and config.model.uncertainty_head == "none":
        raise UserError("config.ism.enabled needs an uncertainty head; config.model.uncertainty_head is 'none'")
    if not config.eval.ks or any(not isinstance(k, int) or k < 1 for k in config.eval.ks):
        raise UserError(f"config.eval.ks = {tuple(config.eval.ks)} must be whole numbers of at least 1")
    if any(not isinstance(epoch, int) or epoch < 1 for epoch in config.optim.step_at):
        raise UserError(f"config.optim.step_at = {tuple(config.optim.step_at)} must be epochs, whole numbers from 1 on")
    if not 0 <= config.optim.ema < 1:
        raise UserError(f"config.optim.ema = {config.optim.ema} must be at least 0 and below 1")
    _choice(config, "task", ("retrieval", "classification"))
    if config.task == "classification":
        _validate_classification(config)
    else:
        _choice(config, "eval.best_metric", (*(f"R@{k}" for k in config.eval.ks), "RP", "MAP@R"))
    if not 0 <= config.data.corrupt <= 1:
        raise UserError(f"config.data.corrupt = {config.data.corrupt} must be a share, 0 to 1")
    kinds = config.data.corrupt_kinds
    if not set(kinds) <= set(CHANGES) or (config.data.corrupt and not kinds):
        raise UserError(f"config.data.corrupt_kinds = {tuple(kinds)} must be some of {', '.join(CHANGES)}")
    for field in ("ranking", "prior"):
        if config.ism[field] and (config.task != "retrieval" or config.model.uncertainty_head == "none"):
            raise UserError(f"config.ism.{field} needs config.task = 'retrieval' and an uncertainty head")
    if config.ism.prior and not learns_uncertainty(config):
        raise UserError("config.ism.prior only keeps u alive; config.ism.enabled or config.ism.ranking must teach it")
    if not 0 < config.eval.precision <= 1:
        raise UserError(f"config.eval.precision = {config.eval.precision} must be in (0, 1]")
    for field in ("data.validation_classes", "data.validation_images"):
        if not 0 <= _get(config, field) < 1:
            raise UserError(f"config.{field} = {_get(config, field)} must be a share, at least 0 and below 1")
    if config.eval.split == "validation" and not (config.data.validation_classes or config.data.validation_images):
        raise UserError(
            "config.eval.split = 'validation' needs config.data.validation_classes (classification: "
            "config.data.validation_images) above 0"
        )


def _validate_classification(config: ConfigDict) -> None:
    _choice(config, "classification.mixing", MIXING)
    _choice(config, "eval.best_metric", ("top1", "top5"))
    _choice(config, "model.init_parts", ("trunk", "all"))
    if config.ism.enabled:
        _choice(config, "ism.variant", ("relative",))
    if not config.ism.temperature > 0:
        raise UserError(f"config.ism.temperature = {config.ism.temperature} must be above 0")
    options = config.classification
    if not options.alpha > 0:
        raise UserError(f"config.classification.alpha = {options.alpha} must be above 0")
    if not 0 <= options.probability <= 1:
        raise UserError(f"config.classification.probability = {options.probability} must be in [0, 1]")
    if not 0 <= options.label_smoothing < 1:
        raise UserError(f"config.classification.label_smoothing = {options.label_smoothing} must be in [0, 1)")
    if config.memory.size:
        raise UserError(f"config.memory.size = {config.memory.size}: classification has no memory; 0")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"a.b": value}``."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def remember(config: ConfigDict, workdir: Path) -> None:
    """Writes ``config.json`` into a new workdir, or checks that a known one holds the same settings.

    Raises:
      UserError: naming up to three fields that differ.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = flatten(read(workdir).to_dict()), flatten(config.to_dict())
        missing = "(not set)"
        differing = [
            f"config.{field} = {old.get(field, missing)!r} there, {new.get(field, missing)!r} here"
            for field in sorted(set(old) | set(new))
            if field not in FREE_FIELDS and old.get(field, missing) != new.get(field, missing)
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"{workdir} holds a run with other settings: {'; '.join(differing[:3])}{more}. "
                "Use the same settings or another --workdir"
            )
        return
    write_json(path, config.to_dict())


def read(workdir: Path) -> ConfigDict:
    """The settings of the run in a workdir.

    Raises:
      UserError: if there are none.
    """
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no run (no config.json)") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    # Settings that are newer than the run have their defaults.
    config = default_config()
    try:
        with config.unlocked():
            config.update(_tuples(values))
    except (TypeError, ValueError, AttributeError) as error:
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} does not hold the settings of a run ({told})") from error
    return config


def _tuples(value: Any) -> Any:
    """JSON's lists back to the tuples they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)


def without_nan(value: Any) -> Any:
    """NaN, which JSON does not have, to null."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
