"""CIFAR-10, classification: PyramidNet-200 (``resnet``, ``resnet50``: other networks).

    python -m idml_jax.prepare --dataset=cifar10 --source=cifar-10-python.tar.gz
    python -m idml_jax.main --config=configs/cifar10.py:cutmix,ism --workdir=runs/cifar10

Rows: ``baseline``, ``mixup`` or ``cutmix``, each alone (plain) or with ``,ism`` (introspective).
Published, top-1: baseline 96.15, Mixup 96.91, CutMix 97.12; introspective 96.43, 97.13, 97.32.
Meant for a GPU or TPU; ``,quick`` is for a laptop. A folder with ``train/<class>/`` and ``test/<class>/`` works
too: ``--config.data.name=folder --config.data.root=PATH``. The words after the colon are explained in
``idml_jax/training/protocols/classification.py``.
"""

from idml_jax.training.protocols.classification import classification_config


def get_config(arg: str = ""):
    """``arg``: see ``idml_jax.training.protocols.classification.classification_config``."""
    return classification_config("cifar10", arg)
