"""Checks of settings, also of their combinations."""

import difflib
import math

from ml_collections import ConfigDict

from idml_jax.data import tables
from idml_jax.data.images.resample import METHODS
from idml_jax.data.images.transforms import CHANGES, TRANSFORMS
from idml_jax.data.wrong_labels import KINDS
from idml_jax.errors import UserError
from idml_jax.losses import LOSSES
from idml_jax.losses.prism import number_below
from idml_jax.metrics.closed_form import METHODS as CLOSED_FORMS
from idml_jax.mixing import PARTNERS
from idml_jax.models.heads import UNCERTAINTY_HEADS
from idml_jax.runtime.files import user_path
from idml_jax.runtime.trackers import TRACKERS, names_of
from idml_jax.training import learning, watch
from idml_jax.training.config import default_config, learns_uncertainty, starts_whitened
from idml_jax.training.fields import at_least, choice, value_of
from idml_jax.training.tasks import TASKS, task_of, terms
from idml_jax.training.tasks.terms import check_loss

# Fields that must be at least 1, and at least 0; all must be finite.
AT_LEAST_ONE = (
    "batch_size", "epochs", "data.threads", "data.prefetch", "eval.every_epochs", "eval.batch_size",
    "checkpoint.every_epochs", "checkpoint.keep_latest", "checkpoint.keep_best", "log.every_steps",
    "model.embedding_dim", "model.uncertainty_dim", "model.uncertainty_hidden", "data.image_size", "optim.step_epochs",
    "optim.accumulate", "fit.views", "prism.window", "prism.features",
)  # fmt: skip
AT_LEAST_ZERO = (
    "seed", "max_steps", "optim.warmup_epochs", "optim.learning_rate", "optim.weight_decay", "optim.clip_value",
    "optim.proxy_lr_factor", "optim.loss_lr_factor", "data.workers", "data.rotation", "data.pad", "ism.ranking",
    "ism.prior", "loss.centre_spread", "loss.embedding_norm", "mixup.alpha", "memory.size", "memory.warmup_epochs",
    "eval.ambiguity_images", "data.label_noise.seed", "prism.warmup_epochs", "ism.attenuation",
    "model.whitened_uncertainty", "model.whitened_shrinkage",
)  # fmt: skip
SHARES = ("data.corrupt", "data.color_jitter", "data.lighting")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.batchnorm": ("frozen", "frozen_statistics", "live"),
    "model.dtype": ("float32", "bfloat16"),
    "model.uncertainty_head": UNCERTAINTY_HEADS,
    "ism.prior_by": ("constant", "confusion"),
    "ism.negatives": ("learn", "stop"),
    "model.pooling": ("avg", "max", "avg_max", "gem", "token", "mean_tokens", "projection"),
    "model.init_parts": ("trunk", "semantic", "all"),
    "model.input_layer": ("match", "sum"),
    "model.semantic_init": ("random", "whiten", "auto"),
    "fit.method": CLOSED_FORMS,
    "fit.select": ("MAP@R", "R@1"),
    "sharding.proxies": ("auto", "split", "whole"),
    "sharding.partners": PARTNERS,
    "eval.split": ("test", "validation"),
    "data.transform": TRANSFORMS,
    "data.resample": METHODS,
    "data.label_noise.kind": KINDS,
}


def validate(config: ConfigDict) -> None:
    """Validates ranges and constraints across fields.

    Raises:
      UserError: naming the first bad field, its value and what would be right.
    """
    for field in AT_LEAST_ONE:
        at_least(config, field, 1)
    for field in AT_LEAST_ZERO:
        at_least(config, field, 0)
    for field in SHARES:
        if not 0 <= value_of(config, field) <= 1:
            raise UserError(f"config.{field} = {value_of(config, field)} must be in [0, 1]")
    watch.debug_checks(config.debug)
    if config.model.name == "auto":
        raise UserError("config.model.name=auto is for training; the network's name stands in the run's config.json")
    # Registries may get entries from outside the package, so they are read at call time.
    check_loss(config)
    for field, known in {"task": tuple(TASKS), **CHOICES}.items():
        choice(config, field, known)
    _check_start(config.model)
    _check_data(config.data)
    _check_learning(config)
    _check_evaluation(config)
    _check_closed_form(config)
    _check_remedies(config)
    _check_trackers(config.log)
    task_of(config).check(config)


def _check_start(model: ConfigDict) -> None:
    """Checks that what is said about weights has weights to be said about."""
    if model.init_from:
        return
    if model.input_layer != "match":
        raise UserError(
            f"config.model.input_layer = {model.input_layer!r} needs weights: config.model.init_from is empty"
        )
    for field, value in model.init_origin.items():
        if value:
            raise UserError(f"config.model.init_origin.{field} = {value!r}, but config.model.init_from is empty")


