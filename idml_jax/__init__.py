"""Introspective deep metric learning in JAX.

The pure parts (``ism``, ``losses``, ``metrics``) can be used on their own::

    from idml_jax import ism, losses, metrics
"""

__version__ = "0.1.0"
