"""Modules that are also functions, and modules whose members are imported when they are asked for.

``idml_jax.embed(...)`` works where ``idml_jax.embed`` is a module. The modules of the commands import what they work
with late, so that ``--help`` and wrong arguments are answered at once.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any] | str) -> None:
    """Gives a module the behaviour and the signature of a function when it is called.

    Args:
      name: the module's ``__name__``; it must be loaded.
      function: what a call of the module calls; or its home, ``inference.use:embed``, to import it at the first call.
    """
    module = sys.modules[name]

    def found() -> Callable[..., Any]:
        return imported(function) if isinstance(function, str) else function

    def call(*args: Any, **options: Any) -> Any:
        return found()(*args, **options)

    members = {
        "__call__": staticmethod(call if isinstance(function, str) else function),
        "__doc__": ModuleType.__doc__,
        "__signature__": property(lambda _: _signature(found())),  # for help() and completion
    }
    module.__class__ = type("CallableModule", (ModuleType,), members)


def late(name: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module with members that are imported at their first use.

    Args:
      name: the module's ``__name__``.
      homes: home of each member, as ``inference.embed`` (where it has the same name) or ``inference.embed:other``.
    """

    def found(member: str) -> Any:
        if member not in homes:
            raise AttributeError(f"module {name!r} has no attribute {member!r}")
        home = homes[member]
        value = imported(home if ":" in home else f"{home}:{member}")
        setattr(sys.modules[name], member, value)
        return value

    return found


def imported(home: str) -> Any:
    """A module of the package, ``inference.use``, or a member of one, ``inference.use:embed``."""
    module, _, member = home.partition(":")
    value: Any = importlib.import_module(f"idml_jax.{module}")
    return getattr(value, member) if member else value


def _signature(function: Callable[..., Any]) -> Any:
    import inspect

    return inspect.signature(function)
