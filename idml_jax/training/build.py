"""Builds a run from its settings."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from idml_jax.data import datasets, samplers
from idml_jax.data.images import transforms
from idml_jax.data.sources import Source, sets_of
from idml_jax.data.wrong_labels import with_wrong_labels, wrong_labels_of
from idml_jax.errors import UserError
from idml_jax.runtime import sharding
from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.training import auto, steps, weights
from idml_jax.training.config import learns_uncertainty, starts_whitened
from idml_jax.training.config_checks import validate
from idml_jax.training.embedder import Embedder, Network
from idml_jax.training.fields import value_of
from idml_jax.training.learning import WHOLE_TRUNK, TrunkLearning, learning_of
from idml_jax.training.optim import GroupOptimizer, Schedule
from idml_jax.training.state import TrainState, create_state_on, shapes_on
from idml_jax.training.tasks import Evaluation, Task, task_of
from idml_jax.training.tasks.class_relations import relation_of
from idml_jax.training.tasks.objective import Objective

logger = logging.getLogger("idml_jax")


class Run(NamedTuple):
    """The parts of a run, built from its settings.

    Attributes:
      config: the settings.
      splits: images of the run.
      sampler: order of the training images.
      train_transform: transform of training images.
      test_transform: transform of test images.
      setup: fixed parts of a training step.
      mesh: devices.
      total_steps: number of steps of the whole run.
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
    def task(self) -> Task:
        """The task of the run: retrieval or classification."""
        return task_of(self.config)

    @property
    def eval_source(self) -> Source:
        """The images used for evaluation: the queries."""
        return self.evaluation(None).source

    @property
    def eval_gallery(self) -> Source | None:
        """The images that the queries search; ``None`` if they search each other."""
        return self.evaluation(None).gallery

    def evaluation(self, variables: Any, check: Callable[[], None] = lambda: None) -> Evaluation:
        """The run's network with given variables, and the images to evaluate it on.

        Args:
          variables: variables of the model, on the mesh.
          check: called before every batch; may raise to stop.
        """
        config = self.config
        embedder = Embedder(
            network=Network(self.setup.model, self.setup.mean, self.setup.std),
            variables=variables,
            transform=self.test_transform,
            mesh=self.mesh,
            batch_size=config.eval.batch_size,
            channels=config.data.channels,
            threads=config.data.threads,
            learned=learns_uncertainty(config),
            check=check,
        )
        return Evaluation(config, embedder, self.splits)

    def initial_state(self) -> TrainState:
        """A fresh state on the mesh."""
        return create_state_on(self.mesh, *self._of_state())

    def state_shapes(self) -> TrainState:
        """Shapes, types and placement of the state, without computing it."""
        return shapes_on(self.mesh, self.setup.objective.split, *self._of_state())

    def _of_state(self) -> tuple[Any, ...]:
        """The arguments of ``create_state``."""
        key, setup = jax.random.key(self.config.seed), self.setup
        return key, setup.model, setup.objective, setup.optimizer, image_shape(self.config), setup.ema > 0

    def trains_trunk(self, step: int) -> bool:
        """Whether the step after ``step`` steps computes a gradient for the trunk."""
        warmup = self.config.optim.warmup_epochs * self.sampler.steps_per_epoch
        return self.setup.optimizer.trunk.anything and step >= warmup

    def best_state(self, workdir: Path) -> tuple[TrainState, int]:
        """The state of the best checkpoint in the run's folder, on the mesh, and its step.

        Raises:
          UserError: if there is no checkpoint, or it has another architecture.
        """
        folder = workdir / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"{folder}: no checkpoints")
        checkpoints = Checkpoints(folder, self.config.eval.best_metric, read_only=True)
        try:
            step = checkpoints.best
            if step is None:
                raise UserError(f"{folder}: no checkpoints")
            state, _ = checkpoints.restore(step, self.initial_state())
        finally:
            checkpoints.close()
        return state, step

    def place(self, state: TrainState) -> TrainState:
        """A state on the mesh."""
        return sharding.place(state, sharding.placement(state, self.mesh, self.setup.objective.split))

    @property
    def relation(self) -> str:
        """Digest of the relation of the classes (``config.loss.levels``, ``relation``); empty without one."""
        relation = getattr(self.setup.objective, "relation", None)
        return "" if relation is None else str(relation.digest)

    def with_variables(self, state: TrainState, variables: dict[str, Any]) -> TrainState:
        """A fresh state with weights and statistics from ``weights.load`` substituted."""
        merged = weights.merge(state.latest, variables)
        state = state.replace(params={**state.params, **merged["params"]}, batch_stats=merged["batch_stats"])
        if self.setup.ema:
            state = state.averaging()
        return self.place(state)

    def pretrained(self) -> tuple[dict[str, Any], str]:
        """Loads the pretrained weights that the settings name; also returns a line that describes them.

        Where they come from is written into the settings (``model.init_origin``).

        Raises:
          UserError: if the weights do not match the network, or are not those of the settings' ``init_origin``.
        """
        located = weights.locate(self.config.model.init_from)
        auto.record_origin(self.config, located)
        tensors = weights.read_located(located)
        warning = auto.check_statistics(self.config, tensors.native)
        if warning:
            logger.warning("warning: %s: %s", located.name, warning)
        images = jax.ShapeDtypeStruct((1, *image_shape(self.config)), jnp.float32)
        like = jax.eval_shape(self.setup.model.init, jax.random.key(0), images)
        model = self.config.model
        return weights.load(tensors, like, model.init_parts, network=model.name, input_layer=model.input_layer)


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Height, width and channels of the network's input."""
    return (config.data.image_size, config.data.image_size, config.data.channels)