def _check_data(data: ConfigDict) -> None:
    """Checks channels, sizes, crops and changes of images."""
    if data.transform != "retrieval" and data.rotation:
        raise UserError(f"config.data.rotation = {data.rotation} needs config.data.transform = 'retrieval'")
    if data.transform == "imagenet" and data.lighting and data.channels != 3:
        raise UserError("config.data.lighting changes colours; config.data.channels = 1 needs config.data.lighting=0.0")
    if data.channels not in (1, 3):
        raise UserError(f"config.data.channels = {data.channels}; known: 1 (grey), 3 (colour)")
    for field in ("mean", "std"):
        if len(data[field]) != data.channels:
            raise UserError(f"config.data.{field} has {len(data[field])} values for {data.channels} channels")
    if min(data.std) <= 0:
        raise UserError(f"config.data.std = {tuple(data.std)} must be above 0")
    if data.resize < data.image_size:
        raise UserError(
            f"config.data.resize ({data.resize}) must be at least config.data.image_size ({data.image_size})"
        )
    for field in ("crop_scale", "crop_ratio"):
        if len(data[field]) != 2:
            raise UserError(f"config.data.{field} = {tuple(data[field])} must be two numbers, low and high")
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"config.data.crop_scale = {(low, high)} must be two shares of the area, 0 < low <= high <= 1")
    low, high = data.crop_ratio
    if not 0 < low <= high:
        raise UserError(f"config.data.crop_ratio = {(low, high)} must be two ratios, 0 < low <= high")
    kinds = data.corrupt_kinds
    if not set(kinds) <= set(CHANGES) or (data.corrupt and not kinds):
        raise UserError(f"config.data.corrupt_kinds = {tuple(kinds)} must be some of {', '.join(CHANGES)}")
    for field in ("validation_classes", "validation_images", "label_noise.share"):
        if not 0 <= (share := value_of(data, field)) < 1:
            raise UserError(f"config.data.{field} = {share} must be a share, at least 0 and below 1")
    noise = data.label_noise
    for field, default in (("seed", 0), ("kind", "uniform")):
        if noise[field] != default and not noise.share:
            raise UserError(
                f"config.data.label_noise.{field} = {noise[field]!r} is of wrong labels, and "
                "config.data.label_noise.share is 0"
            )


def _check_learning(config: ConfigDict) -> None:
    """Checks Mixup, the metric and the optimizer."""
    if config.mixup.enabled and not config.mixup.alpha > 0:
        raise UserError("config.mixup.alpha must be above 0; config.mixup.enabled=False turns Mixup off")
    if config.ism.enabled and config.model.uncertainty_head == "none":
        raise UserError("config.ism.enabled needs an uncertainty head; config.model.uncertainty_head is 'none'")
    for field in ("ranking", "prior"):
        if config.ism[field] and config.model.uncertainty_head == "none":
            raise UserError(f"config.ism.{field} needs config.task = 'retrieval' and an uncertainty head")
    if config.ism.prior and not learns_uncertainty(config):
        raise UserError("config.ism.prior only keeps u alive; config.ism.enabled or config.ism.ranking must teach it")
    if any(not isinstance(epoch, int) or epoch < 1 for epoch in config.optim.step_at):
        raise UserError(f"config.optim.step_at = {tuple(config.optim.step_at)} must be epochs, whole numbers from 1 on")
    if not 0 <= config.optim.ema < 1:
        raise UserError(f"config.optim.ema = {config.optim.ema} must be at least 0 and below 1")
    learning.check(config.optim)
    learning.check_cached(config)


