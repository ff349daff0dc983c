"""The first train step compiled in a thread of its own, while the main thread creates the state and measures the
untrained network."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from idml_jax.data.sources import sets_of
from idml_jax.runtime import sharding
from idml_jax.training import steps, watch
from idml_jax.training.build import Run, image_shape

_CHECK_SECONDS = 0.2


def batch_shapes(run: Run) -> dict[str, Any]:
    """Shapes, types and placement of a training batch."""
    sets = sets_of(run.splits.train)
    labels = run.splits.train.labels if sets is None else sets
    place = sharding.of_batch(run.mesh)
    array = lambda shape, dtype: jax.ShapeDtypeStruct((run.config.batch_size, *shape), dtype, sharding=place)
    return {"image": array(image_shape(run.config), jnp.uint8), "label": array(labels.shape[1:], jnp.int32)}


class Ahead:
    """A step that is being compiled, or nothing.

    jax keeps the program for the call with the same shapes, so the first step finds it. Should it not fit, or compiling
    fail, the step compiles as it would have done, and reports what is wrong.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, run: Run) -> None:
        """Starts to compile the first step of a new run (see ``steps.train_step``).

        Not on several hosts, whose programs must be compiled in the same order, nor on a GPU, where compiling measures
        kernels and other work would disturb it.
        """
        config = run.config
        several = jax.process_count() > 1 or jax.default_backend() == "gpu"
        if several or config.optim.cached_features or watch.debug_checks(config.debug):
            return
        state, batch = run.state_shapes(), batch_shapes(run)

        def compile_step() -> None:
            with contextlib.suppress(Exception):
                steps.jit_train_step.lower(state, batch, setup=run.setup, train_trunk=run.trains_trunk(0)).compile()

        self._thread = threading.Thread(target=compile_step, name="compile the first step")
        self._thread.start()

    def wait(self, check: Callable[[], None]) -> None:
        """Waits until it is compiled, which otherwise would begin a second time.

        Args:
          check: called several times a second; may raise to stop waiting.
        """
        while self._thread is not None:
            self._thread.join(_CHECK_SECONDS)
            if self._thread.is_alive():
                check()
            else:
                self._thread = None
