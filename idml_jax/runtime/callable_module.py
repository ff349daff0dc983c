"""Makes a module callable, so that ``idml_jax.embed(...)`` works where ``idml_jax.embed`` is a module."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Gives a module the behaviour and the signature of a function when it is called.

    Args:
      name: the module's ``__name__``; it must be loaded.
      function: what a call of the module calls.
    """
    module = sys.modules[name]
    members = {"__call__": staticmethod(function), "__doc__": ModuleType.__doc__}
    module.__class__ = type("CallableModule", (ModuleType,), members)
    module.__signature__ = _signature(function)  # type: ignore[attr-defined]  # for help() and completion


def _signature(function: Callable[..., Any]) -> Any:
    import inspect

    return inspect.signature(function)
