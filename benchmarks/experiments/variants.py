"""Trains a variant of the uncertainty that is not in the package; otherwise an ordinary run.

    python benchmarks/experiments/variants.py --variant="tau learned" --config=configs/omniglot.py --workdir=runs/x ...

The other arguments are those of ``idml_jax.main``. With the relative metric the temperature divides the length of
``u``, so another temperature is the same as ``u`` made longer or shorter before the loss sees it.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from absl import logging as absl_logging

import idml_jax.main  # noqa: F401, its flags
from idml_jax.ism import DEFAULT_TEMPERATURE, Embedding
from idml_jax.losses.auxiliary import ranking_loss
from idml_jax.models.heads import Heads
from idml_jax.runtime.progress import show_progress
from idml_jax.training import train
from idml_jax.training.build import Run, build
from idml_jax.training.tasks.objective import Objective

LOWEST, HIGHEST = 1.0, 50.0


def with_temperature(embedding: Embedding, tau: Any) -> Embedding:
    return embedding._replace(uncertainty=embedding.uncertainty * (DEFAULT_TEMPERATURE / tau))


class LearnedTemperature(Objective):
    """tau is a parameter, kept between 1 and 50 by a sigmoid of its logarithm; it starts at 5."""

    def init(self, key):
        share = jnp.log(DEFAULT_TEMPERATURE / LOWEST) / jnp.log(HIGHEST / LOWEST)
        return {**super().init(key), "loss": {"tau": jnp.log(share / (1 - share))}}

    def __call__(self, params, embedding, labels, **more):
        tau = LOWEST * (HIGHEST / LOWEST) ** jax.nn.sigmoid(params["loss"]["tau"])
        params = {name: group for name, group in params.items() if name != "loss"}
        return super().__call__(params, with_temperature(embedding, tau), labels, **more)


@dataclasses.dataclass(frozen=True)
class ScheduledTemperature(Objective):
    """tau goes from ``start`` to ``end`` geometrically in the first half of the training."""

    start: float = HIGHEST
    end: float = DEFAULT_TEMPERATURE
    steps: int = 1  # of the whole training

    def __call__(self, params, embedding, labels, *, step=0, **more):
        done = jnp.clip(step / (0.5 * self.steps), 0.0, 1.0)
        tau = self.start * (self.end / self.start) ** done
        return super().__call__(params, with_temperature(embedding, tau), labels, step=step, **more)


class RankingReachesTrunk(Objective):
    """The ranking loss (``ism.ranking``), whose gradient goes into the trunk too."""

    def __call__(self, params, embedding, labels, **more):
        order = ranking_loss(embedding.uncertainty, self.confusion(params, embedding, labels))
        return super().__call__(params, embedding, labels, **more) + order


class SoftplusHeads(Heads):
    """No coordinate of ``u`` is below 0, so two uncertain images never cancel each other in ``u + u'``."""

    def __call__(self, features):
        out = super().__call__(features)
        return {**out, "uncertainty": jax.nn.softplus(out["uncertainty"])}


class DetachedHeads(Heads):
    """``u`` reads the trunk's features, but the trunk gets no gradient from ``u``."""

    def __call__(self, features):
        out = super().__call__(features)
        of_constant = super().__call__(jax.lax.stop_gradient(features))
        return {**out, "uncertainty": of_constant["uncertainty"]}


OBJECTIVES = {
    "tau learned": LearnedTemperature,
    "tau from 50 to 5": ScheduledTemperature,
    "tau from 1 to 5": partial(ScheduledTemperature, start=LOWEST),
    "ranking reaches the trunk": RankingReachesTrunk,
}
HEADS = {"softplus u": SoftplusHeads, "u detached": DetachedHeads}


def changed(run: Run, variant: str) -> Run:
    """The run with the variant's objective or heads."""
    setup = run.setup
    of_flax = ("parent", "name")
    fields = lambda thing: {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.name not in of_flax}
    if variant in OBJECTIVES:
        objective = OBJECTIVES[variant](**fields(setup.objective))
        if isinstance(objective, ScheduledTemperature):
            objective = dataclasses.replace(objective, steps=run.total_steps)
        setup = dataclasses.replace(setup, objective=objective)
    else:
        heads = HEADS[variant](**fields(setup.model.heads))
        setup = dataclasses.replace(setup, model=setup.model.clone(heads=heads))
    return run._replace(setup=setup)


_VARIANT = flags.DEFINE_enum("variant", None, [*OBJECTIVES, *HEADS], "Which one.", required=True)


def run_variant(_: list[str]) -> None:
    show_progress()
    absl_logging.set_verbosity(absl_logging.ERROR)
    assemble = lambda config: changed(build(config), _VARIANT.value)
    train.train_and_evaluate(flags.FLAGS.config, flags.FLAGS.workdir, assemble)


if __name__ == "__main__":
    app.run(run_variant)
