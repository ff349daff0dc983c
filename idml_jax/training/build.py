"""A run put together from its settings: data, order, transforms, network, loss, optimizer, devices."""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from idml_jax.data import datasets, samplers
from idml_jax.data.images import transforms
from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.losses import LOSSES
from idml_jax.models import EmbeddingModel, create_model
from idml_jax.runtime import sharding
from idml_jax.training import config as config_lib
from idml_jax.training import steps
from idml_jax.training import weights as pretrained
from idml_jax.training.config_checks import validate
from idml_jax.training.optim import GroupOptimizer, Schedule
from idml_jax.training.state import TrainState, create_state_on
from idml_jax.training.tasks import classification as classify_steps
from idml_jax.training.tasks.objective import Objective, training_metric

logger = logging.getLogger("idml_jax")


class Run(NamedTuple):
    """What a run is made of, built from its settings.

    Attributes:
      config: the settings.
      splits: images.
      sampler: order of the training images.
      train_transform: of training pictures.
      test_transform: of test pictures.
      setup: of the steps.
      mesh: devices.
      total_steps: of the whole run.
    """

    config: ConfigDict
    splits: datasets.Splits
    sampler: samplers.Sampler
    train_transform: transforms.Transform
    test_transform: transforms.Transform
    setup: steps.StepSetup
    mesh: Mesh
    total_steps: int

    @property
    def eval_source(self) -> Source:
        """The images that evaluation goes by."""
        source = self.splits.test if self.config.eval.split == "test" else self.splits.validation
        assert source is not None  # else the settings would have been refused
        return source

    @property
    def eval_gallery(self) -> Source | None:
        """What those images search; ``None`` where they search each other, as held-out classes always do."""
        return self.splits.gallery if self.config.eval.split == "test" else None

    def initial_state(self) -> TrainState:
        """A fresh state on the mesh."""
        size, channels = self.config.data.image_size, self.config.data.channels
        key, setup = jax.random.key(self.config.seed), self.setup
        return create_state_on(
            self.mesh, key, setup.model, setup.objective, setup.optimizer, (size, size, channels), setup.ema > 0
        )

    def place(self, state: TrainState) -> TrainState:
        """A state on the mesh."""
        return jax.device_put(state, sharding.placement(state, self.mesh, self.setup.objective.split))

    def with_variables(self, state: TrainState, variables: dict[str, Any]) -> TrainState:
        """A fresh state with what ``pretrained.load`` gives in place of its own weights and statistics."""
        merged = pretrained.merge(state.latest, variables)
        state = state.replace(params={**state.params, **merged["params"]}, batch_stats=merged["batch_stats"])
        if self.setup.ema:
            state = state.averaging()
        return self.place(state)

    def pretrained(self) -> tuple[dict[str, Any], str]:
        """The weights that the settings name, and a line about them.

        Raises:
          UserError: if they do not fit.
        """
        size, channels = self.config.data.image_size, self.config.data.channels
        images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        like = jax.eval_shape(self.setup.model.init, jax.random.key(0), images)
        return pretrained.load(self.config.model.init_from, like, self.config.model.init_parts)