def build(config: ConfigDict) -> Run:
    """Opens the data and builds a run; nothing is written.

    Raises:
      UserError: for settings or data that cannot work.
    """
    validate(config)
    mesh = mesh_of(config)
    splits = data_of(config)
    task = task_of(config)
    task.check_splits(splits)
    _check_labels(config, splits)
    sampler = sampler_of(config, splits)
    per_epoch = sampler.steps_per_epoch
    all_steps = config.epochs * per_epoch
    if config.model.batchnorm == "frozen" and not config.model.init_from:
        logger.warning(
            "warning: BatchNorm is frozen and the weights are random; name pretrained ones (config.model.init_from) or "
            "let it learn (config.model.batchnorm=live)"
        )
    train_transform, test_transform = transforms_of(config)
    num_classes = len(splits.train.class_names)
    model = task.model(config, num_classes)
    try:
        model.check_images(*image_shape(config)[:2])
    except ValueError as error:
        raise UserError(f"{error} (config.model.name = {config.model.name!r}, config.data.image_size)") from error
    learning = learning_of(config, model, image_shape(config))
    if config.optim.cached_features and jax.process_count() > 1:
        raise UserError("config.optim.cached_features is for one process, which keeps the features in its folder")
    if not learning.everything and not config.model.init_from:
        logger.warning(
            "warning: config.optim.trunk = %r freezes random weights; name pretrained ones (config.model.init_from) or "
            "let all of the trunk learn (config.optim.trunk=all)",
            config.optim.trunk,
        )
    objective = task.criterion(config, num_classes, per_epoch, mesh)
    if (relation := relation_of(config, splits.train.class_names)) is not None:
        objective = replace(cast(Objective, objective), relation=relation)
    setup = steps.StepSetup(
        model=model,
        objective=objective,
        optimizer=optimizer_of(config, per_epoch, learning),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        mixup_alpha=task.mixup_alpha(config),
        seed=config.seed,
        accumulate=config.optim.accumulate,
        ema=config.optim.ema,
        features=config.optim.cached_features,
        near=0 if config.sharding.partners == "any" else getattr(sampler, "per_class", 1),
    )
    total_steps = min(config.max_steps or all_steps, all_steps)
    return Run(config, splits, sampler, train_transform, test_transform, setup, mesh, total_steps)


def _check_labels(config: ConfigDict, splits: datasets.Splits) -> None:
    """Checks that settings can work with several labels per image and with the validation images that there are."""
    if config.eval.split == "validation" and splits.validation is None:
        raise UserError("config.eval.split = 'validation', but the data has no validation images")
    if sets_of(splits.train) is None:
        return
    wrong = {
        "task": config.task != "retrieval",
        "memory.size": config.memory.size > 0,
        "loss.class_share": config.loss.class_share < 1,
        "prism.share": config.prism.share > 0,
        "loss.levels": bool(config.loss.levels),
        "loss.relation": bool(config.loss.relation),
        "loss.learned": config.loss.learned == "per_class",
        "fit.only": config.fit.only,
        "model.semantic_init": starts_whitened(config),
    }
    for field, bad in wrong.items():
        if bad:
            raise UserError(
                f"config.{field} = {value_of(config, field)!r} needs one class per image; the training images have "
                "several labels"
            )


