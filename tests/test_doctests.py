"""The examples in the docstrings: each public function of the metric and of the losses on a few numbers."""

import doctest
import importlib
import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import ism, losses
from idml_jax.losses import auxiliary, softmax

MODULES = ("geometry", "ism", "losses", "losses.auxiliary", "losses.miners", "losses.pairs", "losses.pairwise")
MODULES += ("losses.proxy", "losses.softmax", "losses.margin_softmax", "losses.batch_softmax", "losses.triplets")
MODULES += ("losses.ranked", "losses.levels", "losses.class_sampling", "losses.probabilistic", "losses.vmf")
MODULES += ("losses.vmf_kernel", "metrics.names")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


class Close(doctest.OutputChecker):
    """Numbers may differ in the last digit that is written: float32 prints 0.1 as 0.10000000149."""

    def check_output(self, want, got, optionflags):
        if NUMBER.sub("#", want) != NUMBER.sub("#", got):
            return False
        numbers = (np.array([float(x) for x in NUMBER.findall(text)]) for text in (want, got))
        return np.allclose(*numbers, rtol=0, atol=1.1e-3)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    module = importlib.import_module(f"idml_jax.{name}")
    names = {"jnp": jnp, "losses": losses, "Embedding": ism.Embedding}
    runner = doctest.DocTestRunner(Close(), verbose=False)
    examples = [test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples]
    assert examples
    report = []
    for example in examples:
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_every_public_function_has_an_example():
    public = [getattr(module, name) for module in (ism, losses, auxiliary, softmax) for name in module.__all__]
    helpers = {losses.gather}  # needs a mapped axis
    functions = [f for f in public if callable(f) and not inspect.isclass(f) and f not in helpers]
    lacking = [f.__name__ for f in [*functions, ism.Metric] if ">>>" not in (f.__doc__ or "")]
    assert len(functions) > 20 and lacking == []
