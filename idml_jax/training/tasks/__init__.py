"""Tasks: retrieval and classification. To add a task, write a class and add it to ``TASKS``."""

from ml_collections import ConfigDict

from idml_jax.training.tasks.classification import Classification
from idml_jax.training.tasks.retrieval import Retrieval
from idml_jax.training.tasks.task import Evaluation, Task

__all__ = ["TASKS", "Evaluation", "Task", "task_of"]

TASKS: dict[str, Task] = {"retrieval": Retrieval(), "classification": Classification()}


def task_of(config: ConfigDict) -> Task:
    """The task that the settings of a run name."""
    return TASKS[config.task]