def build(config: ConfigDict) -> Run:
    """Reads the data and puts a run together; nothing is written.

    Raises:
      UserError: for settings or data that cannot work.
    """
    validate(config)
    mesh = sharding.data_mesh()
    sharding.check_divisible(config.batch_size, mesh, "config.batch_size")
    parts = config.optim.accumulate
    if config.batch_size % (parts * mesh.size):
        raise UserError(
            f"config.batch_size ({config.batch_size}) must be a multiple of config.optim.accumulate ({parts}) "
            f"times the {mesh.size} devices"
        )
    sharding.check_divisible(config.eval.batch_size, mesh, "config.eval.batch_size")

    data = config.data
    names = ("root", "data_dir", "variant", "train_classes", "on_corrupt")
    splits = datasets.load_dataset(
        data.name,
        validation_classes=data.validation_classes,
        validation_images=data.validation_images,
        on_small_class=data.on_small_class,
        shared_classes=config.task == "classification",
        seed=config.seed,
        warn=logger.warning,
        **{name: data[name] for name in names},
    )
    per_class = data.per_class
    if per_class < 0:
        on_pairs = config.task == "retrieval" and LOSSES[config.loss.name].references == "batch"
        per_class = 4 if on_pairs else 0
    sampler: samplers.Sampler
    if per_class:
        sampler = samplers.BalancedSampler(splits.train.labels, config.batch_size, per_class, config.seed)
    else:
        sampler = samplers.ShuffledSampler(len(splits.train), config.batch_size, config.seed)
    per_epoch = sampler.steps_per_epoch
    all_steps = config.epochs * per_epoch
    total_steps = min(config.max_steps or all_steps, all_steps)

    if config.model.batchnorm == "frozen" and not config.model.init_from:
        logger.warning(
            "warning: BatchNorm is frozen and the weights are random; name pretrained ones (config.model.init_from) or "
            "let it learn (config.model.batchnorm=live)"
        )
    size = data.image_size
    train_transform, test_transform = transforms.create(
        data.transform,
        size=size,
        resize=data.resize,
        crop_scale=tuple(data.crop_scale),
        crop_ratio=tuple(data.crop_ratio),
        flip=data.flip,
        rotation=data.rotation,
        pad=data.pad,
        color_jitter=data.color_jitter,
        lighting=data.lighting,
        resample=data.resample,
    )
    if data.corrupt:
        train_transform = transforms.SometimesChanged(train_transform, data.corrupt, tuple(data.corrupt_kinds))
    model = config.model
    num_classes = len(splits.train.class_names)
    if config.memory.size and config.memory.size < config.batch_size:
        raise UserError(
            f"config.memory.size ({config.memory.size}) must be 0 or at least config.batch_size ({config.batch_size})"
        )
    split = _split_proxies(config, num_classes)
    if split:
        sharding.check_rows(num_classes, mesh)
    optim = config.optim
    setup = steps.StepSetup(
        model=_create_model(config),
        objective=Objective(
            loss=config.loss.name,
            options=tuple(sorted(config.loss[config.loss.name].items())),
            metric=training_metric(config),
            num_classes=num_classes,
            dim=model.embedding_dim,
            uncertainty_dim=model.uncertainty_dim,
            learned=config.loss.learned,
            memory_size=config.memory.size,
            memory_warmup=config.memory.warmup_epochs * per_epoch,
            ranking=config.ism.ranking,
            prior=config.ism.prior,
            mesh=mesh if split else None,
        ),
        optimizer=GroupOptimizer(
            name=optim.name,
            schedule=Schedule(
                optim.schedule,
                optim.learning_rate,
                all_steps,
                optim.step_epochs * per_epoch,
                optim.step_factor,
                tuple(epoch * per_epoch for epoch in optim.step_at),
            ),
            factors=(("proxies", optim.proxy_lr_factor), ("loss", optim.loss_lr_factor)),
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            clip_value=optim.clip_value,
            frozen_norm=model.batchnorm == "frozen",
        ),
        mean=tuple(data.mean),
        std=tuple(data.std),
        mixup_alpha=config.mixup.alpha if config.mixup.enabled else 0.0,
        seed=config.seed,
        accumulate=optim.accumulate,
        ema=optim.ema,
    )
    if config.task == "classification":
        setup = classify_steps.for_classification(setup, config, splits)
    return Run(config, splits, sampler, train_transform, test_transform, setup, mesh, total_steps)


def _split_proxies(config: ConfigDict, num_classes: int) -> bool:
    """Whether every device has some of the proxies only."""
    able = config.task == "retrieval" and LOSSES[config.loss.name].references == "proxies"
    if config.sharding.proxies == "split" and not able:
        what = f"the loss {config.loss.name}" if config.task == "retrieval" else "classification"
        raise UserError(f"config.sharding.proxies = 'split': {what} has no proxies; auto or whole")
    wanted = num_classes >= config_lib.SPLIT_CLASSES if config.sharding.proxies == "auto" else True
    return able and wanted and config.sharding.proxies != "whole"


def _create_model(config: ConfigDict) -> EmbeddingModel:
    model = config.model
    try:
        return create_model(
            model.name,
            embedding_dim=model.embedding_dim,
            uncertainty_head=model.uncertainty_head,
            **config_lib.network_options(model),
        )
    except ValueError as error:
        raise UserError(f"{error} (config.model)") from error