def _check_remedies(config: ConfigDict) -> None:
    """Checks the settings that keep u alive, the memory, and those of PRISM."""
    ism, prism = config.ism, config.prism
    if ism.prior_by != "constant" and not ism.prior:
        raise UserError(f"config.ism.prior_by = {ism.prior_by!r} needs config.ism.prior above 0")
    for field, off in (("negatives", "learn"), ("attenuation", 0)):
        if ism[field] == off:
            continue
        set_to = f"config.ism.{field} = {ism[field]!r}"
        if not ism.enabled or config.task != "retrieval":
            raise UserError(f"{set_to} needs config.task = 'retrieval' and config.ism.enabled")
        if ism.variant == "released":
            raise UserError(f"{set_to}: config.ism.variant = 'released' does not teach u")
        if reads := [name for name in terms.names_of(config.loss.name) if LOSSES[name].reads == "embeddings"]:
            raise UserError(f"{set_to}: the loss {reads[0]} does not read the metric")
    memory, off = config.memory, default_config()
    if not memory.size and memory.warmup_epochs != off.memory.warmup_epochs:
        raise UserError(f"config.memory.warmup_epochs = {memory.warmup_epochs} needs config.memory.size above 0")
    if memory.size and memory.warmup_epochs >= config.epochs:
        raise UserError(
            f"config.memory.warmup_epochs = {memory.warmup_epochs}: the memory is not used in any of the "
            f"{config.epochs} epochs (config.epochs)"
        )
    if not 0 <= prism.share < 1:
        raise UserError(f"config.prism.share = {prism.share} must be a share, at least 0 and below 1")
    if not prism.share:
        fields = "window", "features", "warmup_epochs"
        if changed := [field for field in fields if prism[field] != off.prism[field]]:
            raise UserError(f"config.prism.{changed[0]} = {prism[changed[0]]} needs config.prism.share above 0")
        return
    if prism.warmup_epochs >= config.epochs:
        raise UserError(
            f"config.prism.warmup_epochs = {prism.warmup_epochs} keeps all images in all of the {config.epochs} epochs "
            "(config.epochs)"
        )
    if config.task != "retrieval":
        raise UserError(f"config.prism.share = {prism.share} needs config.task = 'retrieval'")
    if number_below(prism.share, config.batch_size) < 1:
        raise UserError(
            f"config.prism.share = {prism.share} of config.batch_size = {config.batch_size} is less than one image"
        )
    if prism.features < config.batch_size:
        raise UserError(
            f"config.prism.features = {prism.features} must be at least config.batch_size ({config.batch_size})"
        )


def _check_evaluation(config: ConfigDict) -> None:
    """Checks the metrics and the images of evaluation."""
    if not config.eval.ks or any(not isinstance(k, int) or k < 1 for k in config.eval.ks):
        raise UserError(f"config.eval.ks = {tuple(config.eval.ks)} must be whole numbers of at least 1")
    if not 0 < config.eval.precision <= 1:
        raise UserError(f"config.eval.precision = {config.eval.precision} must be in (0, 1]")
    data = config.data  # a table may have validation images of its own
    listed = data.name == "folder" and bool(data.root) and tables.is_table(user_path(data.root))
    if config.eval.split == "validation" and not (data.validation_classes or data.validation_images or listed):
        raise UserError(
            "config.eval.split = 'validation' needs config.data.validation_classes (classification: "
            "config.data.validation_images) above 0"
        )


def _check_trackers(log: ConfigDict) -> None:
    """Checks the names of trackers, and that what is said to them is said to somebody."""
    if any(not isinstance(name, str) for name in log.trackers):
        raise UserError(f"config.log.trackers = {tuple(log.trackers)} must be names, of {', '.join(TRACKERS)}")
    for name in names_of(log.trackers):
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"config.log.trackers: {name!r} is unknown; {hint}known: {', '.join(TRACKERS)}")
    if not log.project:
        raise UserError("config.log.project is empty; it is the project that trackers file the run under")
    for field, default in (("project", "idml_jax"), ("name", "")):
        if log[field] != default and not log.trackers:
            raise UserError(f"config.log.{field} = {log[field]!r} is for trackers, but config.log.trackers is empty")


def _check_closed_form(config: ConfigDict) -> None:
    """Checks the metric in closed form, ``config.fit``, and the start of training from it."""
    fit, model = config.fit, config.model
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in fit.shrinkage)
    if not fit.shrinkage or not numbers:
        raise UserError(f"config.fit.shrinkage = {tuple(fit.shrinkage)} must be numbers above 0")
    if any(not isinstance(width, int) or width < 1 for width in fit.widths):
        raise UserError(f"config.fit.widths = {tuple(fit.widths)} must be whole numbers of at least 1")
    at_least(config, "fit.folds", 2)
    if fit.only:
        return
    for field, default in (("widths", ()), ("method", "whiten")):
        if fit[field] != default:
            raise UserError(f"config.fit.{field} is for python -m idml_jax.fit, which trains nothing")
    if not model.whitened_uncertainty:
        raise UserError("config.model.whitened_uncertainty = 0.0 must be above 0: a u of length 0 gets no gradient")
    if starts_whitened(config) and config.task != "retrieval":
        raise UserError(
            "config.model.semantic_init = 'whiten' needs config.task = 'retrieval': a classifier has no such head"
        )
    if starts_whitened(config) and model.init_from and model.init_parts != "trunk":
        raise UserError(
            f"config.model.semantic_init = 'whiten' would replace the head that config.model.init_parts = "
            f"{model.init_parts!r} loads; use config.model.init_parts=trunk or config.model.semantic_init=random"
        )