def mesh_of(config: ConfigDict) -> Mesh:
    """A mesh of all devices; checks that batches divide evenly among them."""
    mesh = sharding.data_mesh()
    sharding.check_divisible(config.batch_size, mesh, "config.batch_size")
    parts = config.optim.accumulate
    if config.batch_size % (parts * mesh.size):
        raise UserError(
            f"config.batch_size ({config.batch_size}) must be a multiple of config.optim.accumulate ({parts}) "
            f"times the {mesh.size} devices"
        )
    sharding.check_divisible(config.eval.batch_size, mesh, "config.eval.batch_size")
    return mesh


def data_of(config: ConfigDict, warn: Callable[[str], None] = logger.warning) -> datasets.Splits:
    """Loads the images of ``config.data``; training images get the wrong labels of ``data.label_noise``.

    Args:
      config: settings.
      warn: receives one line per kind of thing that is left out.
    """
    data, noise = config.data, config.data.label_noise
    names = ("root", "image_root", "data_dir", "variant", "train_classes", "on_corrupt")
    splits = datasets.load_dataset(
        data.name,
        validation_classes=data.validation_classes,
        validation_images=data.validation_images,
        on_small_class=data.on_small_class,
        shared_classes=task_of(config).shared_classes,
        seed=config.seed,
        warn=warn,
        **{name: data[name] for name in names},
    )
    if noise.share and sets_of(splits.train) is not None:
        raise UserError("config.data.label_noise: the images have several labels each; it moves single labels")
    train = with_wrong_labels(splits.train, noise.share, seed=noise.seed, kind=noise.kind)
    wrong = wrong_labels_of(train)
    if wrong is not None:
        logger.info(
            "config.data.label_noise: %d of %d training images have a wrong label (%s)",
            wrong.sum(),
            len(wrong),
            noise.kind,
        )
    return splits._replace(train=train)


def sampler_of(config: ConfigDict, splits: datasets.Splits) -> samplers.Sampler:
    """The order of the training images."""
    if config.fit.only:  # nothing is trained in batches
        return samplers.ShuffledSampler(len(splits.train), min(config.batch_size, len(splits.train)), config.seed)
    per_class = config.data.per_class
    if per_class < 0:
        per_class = task_of(config).images_per_class(config)
    train = splits.train
    weights, sets = getattr(train, "fields", {}).get("weight"), sets_of(train)
    if per_class:
        labels = train.labels if sets is None else sets
        return samplers.BalancedSampler(labels, config.batch_size, per_class, config.seed, weights)
    return samplers.ShuffledSampler(len(train), config.batch_size, config.seed, weights)


def transforms_of(config: ConfigDict) -> tuple[transforms.Transform, transforms.Transform]:
    """The training and the test transform of ``config.data``."""
    data = config.data
    train, test = transforms.create(
        data.transform,
        size=data.image_size,
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
        train = transforms.SometimesChanged(train, data.corrupt, tuple(data.corrupt_kinds))
    return train, test


def optimizer_of(config: ConfigDict, steps_per_epoch: int, trunk: TrunkLearning = WHOLE_TRUNK) -> GroupOptimizer:
    """The update rule of ``config.optim``.

    Args:
      config: settings of the run.
      steps_per_epoch: number of steps per epoch, for the schedule.
      trunk: which parts of the trunk learn, see ``learning_of``.
    """
    optim = config.optim
    return GroupOptimizer(
        name=optim.name,
        schedule=Schedule(
            optim.schedule,
            optim.learning_rate,
            config.epochs * steps_per_epoch,
            optim.step_epochs * steps_per_epoch,
            optim.step_factor,
            tuple(epoch * steps_per_epoch for epoch in optim.step_at),
        ),
        factors=(("proxies", optim.proxy_lr_factor), ("loss", optim.loss_lr_factor)),
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        clip_value=optim.clip_value,
        frozen_norm=config.model.batchnorm == "frozen",
        trunk=trunk,
    )
