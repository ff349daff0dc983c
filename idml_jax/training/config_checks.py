"""Which settings can work together."""

import math
from typing import Any

from ml_collections import ConfigDict

from idml_jax.data.images.resample import METHODS
from idml_jax.data.images.transforms import CHANGES, TRANSFORMS
from idml_jax.errors import UserError
from idml_jax.losses import LOSSES
from idml_jax.mixing import METHODS as MIXING
from idml_jax.training import watch
from idml_jax.training.config import learns_uncertainty


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
    for field in (
        "batch_size",
        "epochs",
        "data.threads",
        "data.prefetch",
        "eval.every_epochs",
        "eval.batch_size",
        "checkpoint.every_epochs",
        "checkpoint.keep_latest",
        "checkpoint.keep_best",
        "log.every_steps",
        "model.embedding_dim",
        "model.uncertainty_dim",
        "model.uncertainty_hidden",
        "data.image_size",
        "optim.step_epochs",
        "optim.accumulate",
    ):
        _at_least(config, field, 1)
    for field in (
        "seed",
        "max_steps",
        "optim.warmup_epochs",
        "optim.learning_rate",
        "optim.weight_decay",
        "optim.clip_value",
        "optim.proxy_lr_factor",
        "optim.loss_lr_factor",
        "data.workers",
        "data.rotation",
        "data.pad",
        "ism.ranking",
        "ism.prior",
        "mixup.alpha",
        "memory.size",
        "memory.warmup_epochs",
        "eval.ambiguity_images",
    ):
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
        _choice(config, "ism.variant", ("relative",))  # of the introspective softmax
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
