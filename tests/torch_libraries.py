"""timm and transformers beside a PyTorch for CPUs, which the compiled operators of PyPI's torchvision do not fit."""

import sys
import types

import pytest


def import_beside_torch(name):
    """The module ``timm`` or ``transformers``; the calling test is skipped where it is not installed."""
    pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        # Without its library of operators, torchvision fails while it describes them to PyTorch's compiler. No
        # test uses them, so the two modules with the descriptions are left empty.
        for module in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        for module in ("torchvision._meta_registrations", "torchvision._autograd_registrations"):
            sys.modules[module] = types.ModuleType(module)
    return pytest.importorskip(name, reason=f"{name} is not installed (extra 'parity')")
