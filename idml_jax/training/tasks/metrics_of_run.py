"""The metric of a run: in its loss, and after training."""

from ml_collections import ConfigDict

from idml_jax import ism
from idml_jax.errors import UserError
from idml_jax.ism import Metric


def training_metric(config: ConfigDict) -> Metric:
    """The metric that a run's loss uses: the plain one if ``config.ism.enabled`` is false.

    Raises:
      UserError: for an unknown ``config.ism.variant`` or a ``config.ism.temperature`` that is not above 0.
    """
    settings = config.ism
    # The plain form is selected by config.ism.enabled = False.
    known = [name for name, form in ism.FORMS.items() if form.introspective]
    if settings.variant not in known:
        raise UserError(f"config.ism.variant = {settings.variant!r}; known: {', '.join(known)}")
    if not 0 < settings.temperature < float("inf"):
        raise UserError(f"config.ism.temperature = {settings.temperature} must be above 0 and finite")
    return Metric(settings.variant if settings.enabled else "plain", settings.temperature)


def metric_of(config: ConfigDict) -> Metric:
    """The metric that compares a run's embeddings after training, also if its loss ignored the uncertainty.

    Raises:
      UserError: as ``training_metric``.
    """
    training_metric(config)
    return Metric(config.ism.variant, config.ism.temperature).for_ranking()
